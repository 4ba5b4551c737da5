"""Whether a folder holds the search that is asked for, and what an earlier version left there, in today's keys."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from raychain import records
from raychain.config.experiment import Experiment
from raychain.config.loading import validate
from raychain.core.json import Json
from raychain.errors import InputError
from raychain.models.registry import own_configs
from raychain.records import SearchRecord
from raychain.searching.request import Plan, judged_by
from raychain.training.task import ChainTask

RESULT = "search.json"
USUAL_METRIC = "zero_shot_top1"
"""What searches were about before a metric was named, and so no part of their identity."""
FREE = {"trials", "concurrent", "metric", "stop", "callbacks"}
"""Settings that may be others when a search goes on."""
Tasks = Callable[[Any, Any], ChainTask | None]


def identity(plan: Plan) -> str:
    """Content address of a search: its chains' data, recipe and evaluation as their keys see them, and what chooses.

    Workers, cache, storage, names and addresses have no part in it, as they have none in the keys of stages. The
    settings of the search, which keys do not hold, are there because they decide which chains are tried; more trials
    or worker groups make no other search.
    """
    experiment, space = plan.experiment, plan.space
    tasks = [plan.base] + ([plan.full] if plan.full else [])
    content = {
        "schema": SearchRecord.SCHEMA,
        "stages": [stage.key for task in tasks for stage in task.stages],
        "evaluation": [task.suite.digest for task in tasks],
        "every": str(experiment.evaluate.every) if plan.search.asha else None,  # when chains are judged
        "recipe": experiment.train.model_dump(mode="json", exclude={"micro_batch", "log_every"}, exclude_defaults=True),
        "transfer": experiment.transfer.model_dump(mode="json", exclude_defaults=True),
        "chains": space.chains,
        "lengths": [sorted(space.lengths), space.first, space.grown, sorted(space.rules)],
        "operators": space.operators,
        "baseline": [space.baseline.model, str(space.baseline.epochs)],
        "planner": experiment.allocation and experiment.allocation.model_dump(mode="json", exclude_defaults=True),
        "search": plan.search.model_dump(mode="json", exclude=FREE, exclude_defaults=True)
        | ({"metric": plan.metric.recorded} if plan.metric.recorded != USUAL_METRIC else {}),
    }
    # What a name means: raychain's, open_clip's and timm's mean the same always.
    if own := own_configs([*(size.name for size in space.sizes), space.baseline.model]):
        content["own models"] = own
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def earlier(plan: Plan, tasks: Tasks) -> SearchRecord | None:
    """The search.json of an earlier call, None without one; `tasks` gives the task of a trial's kind and choices.

    Raises InputError for a search of other settings or data.
    """
    found = records.take(plan.out, RESULT, SearchRecord)
    if found is None or found.identity == identity(plan):
        return found
    if found.version == 1 and _same_settings(plan, found) and not _touched(plan):
        return _renamed(found, tasks)
    raise InputError("--out", plan.out.address, "a folder of this search, or a new one",
                     "it holds a search of other settings or other data: give another --out")  # fmt: skip


def _same_settings(plan: Plan, found: SearchRecord) -> bool:
    try:
        return _settings(validate(found.config or {})) == _settings(plan.experiment)
    except (InputError, KeyError, TypeError, ValueError):
        return False


def _settings(experiment: Experiment) -> Json:
    """What schema 1 took for a search's settings; what a machine decided then is as it was decided."""
    precision = experiment.train.precision or ("bf16" if experiment.compute.gpus_per_worker else "fp32")
    left_out = {"compute", "preload", "track", "checkpoint", "storage", "name"}
    tree = experiment.model_dump(mode="json", exclude=left_out)
    tree["train"]["precision"], tree["data"]["store"] = precision, None
    tree["search"] = {k: v for k, v in (tree.get("search") or {}).items() if k not in ("trials", "concurrent")}
    tree["search"]["metric"] = judged_by(experiment).recorded
    return tree


def _touched(plan: Plan) -> bool:
    """Whether data was touched after the earlier search wrote what it knew of it."""
    written = plan.out.fs.get_file_info(plan.out.join(RESULT)).mtime
    tasks = [plan.base] + ([plan.full] if plan.full else [])
    changed = max(max(task.suite.changed, *(s.former.changed for s in task.stages)) for task in tasks)
    return not isinstance(written, datetime) or changed > written.timestamp()


def _renamed(found: SearchRecord, tasks: Tasks) -> SearchRecord:
    """The result with today's keys of all its stages, wherever they stand in it."""
    text = json.dumps(found.content())
    for former, key in _keys(found, tasks):
        text = text.replace(former, key)
    return SearchRecord.of(json.loads(text))


def _keys(found: SearchRecord, tasks: Tasks) -> Iterator[tuple[str, str]]:
    for entry in found.trials or ():
        task = tasks(entry.kind, entry.params)
        for stage in task.stages if task else ():
            yield stage.former.key, stage.key
