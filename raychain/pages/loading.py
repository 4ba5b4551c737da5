"""What a report needs from a run folder, read through the records of `raychain.records`: what is damaged is left out,
and the rest is shown. The experiment of run.json (`config`), the machine and metrics.jsonl are plain JSON, of which any
field may be missing or of any type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder
from raychain.core.wording import several
from raychain.errors import InputError
from raychain.evaluators.metrics import Definition, read_back
from raychain.lease import LEASE, is_abandoned
from raychain.records import RunRecord, SearchRecord, StageEntry
from raychain.reporting import trace
from raychain.reporting.runlog import METRICS, RUN, TRACE
from raychain.schema.durations import parse_duration

SEARCH = "search.json"
MOST = 1e40
"""No quantity of a run is larger."""
MOST_STAGES = 64
"""Stages that are drawn."""
NONE = StageEntry(key="")
"""The record of a stage that has none."""
PRINCIPAL = {"image": "parameters of the image tower", "decoder": "parameters without tables of tokens"}
"""Parts that expansion ratios are about, and what their sizes are called."""
Kind = TypeVar("Kind", RunRecord, SearchRecord)


@dataclass(frozen=True)
class Stage:
    """A stage as planned or trained; None is unknown."""

    index: int
    model: str
    status: str
    """trained, reused or failed; else `unfinished` (it has begun) or `not started`."""
    params: float | None
    image_params: float | None
    """Parameters of the part that ratios are about: of the image tower, or of a decoder without its tables of tokens;
    None for models without such parts too."""
    length: str
    """Length in the words of the experiment: `8 epochs`."""
    macs: float | None
    macs_per_sample: float | None
    first_macs: float | None
    """Training MACs of the stages before it."""
    metrics: dict[str, float]
    record: StageEntry
    """Its record; one without content where it has none yet."""
    lines: list[Json] = field(repr=False)
    """Its lines of metrics.jsonl."""
    principal: str = "image"
    """The name of that part."""

    @property
    def done(self) -> bool:
        """Whether it is finished."""
        return self.status in ("trained", "reused", "given")

    @property
    def seen(self) -> float:
        """Samples it has seen."""
        last = number(self.lines[-1]["samples"]) if self.lines else 0.0
        return max(self.record.samples_seen or 0.0, last or 0.0)

    def at(self, samples: float) -> float | None:
        """The chain's training MACs once this stage has seen `samples`."""
        if self.macs_per_sample is None or self.first_macs is None:
            return None
        return self.first_macs + samples * self.macs_per_sample


@dataclass(frozen=True)
class Run:
    """A run folder."""

    record: RunRecord
    stages: list[Stage]
    bars: list[trace.Bar] = field(repr=False)

    @property
    def measures(self) -> list[Definition]:
        """The metrics that matter most, the score first."""
        found = [definition for definition in read_back({"metrics": self.record.metrics}) if definition.brief]
        return sorted(found, key=lambda definition: definition.name != self.record.score)

    @property
    def config(self) -> Json:
        """The experiment as it was resolved."""
        return self.record.config.content() if self.record.config else {}

    @property
    def lines(self) -> list[Json]:
        """Every line of metrics.jsonl, in the order of the stages."""
        return [line for stage in self.stages for line in stage.lines]


def read(folder: Folder) -> tuple[Run | None, SearchRecord | None]:
    """The run and the search of a folder. Raises InputError where it has neither, where it cannot be read, and where a
    newer version wrote them.
    """
    allowed, fix = "the folder of a run (run.json) or of a search (search.json)", "give its path or s3:// address"
    try:
        found = records.show(folder, RUN, RunRecord)
        searched = records.show(folder, SEARCH, SearchRecord)
        if found is None and searched is None:
            there = "no such folder" if not folder.exists("") else "it holds neither file, or no readable one"
            raise InputError("RUN_DIR", folder.address, allowed, f"{there}; {fix}")
        found, searched = _ended(folder, found), _ended(folder, searched)
        if found is None:
            return None, searched
        lines = records.content(folder, METRICS) or b""
        bars = trace.bars(records.read(folder, TRACE, records.TraceRecord, quiet=True))
    except (OSError, ValueError) as error:
        raise InputError("RUN_DIR", folder.address, allowed, f"{error}; {fix}") from None
    return Run(found, _stages(found, _lines(lines)), [bar for bar in bars if _drawable(bar)]), searched


def _ended(folder: Folder, record: Kind | None) -> Kind | None:
    """The record; one that says `running` although its driver was killed says `interrupted` instead."""
    if record is None or record.status != "running" or not is_abandoned(folder, LEASE):
        return record
    return record.model_copy(update={"status": "interrupted"})


def number(value: Any) -> float | None:
    """`value` as a number that can be drawn, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if -MOST < value < MOST else None


def amount(value: Any) -> float | None:
    """`value` as a number that is not negative, or None."""
    found = number(value)
    return found if found is not None and found >= 0 else None


def count(value: Any) -> int:
    """`value` as a number of things; 0 where it is none."""
    return int(amount(value) or 0)


def mapping(value: Any) -> Json:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def mappings(value: Any) -> list[Json]:
    """The JSON objects of a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def numbers(metrics: Mapping[str, float | None] | None) -> dict[str, float]:
    """The metrics that are known."""
    return {name: float(value) for name, value in (metrics or {}).items() if value is not None}


def _lines(content: bytes) -> dict[int, list[Json]]:
    """Lines of metrics.jsonl by stage, in the order of the steps; one that is cut off is left out."""
    found: dict[int, list[Json]] = {}
    for raw in content.splitlines():
        line = mapping(records.document(raw))
        stage = amount(line.get("stage"))
        if stage is not None and amount(line.get("samples")) is not None:
            found.setdefault(int(stage), []).append(line)
    return {stage: sorted(lines, key=lambda line: number(line["samples"]) or 0) for stage, lines in found.items()}


def _drawable(bar: trace.Bar) -> bool:
    times = [number(bar[key]) for key in ("ts", "dur")]
    return all(t is not None and 0 <= t < 1e17 for t in times)


def _stages(run: RunRecord, lines: dict[int, list[Json]]) -> list[Stage]:
    config = run.config.content() if run.config else {}
    planned = mappings(config.get("chain"))
    known_stages = {record.index or 0: record for record in run.stages or ()}
    last = max([len(planned) - 1, *known_stages, *lines], default=-1)
    names, sizes = [], []
    for index in range(min(last + 1, MOST_STAGES)):
        entry, record = (planned[index] if index < len(planned) else {}), known_stages.get(index, NONE)
        names.append(str(record.model or entry.get("model") or "?"))
        sizes.append(_size(config, names[-1], _setting(config, entry, "image_size")))
    stages: list[Stage] = []
    known: float | None = 0.0
    for index, (name, size) in enumerate(zip(names, sizes, strict=True)):
        entry, record = (planned[index] if index < len(planned) else {}), known_stages.get(index, NONE)
        mine, status = lines.get(index, []), record.status or ""
        per_sample, macs = None, amount(record.macs)
        seen = record.samples_seen or (number(mine[-1]["samples"]) if mine and status else None)
        if macs is not None and seen:
            per_sample = macs / seen
        elif size is not None:
            started = mapping(entry.get("start")).get("model")
            before = _size(config, started, _setting(config, entry, "image_size")) if started else None
            before = before or (sizes[index - 1] if index else None)
            teacher = before if mapping(config.get("transfer")).get("distill") else None
            per_sample = _per_sample(size, teacher, _captions(config, entry))
        if entry.get("checkpoint"):
            macs = 0.0
        if macs is None and per_sample is not None:
            samples = _planned_samples(run, config, entry, mine)
            macs = samples * per_sample if samples else None
        stages.append(
            Stage(
                index, name, status or ("unfinished" if mine else "not started"),
                float(record.params or 0) or (float(size.params) if size else None),
                float(size.principal_params) if size and size.principal in PRINCIPAL else None,
                _length(record, entry), macs, per_sample, known, numbers(record.metrics), record, mine,
                size.principal if size else "image",
            )
        )  # fmt: skip
        known = known + macs if known is not None and macs is not None else None
    return stages


def _size(config: Mapping[str, Any], model: str, size: Any) -> Any:
    """What the model's shapes tell, or None; `model` is only ever looked up among the names raychain knows."""
    try:
        from raychain.paradigms import make_task, model_size

        task = make_task(config.get("task") or {"paradigm": "clip"})
        return model_size(task, model, size if isinstance(size, int) and 0 < size < 4096 else None)
    except Exception:  # a model or a paradigm of another version, or none at all
        return None


def _per_sample(size: Any, teacher: Any, captions: int) -> float | None:
    from raychain.planning.macs import stage_macs

    items = {"image": 1, "text": captions, "model": 1, "decoder": 1, "tokens": 1}
    return float(stage_macs(size, teacher, 1, items)) if size.parts.keys() <= items.keys() else None


def _setting(config: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> Any:
    """A setting of the stage's own data, or of the experiment's."""
    own = mapping(entry.get("data")).get(key)
    return mapping(config.get("data")).get(key) if own is None else own


def _captions(config: Mapping[str, Any], entry: Mapping[str, Any]) -> int:
    return max(count(mapping(_setting(config, entry, "captions")).get("per_image")), 1)


def _planned_samples(
    run: RunRecord, config: Mapping[str, Any], entry: Mapping[str, Any], lines: list[Json]
) -> float | None:
    """Samples that an unfinished stage will have seen."""
    batch = count(mapping(config.get("train")).get("global_batch"))
    last = lines[-1] if lines else {}
    epoch, samples = number(last.get("epoch")), number(last.get("samples"))
    whole = samples / epoch if epoch and samples else run.data_health.samples if run.data_health else None
    try:
        length = parse_duration(entry.get("epochs"), default_unit="epochs")
        return float(length.steps(epoch_samples=round(whole or 0), global_batch=batch) * batch) or None
    except (ValueError, OverflowError, ZeroDivisionError):
        return None


def _length(record: StageEntry, entry: Mapping[str, Any]) -> str:
    try:
        return _singular(str(parse_duration(entry.get("epochs"), default_unit="epochs")))
    except (ValueError, OverflowError):
        if entry.get("checkpoint") or record.status == "given":
            return "given"
        return "" if record.epochs is None else several(record.epochs, "epoch", "g")


def _singular(length: str) -> str:
    return length[:-1] if length.startswith("1 ") else length
