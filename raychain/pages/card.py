"""A model card for each stage folder, as the Hugging Face Hub shows README.md. Reads records alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import yaml

from raychain import records
from raychain.core.json import Json
from raychain.core.storage import Folder
from raychain.core.wording import macs, number
from raychain.errors import one_line
from raychain.evaluators.metrics import Definition, read_back
from raychain.events import Listener, Measured, StageEnded
from raychain.pages.loading import mapping, mappings
from raychain.pages.loading import number as as_number
from raychain.paradigms import PARADIGMS
from raychain.records import RunRecord, StageEntry

CARD = "README.md"
MARK = "<!-- Written by raychain, which writes it anew until this line is removed. -->"
UNKNOWN = "unknown"
KNOWN = frozenset((
    "apache-2.0", "mit", "openrail", "bigscience-openrail-m", "creativeml-openrail-m", "bsd", "bsd-2-clause",
    "bsd-3-clause", "bsd-3-clause-clear", "cc", "cc0-1.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
    "cc-by-sa-3.0", "cc-by-sa-4.0", "cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-3.0",
    "cc-by-nc-nd-4.0", "cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0", "gpl", "gpl-2.0", "gpl-3.0", "agpl-3.0",
    "lgpl", "lgpl-2.1", "lgpl-3.0", "mpl-2.0", "epl-2.0", "isc", "unlicense", "wtfpl", "zlib", "afl-3.0",
    "artistic-2.0", "bsl-1.0", "ecl-2.0", "eupl-1.1", "eupl-1.2", "ms-pl", "ncsa", "ofl-1.1", "osl-3.0", "postgresql",
    "odbl", "odc-by", "pddl", UNKNOWN,
))  # fmt: skip
"""Licences that the Hub has a word for; others are `other` with a name."""
log = logging.getLogger("raychain.pages")
USE, TRAINED = "## Use", "## How it was trained"
PIPELINES = {"timm": "image-feature-extraction"}
"""What an export is for, where that is another thing than what the stage is for."""
USES = {
    "open_clip": (
        "import open_clip\n"
        'model, _, preprocess = open_clip.create_model_and_transforms("local-dir:FOLDER")\n'
        'tokenizer = open_clip.get_tokenizer("local-dir:FOLDER")'
    ),
    "timm": 'import timm\nmodel = timm.create_model("local-dir:FOLDER", pretrained=True)',
    "transformers": 'from transformers import AutoModel\nmodel = AutoModel.from_pretrained("FOLDER")',
    "onnx": (
        "import onnxruntime\n"
        'image = onnxruntime.InferenceSession("FOLDER/image.onnx")  # pixel_values, normalised as config.json says\n'
        'text = onnxruntime.InferenceSession("FOLDER/text.onnx")  # input_ids'
    ),
}
"""How each library loads the folder, which FOLDER stands for."""
TEXT = (
    "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
    'model = AutoModelForCausalLM.from_pretrained("FOLDER")\n'
    'tokenizer = AutoTokenizer.from_pretrained("FOLDER")  # where the folder has one: bytes need none'
)
"""How a language model is loaded."""


class Cards(Listener):
    """Writes the card of a stage when it is finished, and when it is measured; on object storage, which may keep one
    waiting, the end of the run does (`leave_cards`). Training never fails for a card.
    """

    def __init__(self, out: Folder, run: Callable[[], RunRecord]) -> None:
        self._out, self._run = out, run

    def stage_ended(self, event: StageEnded) -> None:
        """A card without what is measured later."""
        self._leave(event.record)

    def measured(self, event: Measured) -> None:
        """The card with metrics."""
        self._leave(event.record)

    def _leave(self, stage: StageEntry) -> None:
        if self._out.local:
            leave_card(self._out, self._run(), stage)


def leave_cards(out: Folder) -> None:
    """A card in every finished stage's folder of the run in a folder."""
    try:
        run = records.read(out, "run.json", RunRecord, quiet=True)
    except OSError:
        return
    for stage in (run.stages if run else None) or ():
        leave_card(out, run or RunRecord(), stage)


def leave_card(out: Folder, run: RunRecord, stage: StageEntry) -> None:
    """Writes the stage's card unless somebody has written one; failures are logged."""
    if not stage.checkpoint:
        return
    name = f"{stage.checkpoint}/{CARD}"
    try:
        before = out.read(name)
        if before is not None and MARK.encode() not in before:
            return
        text = card(run, stage).encode()
        if text != before:
            out.write(name, text)
    except Exception as error:
        log.warning("%s in %s was not written: %s", name, out.address, error)


def card(run: RunRecord, stage: StageEntry) -> str:
    """The card of a stage of a run."""
    config = run.config.content() if run.config else {}
    name = one_line(f"{run.name or 'run'}: {stage.model or 'model'}")
    parts = [
        f"---\n{_front(run, stage, config)}---",
        MARK,
        f"# {name}",
        " ".join(_summary(run, stage, config)),
        USE,
        *_use(config),
        TRAINED,
        "\n".join(_chain(run, stage)),
        "\n".join(_recipe(run, stage, config)),
        "## Data",
        "\n".join(_data(run, config)),
        "## Measured",
        "\n".join(_measured(run, stage)),
        "## Limits",
        "What the model does outside of what was measured above is not known. It has learned what is in its data, "
        "with all that is wrong with it.",
    ]
    return "\n\n".join(parts) + "\n"


def of_library(text: str, library: str) -> str:
    """A card for a folder that the stage was exported to, which `library` loads; `onnx` is that of its runtimes."""
    _, mark, rest = text.partition("---\n")
    front, end, rest = rest.partition("---\n")
    try:
        found = yaml.safe_load(front) if mark and end else None
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        return text
    found["library_name"] = library
    if library in PIPELINES:
        found["pipeline_tag"] = PIPELINES[library]
    before, use, after = rest.partition(USE)
    _, trained, after = after.partition(TRAINED)
    if use and trained:
        rest = f"{before}{USE}\n\n{_how(library, USES[library])}\n\n{TRAINED}{after}"
    return f"---\n{yaml.safe_dump(found, sort_keys=False, allow_unicode=True)}---\n{rest.replace(MARK, '').lstrip()}"


def _how(library: str, code: str) -> str:
    """How a library loads the folder."""
    return f"FOLDER is this folder on your disk; unmodified {library} loads it:\n\n```python\n{code}\n```"


def _front(run: RunRecord, stage: StageEntry, config: Json) -> str:
    """The Hub's metadata."""
    given = str(config.get("license") or UNKNOWN)
    paradigm = str(mapping(config.get("task")).get("paradigm") or "clip")
    found: Json = {"license": given} if given in KNOWN else {"license": "other", "license_name": given}
    library, pipeline = _library(paradigm)
    if library:
        found["library_name"] = library
    if pipeline:
        found["pipeline_tag"] = pipeline
    found["tags"] = [paradigm, "raychain", "chain-of-models"]
    metrics = _values(run, stage)
    if metrics:
        found["model-index"] = [{
            "name": str(run.name or stage.model),
            "results": [
                {
                    "task": {"type": pipeline or "other"},
                    "dataset": {"name": definition.name.partition("/")[0], "type": definition.name.partition("/")[0]},
                    "metrics": [{"name": definition.label, "type": definition.name.rpartition("/")[2], "value": value}],
                }
                for definition, value in metrics
            ],
        }]  # fmt: skip
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _library(paradigm: str) -> tuple[str, str]:
    """The library that loads the folder, and what its models are for; empty where nothing says so."""
    try:
        found = PARADIGMS[paradigm]
    except (KeyError, ValueError):  # of a package that is not installed here
        return "", ""
    return found.library, found.pipeline


def _summary(run: RunRecord, stage: StageEntry, config: Json) -> Iterator[str]:
    if stage.params:
        yield f"{stage.model}, {number(stage.params / 1e6)} M parameters."
    place, many = (stage.index or 0) + 1, max(len(mappings(config.get("chain"))), len(run.stages or ()))
    if stage.status == "given":
        yield "A checkpoint that was given, not trained here."
    elif many > 1:
        yield (f"Stage {place} of {many} of a chain of models, each of which starts from the one before "
               "(Chain-of-Models Pre-Training, arXiv 2604.12391).")  # fmt: skip


def _use(config: Json) -> Iterator[str]:
    library, pipeline = _library(str(mapping(config.get("task")).get("paradigm") or "clip"))
    if library in USES:
        yield _how(library, TEXT if pipeline == "text-generation" else USES[library])
    else:
        yield "raychain loads it: `checkpoint: FOLDER` in an experiment, or `raychain evaluate FOLDER`."


def _chain(run: RunRecord, stage: StageEntry) -> Iterator[str]:
    yield "| model | epochs | samples seen | training MACs | |"
    yield "|---|---|---|---|---|"
    for found in (run.stages or ())[: (stage.index or 0) + 1]:
        epochs = f"{found.epochs:g}" if found.epochs else "–"
        here = "this one" if found.key == stage.key else ""
        origin = f"from {one_line(found.origin.model)}" if found.origin else ""
        seen = f"{found.samples_seen:,}" if found.samples_seen else "–"
        cost = macs(found.macs) if found.macs else "–"
        yield f"| {_cell(found.model)} | {epochs} | {seen} | {cost} | {here or origin} |"


def _recipe(run: RunRecord, stage: StageEntry, config: Json) -> Iterator[str]:
    train = mapping(config.get("train"))
    for name in ("global_batch", "schedule", "warmup", "weight_decay", "precision", "average", "seed"):
        if train.get(name) is not None:
            yield f"- {name}: {_cell(train[name])}"
    if stage.lr is not None:
        yield f"- peak learning rate: {stage.lr:g} (AdamW)"
    transfer = stage.transfer or {}
    if transfer:
        said = ", ".join(f"{key} {_cell(transfer[key])}" for key in ("width", "depth", "shrink") if key in transfer)
        alpha = as_number(mapping(transfer.get("distill")).get("alpha"))
        yield f"- grown from the stage before: {said}; features distilled with weight {alpha or 0:g}"
    versions = mapping((run.environment or {}).get("versions"))
    yield f"- with {', '.join(f'{name} {_cell(version)}' for name, version in versions.items() if version)}"
    yield f"- raychain's key of the stage: {_cell(stage.key)}"


def _data(run: RunRecord, config: Json) -> Iterator[str]:
    data = mapping(config.get("data"))
    for source in mappings(data.get("train")):
        weight = as_number(source.get("weight"))
        times = f", drawn {weight:g} times an epoch" if weight not in (None, 1.0) else ""
        yield f"- {', '.join(f'`{_cell(shard)}`' for shard in _texts(source.get('shards')))}{times}"
    health = run.data_health
    if health and health.samples:
        bad = sum((health.bad or {}).values())
        yield f"- {health.samples:,} usable samples in {health.shards or 0:,} shards, {bad:,} unusable ones left out"
    captions = mapping(data.get("captions"))
    if captions.get("keys"):
        keys = ", ".join(_cell(key) for key in _texts(captions["keys"]))
        yield f"- captions: {keys}, {_cell(captions.get('per_image', 1))} of a picture in each step's loss"


def _measured(run: RunRecord, stage: StageEntry) -> Iterator[str]:
    found = _values(run, stage)
    if not found:
        yield "Nothing was measured."
        return
    yield "| metric | value |"
    yield "|---|---|"
    yield from (f"| {_cell(definition.label)} | {definition.written(value)} |" for definition, value in found)


def _values(run: RunRecord, stage: StageEntry) -> list[tuple[Definition, float]]:
    """What was measured of the stage, the score first."""
    defined = sorted(read_back({"metrics": run.metrics}), key=lambda d: d.name != run.score)
    return [(d, value) for d in defined if (value := d.value(stage.metrics or {})) is not None]


def _texts(value: object) -> Sequence[str]:
    return [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]


def _cell(value: object) -> str:
    """A value within a line of Markdown: without secrets, and without what would end its cell or begin HTML."""
    return one_line(str(value)).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
