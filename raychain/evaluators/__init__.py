"""Zero-shot classification and image-text retrieval on held-out shards, spread over the ranks. No Ray here."""

from raychain.evaluators.data import RetrievalData, ZeroShotData, resolve_retrieval, resolve_zero_shot
from raychain.evaluators.measure import evaluate

__all__ = ["RetrievalData", "ZeroShotData", "evaluate", "resolve_retrieval", "resolve_zero_shot"]
