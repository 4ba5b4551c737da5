"""`raychain.plan`: what a chain costs before it is trained, or which chains the principles propose for a family."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from raychain.config import Experiment, opened
from raychain.core.json import Json
from raychain.errors import InputError

if TYPE_CHECKING:  # torch is imported by what plans, not by --help
    from raychain.planning.cost import ChainCost
    from raychain.planning.resources import Measured

SHOWN = 5


def plan(
    experiment: str | Experiment,
    *,
    overrides: tuple[str, ...] = (),
    tflops: float | None = None,
    mfu: float = 0.4,
    throughput: Sequence[float] = (),
    like: str | None = None,
    models: str | None = None,
) -> Json:
    """What an experiment's chain costs, as `raychain plan --json` prints it; nothing is trained or started.

    With a `family` instead of a chain the result is that of the best proposal, and `proposals` lists the next ones.
    Hours are estimated from `tflops` (dense peak of one accelerator, reached to the share `mfu`), from `throughput`
    (samples a second over all workers, a number a stage), or `like` a finished run's folder. `models` is a folder of
    model configs in place of the experiment's.
    Raises InputError for wrong input and where no chain is within the limits.
    """
    from raychain.data.commands import unexecuted
    from raychain.runs.checks import check_chain, check_precision
    from raychain.runs.costing import cost_of
    from raychain.runs.origins import named

    config = opened(experiment, overrides, models)
    with unexecuted():
        config, chosen = _chosen(config) if config.family else (named(config), {})
        check_chain(config)
        check_precision(config)
        costed = cost_of(config)
    return {
        "name": config.name,
        **_chain(config, costed.cost, costed.samples),
        **_time(config, costed.cost, tflops, mfu, throughput, like),
        **_prediction(config, costed.cost),
        "warnings": costed.warnings,
        **chosen,
        "notes": _notes(config, costed.cost, costed.samples),
    }


def _notes(config: Experiment, cost: ChainCost, samples: int) -> list[str]:
    """When such a chain pays, as far as it was measured: for CLIP alone, beside what its cost says itself."""
    from raychain.paradigms import make_paradigm
    from raychain.planning.advice import cost_advice, transfer_advice

    transfer, found = config.transfer, cost_advice(cost)
    if make_paradigm(config.task).principled:
        found += transfer_advice(
            cost,
            samples,
            shrink=transfer.shrink,
            distilled=transfer.distill is not None,
            grown=transfer.width != "none",
        )
    return found


def _chosen(config: Experiment) -> tuple[Experiment, Json]:
    """The experiment with the best proposal's chain, and what else there was: reasons, next proposals, warnings."""
    from raychain.paradigms import make_paradigm
    from raychain.planning.checks import warnings
    from raychain.planning.proposals import why
    from raychain.runs.costing import proposals_for, with_chain

    proposals, samples = proposals_for(config)
    principled = make_paradigm(config.task).principled
    family = list({stage.size.name: stage.size for found in proposals for stage in found.cost.stages}.values())
    shown = [
        {
            "chain": [
                {"model": model, "epochs": epochs}
                for model, epochs in zip(found.cost.models, found.cost.epochs, strict=True)
            ],
            "macs": found.cost.macs,
            "percent_of_baseline": round(found.cost.percent_of_baseline, 2),
            "speedup": round(found.cost.speedup, 3),
            "family_speedup": round(found.cost.family_speedup, 3),
            "breaks": list(found.broken),
            "warnings": warnings(found.cost, samples, family) if principled else [],
        }
        for found in proposals[:SHOWN]
    ]
    chosen = {
        "proposed_from": len(proposals),
        "why": why(proposals[0], samples, principled=principled),
        "proposals": shown,
        "warnings": shown[0]["warnings"],  # these recommend models of the user's family only
    }
    return with_chain(config, proposals[0]), chosen


def _chain(config: Experiment, cost: ChainCost, samples: int) -> Json:
    from raychain.paradigms import make_paradigm
    from raychain.planning.resources import memory_bytes

    workers = config.most_workers
    precision = config.train.precision or "fp32"
    total, stages = cost.macs, []
    for stage, ratio in zip(cost.stages, (None, *cost.ratios), strict=True):
        memory = memory_bytes(
            stage.size,
            stage.teacher,
            batch=-(-config.train.global_batch // workers),
            items=stage.items,
            precision=precision,
            average=config.train.average is not None,
        )
        origin = None
        if stage.origin is not None:
            origin = {"checkpoint": stage.origin, "model": (stage.start or stage.size).name}
        stages.append(
            {
                "model": stage.size.name,
                "params": stage.size.params,
                "image_params": stage.size.principal_params,
                "forward_macs": stage.forward_macs,
                "epochs": stage.epochs,
                "samples_seen": stage.samples,
                "macs": stage.macs,
                "share": round(stage.macs / total, 4),
                "expansion_ratio": None if ratio is None else round(ratio, 3),
                "memory_bytes": None if stage.given else memory,
                "origin": origin,
            }
        )
    return {
        "samples": samples,
        "sample_tokens": make_paradigm(config.task).sample_tokens,
        "principal": cost.stages[-1].size.principal,
        "captions": config.data.captions.per_image,
        "workers": workers,
        "stages": stages,
        "macs": total,
        "baseline": {
            "model": cost.baseline.size.name,
            "epochs": cost.baseline.epochs,
            "macs": cost.baseline.macs,
        },
        "percent_of_baseline": round(cost.percent_of_baseline, 2),
        "speedup": round(cost.speedup, 3),
        "family_speedup": round(cost.family_speedup, 3),
    }


def _time(
    config: Experiment, cost: ChainCost, tflops: float | None, mfu: float, throughput: Sequence[float], like: str | None
) -> Json:
    from raychain.planning.resources import Peak, Rate, Throughput, hours

    if sum((tflops is not None, bool(throughput), like is not None)) > 1:
        raise InputError(
            "raychain plan", "several of --tflops, --throughput, --like", "one of them", "leave out others"
        )
    rate: Rate
    workers = config.most_workers
    if tflops is not None:
        rate, basis = Peak(tflops, mfu, workers), f"{workers} × {tflops:g} TFLOP/s at {100 * mfu:g} %; training only"
    elif throughput:
        if len(throughput) != len(cost.stages):
            names = ", ".join(cost.models)
            raise InputError("--throughput", f"{len(throughput)} numbers", f"one for each of {names}", "give them all")
        rate, basis = (
            Throughput(dict(zip(cost.models, throughput, strict=True))),
            "the given samples/s; training only",
        )
    elif like is not None:
        rate, basis = _measured_rate(like), f"the stages of {like}, evaluation included"
    else:
        return {}
    own = hours(cost, rate)
    rounded = [round(value, 4) for value in own]
    return {"time": {"basis": basis, "hours": rounded, "total_hours": round(sum(own), 4),
                     "worker_hours": round(sum(own) * workers, 4)}}  # fmt: skip


def _measured_rate(like: str) -> Measured:
    from raychain.core.storage import Folder
    from raychain.planning.resources import measured_rate
    from raychain.records import RunRecord, read

    try:
        run = read(Folder(like), "run.json", RunRecord)
    except OSError as error:
        raise InputError("--like", like, "a run folder that can be read", str(error)) from None
    rate = measured_rate((run and run.stages) or [])
    if rate is None:
        raise InputError("--like", like, "a run folder with run.json and a finished stage", "give another folder")
    return rate


def _prediction(config: Experiment, cost: ChainCost) -> Json:
    """What finished runs under `storage` say about the last stage's accuracy; nothing where there are none, or where
    part of what it costs is unknown.
    """
    from raychain.core.storage import Folder
    from raychain.evaluators.metrics import FORMER
    from raychain.planning.measured import points, predict_metric
    from raychain.records import ConfigRecord, RunRecord, read

    if any(stage.origin is not None for stage in cost.stages):
        return {}
    try:
        storage = Folder(config.storage)
        runs = [run for name in storage.list() if (run := read(storage, f"{name}/run.json", RunRecord, quiet=True))]
    except (OSError, InputError):  # planning needs no storage
        return {}
    score = config.evaluate.judged_by or FORMER[0]
    measured = points(runs, ConfigRecord.of(config.model_dump(mode="json")), score)
    if not measured:
        return {}
    grown = len(cost.stages) > 1
    found = predict_metric(measured, cost.models[-1], grown=grown, macs=cost.macs, metric=score)
    return {"prediction": {"reason": found} if isinstance(found, str) else dataclasses.asdict(found)}
