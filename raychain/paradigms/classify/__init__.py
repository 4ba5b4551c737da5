"""Supervised classification of pictures by timm's models."""
