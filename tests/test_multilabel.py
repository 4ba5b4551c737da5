"""Zero-shot classification of pictures that show any number of classes: mean average precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import webdataset
from clip_benchmark.metrics.zeroshot_classification import average_precision_per_class
from hypothesis import given
from hypothesis import strategies as st
from test_evaluation import CLASSES, MODEL, TEMPLATES, expected_images, measure, picture
from torch import multiprocessing

import raychain
from raychain.errors import InputError
from raychain.evaluators.data import MultilabelData, resolve_multilabel, resolve_zero_shot
from raychain.evaluators.zero_shot import average_precision
from raychain.models import build, model_config
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.reporting.measured import measured_table
from raychain.training.artifact import write_artifact

COUNTS = (10, 1, 12)


def shown(number: int) -> np.ndarray:
    """Two or three classes, and never the last one."""
    found = np.zeros(len(CLASSES), np.float32)
    found[[number % 6, number * 5 % 6, number % 4]] = 1
    return found


def write(folder: Path, arrays: dict[int, Any] | None = None) -> Path:
    """A folder as clip_benchmark_export_wds --multilabel writes it, with some other `arrays`."""
    (folder / "test").mkdir(parents=True)
    (folder / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    (folder / "dataset_type.txt").write_text("multilabel\n")
    number = 0
    for shard, count in enumerate(COUNTS):
        with webdataset.TarWriter(str(folder / "test" / f"{shard}.tar"), encoder=False) as tar:
            for _ in range(count):
                given = (arrays or {}).get(number, shown(number))
                encoder = webdataset.writer.default_handlers
                content = given if isinstance(given, bytes) else encoder["npy"](given)
                tar.write({"__key__": f"s{number:04d}", "png": encoder["png"](picture(number)), "npy": content})
                number += 1
    return folder


def expected(model: torch.nn.Module, numbers: list[int]) -> float:
    import open_clip

    templates = [t.replace("{c}", "{}") for t in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(MODEL), CLASSES, templates)
    target = torch.from_numpy(np.stack([shown(number) for number in numbers]))
    return 100 * average_precision_per_class(expected_images(model, numbers) @ weights, target).mean().item()


@given(st.integers(1, 30), st.integers(1, 6), st.integers(0, 9))
def test_average_precision_is_that_of_clip_benchmark(pictures: int, classes: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.permutation(pictures * classes).reshape(pictures, classes)).float()
    target = torch.from_numpy(rng.integers(0, 2, (pictures, classes), dtype=np.uint8))
    found = average_precision(scores, target)
    assert found.tolist() == pytest.approx(average_precision_per_class(scores, target).tolist(), rel=1e-5)


def test_folders_of_clip_benchmark_are_measured_and_broken_arrays_left_out(tmp_path: Path) -> None:
    broken = {3: b"no array", 22: shown(22) * 2, 7: np.array(["a"], dtype=object).tobytes()}
    model = build(MODEL, seed=0).eval()
    data = resolve_multilabel(str(write(tmp_path / "voc", broken)), tmp_path / "cache", "evaluate.voc")
    measured = measure(tmp_path, model, data)
    assert measured == pytest.approx({"map": expected(model, [n for n in range(23) if n not in broken])}, abs=1e-3)
    assert 20 < measured["map"] < 100


@pytest.mark.slow
def test_three_ranks_measure_what_one_does(tmp_path: Path) -> None:
    data = resolve_multilabel(str(write(tmp_path / "voc")), tmp_path / "cache", "evaluate.voc")
    alone = measure(tmp_path, build(MODEL, seed=0), data)
    multiprocessing.spawn(_rank, (3, tmp_path, data), nprocs=3)
    assert [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)] == [pytest.approx(alone)] * 3


def _rank(rank: int, world: int, folder: Path, data: MultilabelData) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(measure(folder, build(MODEL, seed=0), data), folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_wrong_folders_are_input_errors(tmp_path: Path) -> None:
    whole, cache = write(tmp_path / "voc"), tmp_path / "cache"
    with pytest.raises(InputError, match=r"(?s)says multilabel.*zero_shot_multilabel"):
        resolve_zero_shot(str(whole), cache)
    (whole / "classnames.txt").write_text("a\nb\n")
    with pytest.raises(InputError, match=r"(?s)an .npy member for 7 classes in .*0.tar.*2, the lines of"):
        resolve_multilabel(str(whole), cache, "evaluate.voc")
    none = write(tmp_path / "none", dict.fromkeys(range(23), b"no array"))
    with pytest.raises(InputError, match=r"(?s)without a usable label.*a row of zeros and ones"):
        resolve_multilabel(str(none), cache, "evaluate.voc")


def test_raychain_evaluate_tells_such_a_folder_by_its_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage, voc = tmp_path / "stage", str(write(tmp_path / "voc"))
    stage.mkdir()
    write_artifact(stage, make_paradigm(Task()), build(MODEL, seed=0), model_config(MODEL), 40)
    named = {"voc": {"type": "zero_shot_multilabel", "data": voc}}
    found = raychain.evaluate(str(stage), voc, evaluators=named, cache=str(tmp_path / "cache"))
    [row] = found["results"]
    assert (row["task"], row["pictures"], row["classes"]) == ("zero_shot_multilabel", 23, 7)
    assert row["metrics"]["map"] == found["metrics"]["voc/map"]
    measured_table(found)
    assert f"mAP {row['metrics']['map']:.2f}" in capsys.readouterr().out
