"""The functions that `import raychain` offers, one a module."""
