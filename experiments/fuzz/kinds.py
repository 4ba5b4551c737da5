"""Hostile inputs of each kind, and the commands that take them.

A case is a list of steps: files that are written into a new folder, relative to which everything is named, and a
command's arguments, or a function, which gets the folder.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import test_checkpoint_files
import test_records
import test_report
import yaml
from hostile import TEXTS, VALUES, as_json, bent, experiment, odd, picture, plain, table, tar, weights
from hypothesis import strategies as st
from safetensors.torch import save
from test_broken_shards import pair, shard_of
from test_takeover import STAGES, leave, task_of

import raychain
from raychain.backend_ray import connection
from raychain.config.loading import load_experiment, validate
from raychain.data.addresses import expand
from raychain.data.cache import ShardCache
from raychain.data.members import Wanted
from raychain.data.pictures import PictureReader
from raychain.data.shards import survey
from raychain.data.spec import Spec
from raychain.models import build, model_config
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.runs import driver
from raychain.searching.request import plan_search
from raychain.training.artifact import write_artifact

Case = list[tuple[Mapping[str, bytes], Sequence[str] | Callable[[Path], None]]]
BASE = Path()
"""What every worker makes once: good shards, a checkpoint, an experiment."""
TREE: dict[str, Any] = {}
FULL: dict[str, Any] = {}
"""The experiment with every key."""
LEFT: dict[str, bytes] = {}
"""What a finished run leaves in its folder and store, relative to the storage."""


def prepare(base: Path) -> None:
    """Makes BASE, and has connections fail as on a machine without a network."""

    def refuse(*_: object) -> NoReturn:
        raise OSError("no network")

    socket.socket.connect, socket.getaddrinfo = refuse, refuse  # type: ignore[method-assign, assignment]
    global BASE
    BASE = base
    (base / "train").mkdir(parents=True)
    shard_of(base / "train" / "0.tar", *(pair(f"{n}", txt=b"a word") for n in range(4, 12)))
    (base / "model").mkdir()
    model = build("CoM-micro-S", seed=0)
    write_artifact(base / "model", make_paradigm(Task()), model, model_config("CoM-micro-S"), 40)
    chain = [{"model": f"CoM-micro-{size}", "epochs": f"{steps} steps"} for size, steps in (("S", 24), ("M", 16))]
    TREE.update(
        name="tiny", data={"train": str(base / "train"), "captions": {"keys": ["txt"]}}, chain=chain,
        train={"global_batch": 4, "warmup": "25 %", "precision": "fp32"}, compute={"workers": 1, "cpus_per_worker": 1},
        preload={"cache": str(base / "cache")}, evaluate={"retrieval": str(base / "train")}, storage="runs",
    )  # fmt: skip
    FULL.update(validate(TREE).model_dump(mode="json"))
    (base / "exp.yaml").write_text(yaml.safe_dump(TREE))
    storage = base / "runs"
    leave(storage / "tiny", task_of(TREE | {"storage": str(storage)}, storage / "tiny"))
    LEFT.update({str(p.relative_to(storage)): p.read_bytes() for p in storage.rglob("*") if p.is_file()})


# Tars

KEYS = st.sampled_from(
    ["txt", "json.captions", "json.a.b", "txt|sentences", "txt|lines", "json.captions|sentences", "json.a"]
)


@st.composite
def tar_case(draw: st.DrawFn) -> Case:
    keys, split = draw(st.lists(KEYS, min_size=1, max_size=2)), draw(st.sampled_from(["first", "last"]))
    captions = [word for key in keys for word in ("--captions", key)]
    commands: list[Any] = [
        ["data", "check", "0.tar", "--workers", "1", "--json", "--key-split", split, *captions],
        ["evaluate", str(BASE / "model"), "--data", "0.tar", "--cache", "cache", "--key-split", split, *captions],
        ["evaluate", str(BASE / "model"), "--data", ".", "--cache", "cache"],
        ["grow", str(BASE / "model"), "--to", "CoM-micro-M", "--out", "grown", "--data", "0.tar"],
        ["run", str(BASE / "exp.yaml"), "--set", "data.train=0.tar", "--set", "preload.cache=cache", "--dry-run"],
        read_raw,
        read_cropped,
    ]
    weights = [0, 0, 0, 1, 2, 3, 4, 5, 5, 6, 6]
    beside = {"classnames.txt": b"a\nb\n", "zeroshot_classification_templates.txt": b"a {c}\n"}
    files = {"0.tar": draw(tar())}
    command = commands[draw(st.sampled_from(weights))]
    if command is commands[2]:
        files = {name: draw(bent(st.just(content))) for name, content in beside.items()} | {
            "test/0.tar": files["0.tar"]
        }
    return [(files, command)]


def read_raw(folder: Path) -> None:
    """As a loader reads a shard."""
    _read(folder, Spec(Wanted(("txt", "json.captions")), 32, "ones"))


def read_cropped(folder: Path) -> None:
    """As a loader reads a shard, with random crops and pictures kept as JPEG."""
    _read(folder, Spec(Wanted(("txt",)), 32, "ones", cropped=True, pixels="jpeg"))


def _read(folder: Path, spec: Spec) -> None:
    (folder / "cache" / "counts").mkdir(parents=True)
    reader = PictureReader(spec, lambda texts: np.ones((len(texts), 1)))
    for shard in survey(expand([str(folder / "0.tar")], "data.train"), spec.wanted, folder / "cache", "data.train"):
        try:
            table = ShardCache(folder / "cache", 2**26).table(shard, reader)
        except OSError:  # a run says so and stops
            continue
        for row in range(table.size):
            table.image(row)


# Tables

STATS = {"shard": 0, "rows": 2, "samples": 1, "bytes": 1, "failed": [{"row": 1, "image": "x", "reason": "y"}]}


@st.composite
def table_case(draw: st.DrawFn) -> Case:
    name, content = draw(table())
    command = ["data", "build", name, "--out", "out", "--workers", "2", "--retries", "0", "--timeout", "1"]
    command += draw(
        st.sampled_from([[], ["--json"], ["--image-size", "16"], ["--samples-per-shard", "1"], ["--retry-failed"]])
    )
    command += draw(st.sampled_from([[], [], ["--image-column", "path"], ["--caption-column", "text"]]))
    files = {name: content, "0.png": draw(picture()), "1.png": draw(picture()), "2.png": plain(2)}
    if draw(st.integers(0, 3)):
        return [(files, command)]
    record = draw(st.sampled_from(["out/00000_stats.json", "out/build.json", "out/00001_stats.json"]))
    return [(files, command), ({record: draw(odd(STATS))}, command)]


# Experiments


@st.composite
def yaml_case(draw: st.DrawFn) -> Case:
    commands: list[Any] = [
        ["run", "x.yaml", "--dry-run"],
        ["run", "x.yaml", "--dry-run", "--json"],
        ["plan", "x.yaml"],
        search_plan,
    ]
    command = draw(st.sampled_from([*commands, commands[0]]))
    if not callable(command) and draw(st.integers(0, 3)) == 0:
        places = [".".join(map(str, place)) for place in test_records.paths(FULL) if place]
        key = draw(st.sampled_from(places) | TEXTS)
        value = draw(st.sampled_from(VALUES).map(str) | TEXTS)
        command = [*command, "--set", f"{key}={value}"]
    return [({"x.yaml": draw(experiment(TREE, FULL))}, command)]


def search_plan(folder: Path) -> None:
    """What `raychain search` does before it starts anything."""
    plan_search(load_experiment("x.yaml"), str(folder / "found"), str(folder))


# Checkpoints


@st.composite
def checkpoint_case(draw: st.DrawFn) -> Case:
    good = test_checkpoint_files.mutated()
    config = draw(good.map(as_json) | good.flatmap(odd) | bent(good.map(as_json), 1))
    if draw(st.booleans()):
        name, content = "open_clip_model.safetensors", save(test_checkpoint_files.tensors())
    else:
        name, content = draw(weights())
    files = {"model/open_clip_config.json": config, f"model/{name}": content}
    shards = ["--data", str(BASE / "train"), "--cache", str(BASE / "cache")]
    commands = [
        ["evaluate", "model", *shards],
        ["evaluate", f"model/{name}", "--model", "own", "--models", "model", *shards],
        ["grow", "model", "--to", "CoM-micro-M", "--out", "grown"],
        ["grow", "model", "--to", "own", "--models", "own", "--out", "grown", "--data", str(BASE / "train")],
        ["run", str(BASE / "exp.yaml"), "--models", "own", "--set", "chain.1.model=own", "--dry-run"],
    ]
    model = draw(good.map(lambda document: as_json(document.get("model_cfg"))) | good.flatmap(odd))
    return [(files | {"own/own.json": model}, draw(st.sampled_from(commands)))]


# Run folders

SEARCH = {
    "schema": 2, "name": "s", "status": "succeeded", "identity": "x", "trained": [], "begun": {}, "space_size": 3,
    "metric": {"name": "zero_shot_top1", "direction": "max"}, "config": {}, "best": None, "pareto": [],
    "trials": [{"number": 0, "kind": "sampled", "params": {"chain": "S 10 steps"}, "status": "succeeded", "macs": 1e9,
                "metrics": {"zero_shot_top1": 3.0}, "stages": [{"model": "CoM-micro-S", "epochs": "10 steps"}]}],
    "asha": {"passed": [{"rung": 0, "values": {"0": 1.0}}], "behind": {}},
}  # fmt: skip
CLAIM = {"host": "here", "pid": 4, "process": "here/boot/pid:[1]/12", "counter": 3, "held": True}


@st.composite
def report_case(draw: st.DrawFn) -> Case:
    """A run folder with a damaged record or two, of which a page is made."""
    good: dict[str, Any] = {"run.json": test_report.run_json(), "trace.json": {"traceEvents": test_report.TRACE},
                            "search.json": SEARCH, "metrics.jsonl": test_report.LINES[0]}  # fmt: skip
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in test_report.LINES)
    files = {name: lines if name == "metrics.jsonl" else json.dumps(value).encode() for name, value in good.items()}
    for name in draw(st.lists(st.sampled_from(sorted(good)), min_size=1, max_size=3)):
        files[name] = draw(odd(good[name])) + (lines if name == "metrics.jsonl" else b"")
    for name in draw(st.lists(st.sampled_from(sorted(good)), max_size=2)):
        files.pop(name, None)
    commands = [["report", "."], ["report", "."], ["plan", str(BASE / "exp.yaml"), "--like", "."]]
    return [(files, draw(st.sampled_from(commands)))]


@st.composite
def run_case(draw: st.DrawFn) -> Case:
    """A finished run with a damaged record or two, which is continued or shown."""
    names = [*(f"tiny/stages/{stage}/stage.json" for stage in STAGES), "tiny/metrics.jsonl"]
    names += [name for name in LEFT if name.startswith("store/") and name.endswith("stage.json")]
    files = {f"runs/{name}": content for name, content in LEFT.items()}
    for name in draw(st.lists(st.sampled_from(names), min_size=1, max_size=3)):
        files[f"runs/{name}"] = draw(odd(json.loads(LEFT[name].splitlines()[0] if name.endswith("l") else LEFT[name])))
    more = {
        "run.json": test_report.run_json(), "trace.json": {"traceEvents": test_report.TRACE},
        ".lease/a.json": CLAIM, f"checkpoints/{STAGES[1]}/0000000008/state.json": test_records.CHECKPOINT,
    }  # fmt: skip
    for name in draw(st.lists(st.sampled_from(sorted(more)), max_size=2, unique=True)):
        files[f"runs/tiny/{name}"] = draw(odd(more[name]))
    commands: list[Any] = [
        ["run", str(BASE / "exp.yaml"), "--dry-run"],
        continued,
        ["report", "runs/tiny"],
        ["plan", str(BASE / "exp.yaml")],
    ]
    return [(files, draw(st.sampled_from([*commands, continued])))]


def continued(folder: Path) -> None:
    """`raychain run` where nothing is left to train; what would be measured anew is not."""
    connection.ray.init, driver._execute = None, lambda *_: True
    raychain.run(validate(TREE | {"storage": str(folder / "runs")}))


KINDS: dict[str, st.SearchStrategy[Case]] = {
    "tar": tar_case(),
    "table": table_case(),
    "yaml": yaml_case(),
    "checkpoint": checkpoint_case(),
    "run folder": report_case() | run_case(),
}
