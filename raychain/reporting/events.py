"""The event protocol: plain dicts that rank 0 of the workers emits (`bad_samples`: every rank) and the driver hands to
RunLog, Progress and DataHealth.

Every event has `event` (its kind, below) and `time` (wall clock, seconds since 1970). Stages count from 0 within the
chain. Values are plain Python: int, float, str, None, dicts and lists of them. Readers ignore kinds they do not know.

stage_start  A worker group begins or resumes a stage.
    stage, model, params, steps (of the whole stage), start_step (steps done before),
    global_batch (pairs), epoch_samples, world_size, cached_as (raw or jpeg)
step         One logged optimiser step; a line of metrics.jsonl.
    stage, step (optimiser steps done), samples (pairs seen by the stage, this step's included),
    epoch (samples / epoch_samples), loss, task_loss, distill_loss (alpha included;
    0 without a teacher), alpha, lr, logit_scale, samples_per_s, data_wait_s (both since the previous logged step),
    world_size
span         Something that took time; a bar of trace.json.
    name, category (one of CATEGORIES), start, end (wall clock seconds), stage (None: no particular one)
evaluation   Measurements on held-out data.
    stage, step (optimiser steps done when measured), metrics (name → float; accuracies and recalls in percent)
measured     A finished stage has metrics that its record did not have.
    stage, record (the stage's entry in run.json)
stage_end    A stage is over, whatever its status.
    stage, record (the stage's entry in run.json)
shared       A stage that ended is in the store, if there is one and it could be copied there.
    stage, record (as in stage_end); told again when the store has its metrics
bad_samples  A shard of the training data that was read lacks samples; told again by every rank, stage and epoch.
    shard (address), identity, bad (as Tally.as_dict gives it)
worker       A worker has started.
    rank, node (id), pid
saved        A checkpoint is complete: what comes after `step` is all that could be lost.
    stage, step
trunk        A state before a cool-down is shared with stages of other lengths.
    stage, trunk (its key), step
stopped      The workers have saved because they were asked to stop.
    stage, step
failure      A worker met an error that it knows: `fatal` would only come again, `memory` could be too large a batch.
    kind (fatal or memory), message; for memory: stage, micro_batch (pairs whose activations were held);
    where training diverged: stage, step (of its last good state; 0: there is none)
restart      A worker group ended early, or was asked to, and another goes on from the last checkpoint.
    reason (failure, memory, drain or grow), workers (of the group that ended), message
warning      Something the user should know that does not stop the run.
    message
"""

from __future__ import annotations

import time
from typing import Any, Literal

Event = dict[str, Any]
Kind = Literal[
    "stage_start", "step", "span", "evaluation", "stage_end", "measured", "shared", "bad_samples", "worker", "saved",
    "trunk", "stopped", "failure", "restart", "warning",
]  # fmt: skip

CATEGORIES = ("stage", "build", "preload", "evaluation", "checkpoint", "export", "restart")
"""What a span can be, in the order of the timeline's rows."""


def event(kind: Kind, **fields: Any) -> Event:
    """An event that happens now."""
    return {"event": kind, "time": time.time(), **fields}
