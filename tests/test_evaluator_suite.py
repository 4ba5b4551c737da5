"""Many evaluators in one run, with clip_benchmark's own numbers on the same files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

import raychain
from raychain.config.loading import validate

OLDER_NUMPY = "numpy==2.3.5"
"""clip_benchmark 1.6.2's zero-shot accuracy makes a float of a one-element array, which numpy 2.4 made an error."""

BENCHMARK = """
import json, sys, torch
from clip_benchmark.datasets.builder import build_dataset, get_dataset_collate_fn
from clip_benchmark.metrics import linear_probe, zeroshot_classification, zeroshot_retrieval
from clip_benchmark.models import load_clip

class Cpu(str):  # its linear probe asks for cuda by this name, and moves everything there
    __hash__ = str.__hash__
    def __eq__(self, other):
        return other in ("cpu", "cuda")

torch.nn.Module.cuda = torch.Tensor.cuda = lambda self: self
checkpoint, root, scratch = sys.argv[1:]
model, transform, tokenizer = load_clip("open_clip", f"local-dir:{checkpoint}", "", None, device="cpu")
model.eval()

def loader(name, split="test"):
    data = build_dataset(f"wds/{name}", root=f"{root}/{name}", transform=transform, split=split, task="linear_probe")
    return torch.utils.data.DataLoader(data.batched(64), batch_size=None, shuffle=False), data

found = {}
for name in ("food", "cars", "pets", "voc"):
    batches, data = loader(name)
    batches.dataset.classes = data.classes
    templates = data.templates
    found[name] = zeroshot_classification.evaluate(model, batches, tokenizer, data.classes, templates, "cpu", amp=False)
for name in ("coco", "flickr"):
    data = build_dataset(f"wds/{name}", root=f"{root}/{name}", transform=transform, task="zeroshot_retrieval")
    batches = torch.utils.data.DataLoader(data.batched(64), batch_size=None, shuffle=False)
    found[name] = zeroshot_retrieval.evaluate(model, batches, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
train, test = loader("probe", "train")[0], loader("probe")[0]
for _ in range(2):  # the second time it has the features, and orders them by the seed alone
    torch.manual_seed(0)
    found["probe"] = linear_probe.evaluate(
        model, train, test, -1, 64, 0, 0.1, 10, "probe", 0, scratch, Cpu("cpu"), amp=False)
print(json.dumps({name: {k: v for k, v in metrics.items() if isinstance(v, float)} for name, metrics in found.items()}))
"""


def samples(folder: Path) -> list[dict[str, Any]]:
    return [s for shard in sorted(folder.glob("*.tar")) for s in webdataset.WebDataset(str(shard), shardshuffle=False)]


def write(folder: Path, found: list[dict[str, Any]]) -> None:
    """Two shards, as clip_benchmark lays them out; every sample gets a key of its own."""
    found = [sample | {"__key__": f"{number:06d}"} for number, sample in enumerate(found)]
    folder.mkdir(parents=True)
    half = len(found) // 2
    for number, part in enumerate((found[:half], found[half:])):
        with webdataset.TarWriter(str(folder / f"{number}.tar")) as tar:
            for sample in part:
                tar.write({key: value for key, value in sample.items() if not key.startswith("__") or key == "__key__"})
    (folder / "nshards.txt").write_text("2\n")


@pytest.fixture(scope="module")
def sets(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four zero-shot sets, one with several labels a picture, two retrieval sets and one for a linear probe, out of the
    demo's held-out pictures.
    """
    root, source = tmp_path_factory.mktemp("sets"), demo / "zero_shot" / "test"
    labelled, captioned = samples(source / "test"), samples(demo / "test")
    classes, templates = "classnames.txt", "zeroshot_classification_templates.txt"
    for number, name in enumerate(("food", "cars", "pets")):
        write(root / name / "test", labelled[number::3])
        (root / name / classes).write_text((source / classes).read_text())
        lines = (source / templates).read_text().splitlines(keepends=True)
        (root / name / templates).write_text("".join(lines[: 1 + number]))
    for number, name in enumerate(("coco", "flickr")):
        texts = [{"txt": (s["txt"].decode() + "\n" + "\n".join(json.loads(s["json"])["captions"][:number])).strip()}
                 for s in captioned[number::2]]  # fmt: skip
        write(root / name / "test", [{"__key__": s["__key__"], "jpg": s["jpg"]} | t
                                     for s, t in zip(captioned[number::2], texts, strict=True)])  # fmt: skip
        (root / name / "dataset_type.txt").write_text("retrieval\n")
    shown = np.eye(len((source / classes).read_text().splitlines()), dtype=np.float32)
    shown = np.maximum(shown, shown[np.arange(len(shown)) // 2])  # some pictures show two classes, and some class none
    write(root / "voc" / "test", [{"__key__": s["__key__"], "jpg": s["jpg"], "npy": shown[int(s["cls"]) // 2 * 2 + 1]}
                                  for s in labelled[::2]])  # fmt: skip
    (root / "voc" / classes).write_text((source / classes).read_text())
    (root / "voc" / templates).write_text((source / templates).read_text())
    (root / "voc" / "dataset_type.txt").write_text("multilabel\n")
    validation = samples(demo / "zero_shot" / "validation" / "test")
    write(root / "probe" / "train", validation + labelled[::2])
    write(root / "probe" / "test", labelled[1::2])
    (root / "probe" / classes).write_text((source / classes).read_text())
    (root / "probe" / templates).write_text("{c}\n")
    return root


def evaluators(sets: Path) -> dict[str, Any]:
    found: dict[str, Any] = {name: {"type": "zero_shot", "data": str(sets / name)} for name in ("food", "cars", "pets")}
    found |= {name: {"type": "retrieval", "data": str(sets / name), "captions": "txt|lines"}
              for name in ("coco", "flickr")}  # fmt: skip
    found["voc"] = {"type": "zero_shot_multilabel", "data": str(sets / "voc")}
    found["probe"] = {"type": "linear_probe", "data": str(sets / "probe"), "protocol": "clip_benchmark"}
    found["ridge"] = {"type": "linear_probe", "data": str(sets / "probe")}
    return found


@pytest.mark.long
def test_seven_evaluators_in_one_run_have_the_numbers_of_clip_benchmark(
    ray_session: None, sets: Path, tree: dict[str, Any], tmp_path: Path
) -> None:
    tree["evaluate"] = evaluators(sets) | {"score": "probe/top1"}
    run = raychain.run(validate(tree), out=str(tmp_path / "run"))
    assert run["score"] == "probe/top1"

    other = tmp_path / "numpy"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(other), OLDER_NUMPY]
    subprocess.run(pip, check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": f"{other}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    checkpoint = tmp_path / "run" / run["stages"][1]["checkpoint"]
    command = [sys.executable, "-c", BENCHMARK, str(checkpoint), str(sets), str(tmp_path / "features")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = json.loads(done.stdout.splitlines()[-1])

    ours, compared = run["stages"][1]["metrics"], {}
    for name in ("food", "cars", "pets"):
        compared |= {f"{name}/top{k}": 100 * theirs[name][f"acc{k}"] for k in (1, 5)}
    compared["voc/map"] = 100 * theirs["voc"]["mean_average_precision"]
    for name in ("coco", "flickr"):
        for direction, word in (("i2t", "text"), ("t2i", "image")):
            for k in (1, 5, 10):
                compared[f"{name}/{direction}_r{k}"] = 100 * theirs[name][f"{word}_retrieval_recall@{k}"]
    compared |= {"probe/top1": 100 * theirs["probe"]["lp_acc1"], "probe/top5": 100 * theirs["probe"]["lp_acc5"],
                 "probe/mean_class": 100 * theirs["probe"]["lp_mean_per_class_recall"]}  # fmt: skip
    print(json.dumps({name: [round(ours[name], 2), round(value, 2)] for name, value in compared.items()}, indent=1))
    print(f"ridge: {ours['ridge/top1']:.2f}")
    assert {name: ours[name] for name in compared} == pytest.approx(compared, abs=0.1)
    assert abs(ours["ridge/top1"] - ours["probe/top1"]) < 25
    assert 0 < ours["probe/top1"] < 100
