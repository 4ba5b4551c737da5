"""Causal language models of transformers, trained on the next token."""
