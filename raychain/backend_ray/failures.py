"""Failures of worker groups, in words for people."""

from __future__ import annotations

from ray.exceptions import RayActorError

GONE = "its process died; it was killed, or its node was lost"
PARTED = "lost its connection to another worker, whose process was killed or whose node was lost"


def failure_of(error: BaseException) -> str:
    """Why a worker group failed: its workers' own error, without the layers of Ray around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        rank, failure = next(iter(sorted(failures.items())))
        return f"worker {rank}: {_words(getattr(failure, 'cause', None) or failure)}"
    return _words(getattr(error, "controller_failure", None) or error)


def is_loss(error: BaseException) -> bool:
    """Whether the group failed because a process or a node was lost, which is nobody's error."""
    return failure_of(error).endswith((GONE, PARTED))


def _words(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return GONE
    text = str(error).strip()
    if "is unavailable: RpcError" in text:  # an actor's error as text
        return GONE
    if "by peer" in text:  # gloo's and NCCL's way to say it
        return PARTED
    return text.splitlines()[-1] if text else type(error).__name__
