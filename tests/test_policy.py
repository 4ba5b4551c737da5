"""What a failed worker group leads to."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError

from raychain.backend_ray.failures import GONE, failure_of
from raychain.runs.policy import LONGEST_S, FailurePolicy, MicroBatches


def test_failures_in_a_row_are_bounded_and_wait_longer_each_time():
    policy = FailurePolicy(3)
    assert [policy.failed() for _ in range(4)] == [0.0, 2.0, 4.0, None]
    assert FailurePolicy(0).failed() is None
    patient = FailurePolicy(100)
    assert max(patient.failed() or 0 for _ in range(20)) == LONGEST_S


def test_progress_starts_the_count_anew():
    policy = FailurePolicy(1)
    for step in range(50):
        assert policy.failed() == 0.0
        policy.progressed(0, step)
    assert policy.failed() == 0.0
    policy.progressed(0, 10)  # a group that resumed before the furthest state has won nothing yet
    assert policy.failed() is None
    policy.progressed(1, 0)
    assert policy.failed() == 0.0


def test_micro_batches_are_halved_for_the_stage_and_those_after_it():
    micro = MicroBatches(None)
    assert micro.of(0) is None
    assert micro.too_large(1, 100) == 50
    assert [micro.of(stage) for stage in (0, 1, 2)] == [None, 50, 50]
    assert micro.too_large(2, 50) == 25
    assert [micro.of(stage) for stage in (0, 1, 2)] == [None, 50, 25]
    assert micro.too_large(2, 1) is None


def test_a_given_micro_batch_is_not_changed():
    micro = MicroBatches(16)
    assert micro.of(3) == 16
    assert micro.too_large(3, 16) is None


@pytest.mark.parametrize(
    ("cause", "told"),
    [
        (ActorDiedError(), f"worker 1: {GONE}"),
        (RuntimeError("The actor 0294 is unavailable: RpcError: rpc_code: 14."), f"worker 1: {GONE}"),
        (
            RuntimeError("[gloo/pair.cc:545] Connection reset by peer. GLHF!"),
            "worker 1: lost its connection",
        ),
        (ValueError("first line\nloss is nan"), "worker 1: loss is nan"),
        (KeyError(), "worker 1: KeyError"),
    ],
)
def test_a_failure_is_told_in_the_words_of_the_first_worker(cause: BaseException, told: str) -> None:
    error = RuntimeError("layers of Ray")
    error.worker_failures = {2: RuntimeError("later"), 1: cause}  # type: ignore[attr-defined]
    assert failure_of(error).startswith(told)
    assert failure_of(cause) == failure_of(error).removeprefix("worker 1: ")
