"""Experiments of trials: a chain in place of what a search chooses from, and less of everything for a proxy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raychain.config.experiment import Experiment, Stage
from raychain.config.search import Proxy
from raychain.schema.durations import Duration


def with_stages(experiment: Experiment, stages: Sequence[tuple[str, Duration]], transfer: Any = None) -> Experiment:
    """The experiment as a plain chain of these models and lengths."""
    chain = tuple(Stage(model=model, epochs=length) for model, length in stages)
    changes = {"chain": chain, "family": None, "allocation": None, "search": None}
    return experiment.model_copy(update=changes | {"transfer": transfer or experiment.transfer})


def proxied(experiment: Experiment, proxy: Proxy, shards: Sequence[str] | None) -> Experiment:
    """The experiment at the proxy's fidelity; `shards` are those that are read, where not all are."""
    data, train, transfer = experiment.data, experiment.train, experiment.transfer
    if shards is not None:
        sources = type(data).model_validate(data.model_dump(mode="json") | {"train": list(shards)}).train
        data = data.model_copy(update={"train": sources, "samples": None})
    if proxy.image_size:
        data = data.model_copy(update={"image_size": proxy.image_size})
    chain = tuple(stage.model_copy(update={"epochs": part(stage.length, proxy.epochs)}) for stage in experiment.chain)

    def warmup(length: Duration | None) -> Duration | None:
        share = proxy.epochs if length and length.unit == "epochs" else proxy.epochs * proxy.shards
        return length if length is None or length.unit == "%" else part(length, share)

    return experiment.model_copy(
        update={
            "data": data,
            "chain": chain,
            "train": train.model_copy(update={"warmup": warmup(train.warmup)}),
            "transfer": transfer.model_copy(update={"warmup": warmup(transfer.warmup)}),
        }
    )


def part(length: Duration, share: float) -> Duration:
    """A share of a length: a step, sample or whole unit at least, any share of epochs."""
    amount = length.amount * share
    return Duration(max(1, round(amount)) if length.unit != "epochs" else amount, length.unit)
