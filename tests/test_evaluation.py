"""Zero-shot classification and retrieval: open_clip's own numbers, at any number of ranks."""

import os
import pickle
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import multiprocessing

from raychain.data.cache import ShardCache
from raychain.errors import InputError
from raychain.evaluators.builtin import LinearProbe
from raychain.evaluators.context import Context
from raychain.evaluators.data import (
    LinearProbeData,
    RetrievalData,
    ZeroShotData,
    resolve_linear_probe,
    resolve_retrieval,
    resolve_zero_shot,
)
from raychain.evaluators.encoding import image_features
from raychain.evaluators.evaluator import HeldOut, Setting
from raychain.evaluators.linear_probe import PENALTIES, Sums
from raychain.evaluators.measure import measure as measure_one
from raychain.evaluators.ranks import World
from raychain.evaluators.reading import shares
from raychain.evaluators.retrieval import recall
from raychain.evaluators.suite import Evaluation
from raychain.models import build, model_config
from raychain.models.tokenizing import make_tokenizer
from raychain.paradigms import make_paradigm
from raychain.paradigms.task import Task
from raychain.training.measuring import InThread

MODEL = "CoM-micro-S"
CLASSES = ("red", "green thing", "blue", "grey", "dark", "light", "odd one")
TEMPLATES = ("a photo of a {c}.", "{c}", "one {c} on a table")
PICTURES = 23
SHARDS = (10, 1, 12)
"""Samples of each shard: 23 pictures do not divide by 2 or 3, and one shard is smaller than the number of ranks."""
BROKEN = (3, 22)


def picture(number: int) -> Image.Image:
    """A noisy picture, wider or higher than the model's 40 pixels."""
    rng = np.random.default_rng(number)
    noise = rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((47 + number % 3 * 20, 53), Image.Resampling.BICUBIC)


def label(number: int) -> int:
    return number * 5 % len(CLASSES)


def captions(number: int) -> list[str]:
    """One to three captions."""
    return [f"picture {number}", f"{CLASSES[label(number)]} by {number}", f"no {number * 7}"][: 1 + number % 3]


def write_shards(folder: Path, *, labelled: bool, broken: Sequence[int] = ()) -> None:
    folder.mkdir(parents=True)
    number = 0
    for shard, count in enumerate(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard}.tar")) as tar:
            for _ in range(count):
                image = b"no picture" if number in broken else picture(number)
                sample = {"__key__": f"s{number:04d}", "png": image}
                tar.write(sample | ({"cls": label(number)} if labelled else {"json": {"all": captions(number)}}))
                number += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A zero-shot folder in clip_benchmark's layout, and retrieval shards beside it."""
    root = tmp_path_factory.mktemp("evaluation")
    write_shards(root / "zero-shot" / "test", labelled=True)
    write_shards(root / "retrieval", labelled=False)
    write_shards(root / "broken", labelled=False, broken=BROKEN)
    (root / "zero-shot" / "classnames.txt").write_text("\n".join(CLASSES) + "\n")
    (root / "zero-shot" / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return root


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def measure(folder: Path, model: torch.nn.Module, *tasks: HeldOut) -> dict[str, float]:
    """The metrics of all tasks, by all ranks of the process group."""
    context = Context(
        cache=ShardCache(folder / "cache", 1 << 30),
        tokenize=make_tokenizer(model_config(MODEL)),
        image_size=40,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        device=torch.device("cpu"),
        world=World.group(),
        batch_size=4,
    )
    found: dict[str, float] = {}
    for task in tasks:
        found |= measure_one(model, task, context)
    return found


def both(folder: Path) -> tuple[ZeroShotData, RetrievalData]:
    cache = folder / "cache"
    retrieval = resolve_retrieval([f"{folder}/retrieval/{{0..2}}.tar"], ["json.all"], cache)
    return resolve_zero_shot(str(folder / "zero-shot"), cache), retrieval


def expected_zero_shot(model: torch.nn.Module) -> dict[str, float]:
    """open_clip's own classifier builder, preprocessing and tokeniser; accuracy as clip_benchmark counts it."""
    tokenizer = open_clip.get_tokenizer(MODEL)
    templates = [t.replace("{c}", "{}") for t in TEMPLATES]
    weights = open_clip.build_zero_shot_classifier(model, tokenizer, CLASSES, templates)
    order = (expected_images(model, range(PICTURES)) @ weights).argsort(dim=1, descending=True)
    hit = order == torch.tensor([label(i) for i in range(PICTURES)])[:, None]
    return {f"top{k}": 100 * hit[:, :k].any(1).double().mean().item() for k in (1, 5)}


@torch.no_grad()
def expected_images(model: torch.nn.Module, numbers: Sequence[int]) -> torch.Tensor:
    _, _, preprocess = open_clip.create_model_and_transforms(MODEL)
    return model.encode_image(torch.stack([preprocess(picture(i)) for i in numbers]), normalize=True)


@torch.no_grad()
def expected_retrieval(model: torch.nn.Module, numbers: Sequence[int]) -> dict[str, float]:
    texts = [text for i in numbers for text in captions(i)]
    owner = torch.tensor([place for place, i in enumerate(numbers) for _ in captions(i)])
    encoded = model.encode_text(open_clip.get_tokenizer(MODEL)(texts), normalize=True)
    return brute_force(expected_images(model, numbers), encoded, owner)


def brute_force(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> dict[str, float]:
    """clip_benchmark's recall: any positive among the k best of a row of the full score matrix."""
    scores = texts @ images.T
    positive = owner[:, None] == torch.arange(len(images))
    found = {}
    for name, score, right in (("i2t", scores.T, positive.T), ("t2i", scores, positive)):
        for k in (1, 5, 10):
            nearest = score.argsort(dim=1, descending=True)[:, :k]
            found[f"{name}_r{k}"] = 100 * right.gather(1, nearest).any(1).double().mean().item()
    return found


def test_metrics_are_those_of_open_clip(folder: Path) -> None:
    model = build(MODEL, seed=0).eval()
    expected = expected_zero_shot(model) | expected_retrieval(model, range(PICTURES))
    measured = measure(folder, model, *both(folder))
    assert measured == pytest.approx(expected)
    assert 0 < measured["top1"] < measured["top5"] < 100
    assert 0 < measured["t2i_r5"] < measured["t2i_r10"] < 100


def test_broken_pictures_are_left_out(folder: Path) -> None:
    model = build(MODEL, seed=0).eval()
    data = resolve_retrieval([str(folder / "broken")], ["json.all"], folder / "cache")
    assert sum(shard.samples for shard in data.shards) == PICTURES
    whole = [i for i in range(PICTURES) if i not in BROKEN]
    assert measure(folder, model, data) == pytest.approx(expected_retrieval(model, whole))


@pytest.mark.slow
def test_three_ranks_measure_what_one_does(folder: Path, tmp_path: Path) -> None:
    tasks = both(folder)
    probes = probe(folder), probe(folder, "clip_benchmark")
    alone = [measure(folder, build(MODEL, seed=0), task) for task in (*tasks, *probes)]
    multiprocessing.spawn(_rank, (3, folder, tmp_path, (*tasks, *probes)), nprocs=3)
    for rank in range(3):
        together, joined = torch.load(tmp_path / f"{rank}.pt")
        assert together == [pytest.approx(metrics) for metrics in alone]
        assert joined.tolist() == [[0, 0], [0, 0], [2, 2]]


def _rank(rank: int, world: int, folder: Path, out: Path, data: tuple[HeldOut, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=rank, world_size=world)
    empty_on_rank_1 = [[torch.zeros(1, 2), torch.zeros(1, 2)], [], [torch.full((1, 2), 2.0)]][rank]
    joined = World.group().join(empty_on_rank_1, torch.device("cpu"))
    measured = [measure(folder, build(MODEL, seed=0), task) for task in data]
    torch.save((measured, joined), out / f"{rank}.pt")
    dist.destroy_process_group()


def test_retrieval_counts_any_caption_of_a_picture() -> None:
    images = F.normalize(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    # picture 0: one caption nearest to picture 1, one to itself; picture 1: nearest to 2; picture 2: nearest to 0
    texts = F.normalize(torch.tensor([[0.1, 1.0], [1.0, 0.1], [0.9, 1.0], [1.0, 0.2]]))
    measured = recall(images, texts, torch.tensor([2, 1, 1]))
    assert measured["t2i_r1"] == 25
    assert measured["i2t_r1"] == pytest.approx(100 / 3)
    assert {measured[f"{direction}_r{k}"] for direction in ("i2t", "t2i") for k in (5, 10)} == {100}


def test_recall_in_chunks_is_recall_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(1, 5, (41,), generator=generator)
    owner = torch.repeat_interleave(pool)
    images = F.normalize(torch.randn(41, 8, generator=generator), dim=-1)
    texts = F.normalize(images[owner] + torch.randn(len(owner), 8, generator=generator), dim=-1)
    monkeypatch.setattr("raychain.evaluators.retrieval.SCORES", 300)
    assert recall(images, texts, pool) == pytest.approx(brute_force(images, texts, owner))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 5), st.data())
def test_ranks_read_every_row_once_in_order(counts: list[int], world: int, data: st.DataObject) -> None:
    sizes = [data.draw(st.integers(0, count)) for count in counts]  # rows left when unusable samples are skipped
    parts = [part for rank in range(world) for part in shares(counts, rank, world)]
    read = [(part.shard, row) for part in parts for row in part.rows(sizes[part.shard])]
    assert read == [(shard, row) for shard, size in enumerate(sizes) for row in range(size)]


def test_measuring_leaves_the_model_as_it_was(folder: Path) -> None:
    model = build(MODEL, seed=0).train()
    model.visual.ln_post.eval()
    before = {name: module.training for name, module in model.named_modules()}
    zero_shot, _ = both(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        measured = measure(folder, model, zero_shot)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert measured == pytest.approx(expected_zero_shot(build(MODEL, seed=0).eval()))
    model.encode_image(torch.zeros(1, 3, 40, 40)).sum().backward()


@pytest.mark.parametrize("batches", [None, 0, 1])
def test_a_thread_measures_at_the_lowest_priority_until_it_is_told_to_stop(folder: Path, batches: int | None) -> None:
    """What was asked for is done, or given up one batch after it is wanted no more."""
    model, evaluation = build(MODEL, seed=0), Evaluation("sets", both(folder)[1], ())
    stage = SimpleNamespace(config=model_config(MODEL), size=40, model=MODEL)
    asked, policies = [0], []

    def given_up() -> bool:
        asked[0] += 1
        policies.append(os.sched_getscheduler(0))
        return batches is not None and asked[0] > 1 + batches  # it is asked once before it begins

    def work() -> dict[str, float] | None:
        cache = ShardCache(folder / "cache", 1 << 30)
        place = InThread(make_paradigm(Task()), cache, torch.device("cpu"), lambda: True)
        return place.measure(stage, place.copy(stage, model), evaluation, given_up)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(work).result()
    if batches is None:
        assert found == pytest.approx(expected_retrieval(model.eval(), range(PICTURES)))
    else:
        assert found is None
        assert asked[0] == 2 + batches
    assert set(policies[1:]) <= {os.SCHED_IDLE}
    assert os.sched_getscheduler(0) != os.SCHED_IDLE


def test_digest_names_what_is_measured_and_not_where_it_lies(folder: Path, tmp_path: Path) -> None:
    zero_shot, retrieval = both(folder)
    assert pickle.loads(pickle.dumps((zero_shot, retrieval))) == (zero_shot, retrieval)
    (folder / "zero-shot").rename(tmp_path / "moved")
    moved = resolve_zero_shot(str(tmp_path / "moved"), tmp_path / "other-cache")
    (tmp_path / "moved").rename(folder / "zero-shot")
    assert moved.digest == zero_shot.digest != retrieval.digest
    assert ZeroShotData(zero_shot.classes, ("a {c}",), zero_shot.shards).digest != zero_shot.digest


def test_templates_are_optional(tmp_path: Path) -> None:
    write_shards(tmp_path / "test", labelled=True)
    (tmp_path / "classnames.txt").write_text("\n".join(CLASSES) + "\n\n")
    data = resolve_zero_shot(f"file://{tmp_path}", tmp_path / "cache")
    assert data.classes == CLASSES
    assert data.prompts("cat") == ["a photo of a cat."]


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (None, "a folder that exists"),
        ({}, "write the class names to classnames.txt"),
        ({"classnames.txt": "a\nb\n"}, "label 6 in .*allowed  0 … 1"),
        ({"classnames.txt": "\n".join(CLASSES), "zeroshot_classification_templates.txt": "a {}\n"}, "'a {}'.*add {c}"),
        ({"classnames.txt": b"\xff\xfe"}, "a UTF-8 text file"),
    ],
)
def test_wrong_zero_shot_folders_are_input_errors(
    tmp_path: Path, files: dict[str, str | bytes] | None, says: str
) -> None:
    address = tmp_path / "zero-shot"
    if files is not None:
        write_shards(address / "test", labelled=True)
        for name, content in files.items():
            (address / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=rf"(?s)^evaluate\.zero_shot\n.*{says}"):
        resolve_zero_shot(str(address), tmp_path / "cache")


def test_shards_without_labels_or_captions_are_input_errors(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classnames.txt").write_text("a\n")
    with pytest.raises(InputError, match=r"^evaluate\.zero_shot\n"):
        resolve_zero_shot(str(tmp_path), tmp_path / "cache")
    with pytest.raises(InputError, match=r"^evaluate\.retrieval\n"):
        resolve_retrieval([str(tmp_path / "*.tar")], ["txt"], tmp_path / "cache")
    with pytest.raises(InputError, match=r"(?s)^evaluate\.retrieval\n.*without a usable sample"):
        resolve_retrieval([str(folder / "retrieval")], ["txt"], tmp_path / "cache")


def probe(folder: Path, protocol: Any = "ridge") -> LinearProbeData:
    """A probe on the pictures of the zero-shot set, tested on the same ones."""
    shards = [str(folder / "zero-shot" / "test")]
    return resolve_linear_probe(shards, shards, protocol, folder / "cache", "evaluate.probe")


def labelled_features(model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 features [N, D], and labels [N]."""
    return expected_images(model, range(PICTURES)).double(), torch.tensor([label(i) for i in range(PICTURES)])


def test_the_ridge_probe_is_least_squares_with_a_penalty(folder: Path) -> None:
    model = build(MODEL, seed=0).eval()
    x_ND, label_N = labelled_features(model)
    sums = Sums(x_ND.shape[1], len(CLASSES), torch.device("cpu"))
    sums.add(x_ND[:9].float(), label_N[:9])
    sums.add(x_ND[9:].float(), label_N[9:])
    [(weights_DC, bias_C)] = sums.solve((0.3,))
    centred_ND, y_NC = x_ND - x_ND.mean(0), F.one_hot(label_N, len(CLASSES)).double()
    penalty = 0.3 * centred_ND.square().sum() / x_ND.shape[1]  # of the mean variance, for the sum over all pictures
    ridge_DD = centred_ND.T @ centred_ND + penalty * torch.eye(x_ND.shape[1], dtype=torch.float64)
    expected_DC = torch.linalg.solve(ridge_DD, centred_ND.T @ (y_NC - y_NC.mean(0)))
    assert torch.allclose(weights_DC, expected_DC, atol=1e-5)
    assert torch.allclose(x_ND @ weights_DC + bias_C, centred_ND @ expected_DC + y_NC.mean(0), atol=1e-5)
    measured = measure(folder, model, probe(folder))
    assert set(measured) == {"top1", "top5", "mean_class"}
    assert 100 / len(CLASSES) < measured["top1"] <= measured["top5"] <= 100


def test_the_penalty_is_the_largest_of_the_best(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one colour each are told apart by any penalty, so the largest is taken."""
    chosen: list[tuple[float, ...]] = []
    solve = Sums.solve
    monkeypatch.setattr(Sums, "solve", lambda self, penalties: chosen.append(penalties) or solve(self, penalties))
    measure(folder, build(MODEL, seed=0).eval(), probe(folder))
    assert [len(penalties) for penalties in chosen] == [len(PENALTIES), 1]
    assert chosen[1][0] in PENALTIES


def test_a_probe_on_a_timm_model_takes_what_its_classifier_gets(folder: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, patch_size=16, depth=2, num_classes=5).eval()
    x_b3HW = torch.rand(3, 3, 48, 48)
    found = image_features(model, x_b3HW)
    with torch.no_grad():
        assert torch.allclose(model.head(model.forward_head(model.forward_features(x_b3HW), True)), model(x_b3HW))
        expected = F.normalize(model.forward_head(model.forward_features(x_b3HW), pre_logits=True), dim=-1)
    assert torch.allclose(found, expected)
    context = Context(
        cache=ShardCache(folder / "cache", 1 << 30), tokenize=None, image_size=48, mean=(0.5,) * 3, std=(0.5,) * 3,
        device=torch.device("cpu"), batch_size=8,
    )  # fmt: skip
    for protocol in ("ridge", "clip_benchmark"):
        measured = measure_one(model, probe(folder, protocol), context)
        assert measured == measure_one(model, probe(folder, protocol), context), "the same twice"
        assert 0 < measured["top1"] <= measured["top5"] <= 100
    with pytest.raises(ValueError, match="takes no texts"):
        measure_one(model, both(folder)[0], context)


def test_the_probe_leaves_the_random_numbers_of_training_alone(folder: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    measure(folder, build(MODEL, seed=0), probe(folder, "clip_benchmark"))
    assert torch.equal(torch.rand(3), expected)


def test_a_probe_needs_training_pictures_of_the_same_classes(folder: Path, tmp_path: Path) -> None:
    setting = Setting(tmp_path / "cache", ("txt",))
    (tmp_path / "cache" / "counts").mkdir(parents=True)
    alone = LinearProbe(type="linear_probe", data=(str(folder / "zero-shot" / "test"),))
    with pytest.raises(InputError, match=r"(?s)^evaluate\.p\n.*train/\*\.tar.*add evaluate\.p\.train"):
        alone.resolve("evaluate.p", setting)
    with pytest.raises(InputError, match=r"(?s)evaluate\.p\n.*zero-shot/train\n.*no such file"):
        LinearProbe(type="linear_probe", data=(str(folder / "zero-shot"),)).resolve("evaluate.p", setting)
    with webdataset.TarWriter(str(tmp_path / "few.tar")) as tar:
        tar.write({"__key__": "a", "png": picture(1), "cls": 2})
    fewer = LinearProbe(type="linear_probe", data=alone.data, train=(str(tmp_path / "few.tar"),))
    with pytest.raises(InputError, match=r"label 6 in .*0 … 2, the labels of the training shards|0 … 2"):
        fewer.resolve("evaluate.p", setting)
    shutil.copytree(folder / "zero-shot" / "test", tmp_path / "whole" / "train")
    shutil.copytree(folder / "zero-shot" / "test", tmp_path / "whole" / "test")
    found = LinearProbe(type="linear_probe", data=(str(tmp_path / "whole"),)).resolve("evaluate.p", setting)
    assert (found.samples, found.classes) == (2 * PICTURES, len(CLASSES))
    assert found.digest == probe(folder).digest != probe(folder, "clip_benchmark").digest
