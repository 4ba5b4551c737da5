"""Losses: tensors in, losses out."""
