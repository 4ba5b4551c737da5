"""Classification: exact losses at any world size, pictures that depend on their seeds alone, timm's folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from class_shards import CLASSES, class_shards
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from torch.nn.parallel import DistributedDataParallel

import raychain
from raychain.config.data import Data
from raychain.config.experiment import Distill
from raychain.config.loading import validate
from raychain.core.dist import mean_over_ranks, rank_slice
from raychain.data.cache import ShardCache
from raychain.data.loader import Feed, Loader
from raychain.data.order import Order, mix
from raychain.errors import InputError
from raychain.models import UnknownModelError
from raychain.paradigms import make_paradigm, make_task, model_size
from raychain.paradigms.classify.augment import NAMES, Changes, RandAugment, parse_augment, rand_augment
from raychain.paradigms.classify.drop_path import uniform
from raychain.paradigms.classify.mixing import Mixing, drawn
from raychain.paradigms.classify.objective import losses, targets
from raychain.paradigms.objective import Objective
from raychain.runs.resolve import dry_plan
from raychain.training.step import forward_backward

BATCH, C = 10, 7
RECIPE: dict[str, Any] = {
    "paradigm": "classify",
    "classes": C,
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "drop_path": {"CoM-micro-DeiT-S": 0.5},
}


def columns(part: slice = slice(None)) -> dict[str, torch.Tensor]:
    """A batch that has been mixed."""
    rng = torch.Generator().manual_seed(3)
    whole = {
        "images": torch.randint(0, 256, (BATCH, 40, 40, 3), generator=rng, dtype=torch.uint8),
        "label": torch.randint(C, (BATCH,), generator=rng),
        "other": torch.randint(C, (BATCH,), generator=rng),
        "share": torch.rand(BATCH, generator=rng),
        "seed": torch.randint(-(2**62), 2**62, (BATCH,), generator=rng),
    }
    return {name: column[part] for name, column in whole.items()}


def pair(loss: str, dtype: torch.dtype) -> tuple[Objective, Objective]:
    """A CoM-micro-DeiT-S that follows a CoM-micro-DeiT-XS."""
    paradigm = make_paradigm(make_task({**RECIPE, "loss": loss}))
    small, large = paradigm.config("CoM-micro-DeiT-XS"), paradigm.config("CoM-micro-DeiT-S")
    teacher = paradigm.objective(paradigm.build(small, size=40, seed=1), small).to(dtype).eval().requires_grad_(False)
    return paradigm.objective(paradigm.build(large, size=40, seed=2), large, small).to(dtype), teacher


def reference(loss: str, cap: bool) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients from the definitions in float64, each picture by itself through timm's own layers."""
    student, teacher = pair(loss, torch.float64)
    whole, total, distance = columns(), torch.zeros(()).double(), torch.zeros(()).double()
    layers = [module for module in student.modules() if type(module).__name__ == "SeededDropPath"]
    for i in range(BATCH):
        pixels = (whole["images"][i : i + 1].permute(0, 3, 1, 2).double() - student.mean) / student.std
        for layer in layers:
            bits = mix(whole["seed"][i].numpy().view(np.uint64), layer.layer) >> np.uint64(11)
            kept = float(bits) * 2.0**-53 >= layer.probability
            layer.forward = lambda x, s=kept / (1 - layer.probability): x * s
        pooled = student.model.forward_head(student.model.forward_features(pixels), pre_logits=True)[0]
        taught = teacher.model.forward_head(teacher.model.forward_features(pixels), pre_logits=True)[0]
        scores, share = student.model.head(pooled), whole["share"][i].double()
        target = torch.full((C,), 0.1 / C).double()
        target[whole["label"][i]] += 0.9 * share
        target[whole["other"][i]] += 0.9 * (1 - share)
        if loss == "bce":
            p = scores.sigmoid()
            total = total - (target * p.log() + (1 - target) * (1 - p).log()).sum() / BATCH
        else:
            total = total - (target * (scores - scores.exp().sum().log())).sum() / BATCH
        projected = F.normalize(student.projector["pooled"].weight @ F.normalize(pooled, dim=0), dim=0)
        distance = distance + (projected - F.normalize(taught, dim=0)).square().sum() / BATCH
    alpha = min(2.0, 0.999 * total.item() / distance.item()) if cap else 2.0
    (total + alpha * distance).backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return (total + alpha * distance).item(), gradients


def _compare(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    for (loss, cap), (expected, gradients) in torch.load(f"{folder}/expected").items():
        for micro in (None, 2, 3) if world != 2 else (3,):
            student, teacher = pair(loss, torch.float32)
            student.micro_batch = teacher.micro_batch = micro
            wrapped = DistributedDataParallel(student) if world > 1 else student
            part = columns(rank_slice(BATCH, rank, world, 2))
            found = forward_backward(wrapped, student, teacher, part, Distill(cap=cap), BATCH)
            assert float(mean_over_ranks(found.total)) == pytest.approx(expected, rel=1e-6)
            largest = max(float(gradient.abs().max()) for gradient in gradients.values())
            own = dict(student.named_parameters())
            for name, gradient in gradients.items():
                error = (own[name].grad.double() - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
                assert error < 1e-5, f"{name}: {error:.1e} at {world} workers, micro-batch {micro}, {loss}, cap {cap}"
    if world > 1:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 2, *(pytest.param(world, marks=pytest.mark.long) for world in (3, 4))])
def test_gradients_are_those_of_a_float64_reference_at_any_world_size(world: int, tmp_path: Path) -> None:
    """With mixing, smoothing, drop path and distillation; without the cap micro-batches are accumulated, with it
    GradCache joins them.
    """
    cases = [("cross_entropy", True), ("cross_entropy", False), ("bce", False)]
    torch.save({case: reference(*case) for case in cases[: 2 if world == 2 else 3]}, tmp_path / "expected")
    if world == 1:
        _compare(0, 1, str(tmp_path))
    else:
        torch.multiprocessing.spawn(_compare, args=(world, str(tmp_path)), nprocs=world)


def test_targets_and_losses_are_timms() -> None:
    part, task = columns(), make_task(RECIPE)
    part["share"] = torch.full((BATCH,), 0.3)
    part["other"] = part["label"].flip(0)
    assert torch.allclose(targets(part, task), mixup_target(part["label"], C, 0.3, 0.1), atol=1e-6)
    scores, target = torch.randn(BATCH, C), targets(part, task)
    soft = SoftTargetCrossEntropy()(scores, target)
    assert losses(scores, target, "cross_entropy").mean() == pytest.approx(float(soft), rel=1e-6)
    binary = BinaryCrossEntropy(smoothing=0, sum_classes=True, target_threshold=0.2)(scores, target)
    over = targets(part, make_task({**RECIPE, "loss": "bce", "bce_threshold": 0.2}))
    assert losses(scores, over, "bce").mean() == pytest.approx(float(binary), rel=1e-6)


def test_drop_paths_random_numbers_are_those_of_the_data_order() -> None:
    seeds = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 1000)
    expected = (mix(seeds.view(np.uint64), 3) >> np.uint64(11)) * 2.0**-53
    assert (uniform(torch.from_numpy(seeds), 3).numpy() == expected).all()


def reading(folder: Path, cache: Path, augment_on: Literal["host", "device"] = "host", **task: Any) -> Feed:
    paradigm = make_paradigm(make_task({"paradigm": "classify", "classes": CLASSES, **task}))
    data = Data(train=(str(folder / "train" / "*.tar"),), crop=(0.3, 1.0), augment_on=augment_on)
    addresses = sorted(str(path) for path in (folder / "train").glob("*.tar"))
    shards = paradigm.survey(addresses, data, cache, "data.train")
    reader = paradigm.reader(data, paradigm.config("CoM-micro-DeiT-S"), 40, 1000)
    return Feed(tuple(shards), Order(tuple(shard.samples for shard in shards), 7), reader)


def batches(feed: Feed, cache: Path, world: int, batch: int, threads: int = 1) -> list[dict[str, torch.Tensor]]:
    """Three steps' global batches, put together from all ranks'."""
    parts = []
    for rank in range(world):
        options = {"global_batch": batch, "start": 0, "stop": 3, "rank": rank, "world": world, "threads": threads}
        with Loader(feed, ShardCache(cache, 2**30), **options) as loader:
            parts.append([found.columns for found in loader])
    return [{n: torch.cat([part[step][n] for part in parts]) for n in parts[0][0]} for step in range(3)]


def test_mixed_and_changed_pictures_do_not_depend_on_workers_or_threads(tmp_path: Path) -> None:
    folder, cache = class_shards(tmp_path / "data", 64, 10), tmp_path / "cache"
    (cache / "counts").mkdir(parents=True)
    feed = reading(folder, cache, mixup=0.8, cutmix=1.0, augment="rand-m9-mstd0.5-inc1", erase=0.5, color_jitter=0.3)
    whole = batches(feed, cache, 1, 11)
    assert {"images", "label", "other", "share", "seed"} == whole[0].keys()
    for world, threads in ((2, 1), (3, 2), (4, 1)):
        for expected, found in zip(whole, batches(feed, cache, world, 11, threads), strict=True):
            assert all(torch.equal(expected[name], found[name]) for name in expected)
    share, label, other = (torch.cat([step[name] for step in whole]) for name in ("share", "label", "other"))
    assert (share[10], other[10]) == (1, label[10]), "of an odd batch the last one stays alone"
    assert ((share >= 0) & (share <= 1)).all()
    assert (share < 1).sum() > 20
    assert torch.equal(share[0:10:2], share[1:10:2])
    assert torch.equal(label[0:10:2], other[1:10:2])
    plain = batches(reading(folder, cache, flip=0.0), cache, 1, 11)
    assert plain[0].keys() == {"images", "label", "seed"}
    assert torch.equal(plain[0]["label"], whole[0]["label"])
    assert not torch.equal(plain[0]["images"], whole[0]["images"])


def test_pictures_that_are_mirrored_on_the_device_are_those_that_the_host_mirrors(tmp_path: Path) -> None:
    folder, cache = class_shards(tmp_path / "data", 64, 10), tmp_path / "cache"
    (cache / "counts").mkdir(parents=True)
    found = []
    for augment_on in ("host", "device"):
        feed = reading(folder, cache, augment_on, flip=0.5)
        with Loader(feed, ShardCache(cache, 2**30), global_batch=16, start=0, stop=3) as loader:
            read = list(loader)
        found.append([batch.to(torch.device("cpu"))["images"] for batch in read])
    assert 5 < sum(int(batch["mirror"].sum()) for batch in read) < 43
    assert all(torch.equal(host, device) for host, device in zip(*found, strict=True))
    with pytest.raises(InputError, match=r"data.augment_on\n.*device\n.*host with task.erase, task.mixup"):
        reading(folder, cache, "device", mixup=0.8, erase=0.1)


def test_a_pairs_share_follows_betas_distribution_and_the_box() -> None:
    both = [drawn(Mixing(0.8, 1.0), (i, i + 1), 40) for i in range(400)]
    boxes = [found for found in both if found.box]
    assert 150 < len(boxes) < 250
    for share, (top, bottom, left, right) in boxes:
        assert share == pytest.approx(1 - (bottom - top) * (right - left) / 1600)
    assert np.mean([found.share for found in both if not found.box]) == pytest.approx(0.5, abs=0.06)
    assert sum(found.share == 1 for found in (drawn(Mixing(0.8, 0, 0.5), (i, 1), 40) for i in range(400))) > 150
    assert all(drawn(Mixing(0.2), (i, 1), 40).box is None for i in range(50))


def test_every_operation_of_rand_augment_changes_pictures_and_follows_the_seed() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    from PIL import Image

    image, how = Image.fromarray(pixels), RandAugment(9, 0.5, 1)
    found = {rand_augment(image, how, np.random.default_rng(i)).tobytes() for i in range(300)}
    assert len(found) > len(NAMES)
    for strength in (0, 10):  # the ends, of which no operation may make what Pillow refuses
        for i in range(300):
            assert rand_augment(image, RandAugment(strength, 0, 2), np.random.default_rng(i)).size == (32, 32)
    for changes in (Changes(0.5, "rand-m9-n3-mstd0.5-inc1"), Changes(0.5, "3a", 0.3), Changes(flip=1.0)):
        same, again, other = (changes.apply(pixels, seed) for seed in (1, 1, 2))
        assert np.array_equal(same, again)
        assert changes.augment is None or not np.array_equal(same, other)
    assert np.array_equal(Changes(flip=1.0).apply(pixels, 5), pixels[:, ::-1])
    erased = pixels.copy()
    Changes(erase=1.0).erased(erased, 3)
    share = (erased != pixels).any(-1).mean()
    assert 0.01 < share < 0.4
    assert parse_augment("rand-m7-mstd0.5-inc1") == RandAugment(7, 0.5, 2)


@pytest.mark.parametrize("name", ["CoM-micro-DeiT-S", "CoM-micro-Swin-S", "CoM-micro-ConvNeXt-S"])
def test_unmodified_timm_loads_a_stage_folder(name: str, tmp_path: Path) -> None:
    paradigm = make_paradigm(make_task(RECIPE | {"drop_path": 0.2}))
    config = paradigm.config(name)
    model = paradigm.build(config, size=48 if "DeiT" in name else 40, seed=3)
    model = paradigm.objective(model, config).model.eval()
    size = 48 if "DeiT" in name else 40
    paradigm.save(tmp_path, model, config, size)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(theirs(x), model(x))
        assert torch.equal(paradigm.load(tmp_path).eval()(x), model(x))
    assert tuple(timm.data.resolve_model_data_config(theirs)["input_size"]) == (3, size, size)
    again = paradigm.read(tmp_path, name)
    assert again.config["mean"] == config["mean"]
    other = make_paradigm(make_task(RECIPE | {"classes": C + 1}))
    with pytest.raises(ValueError, match=f"{C} classes apart"):
        other.read(tmp_path, name)


@pytest.mark.parametrize("name", ["CoM-micro-DeiT-S", "CoM-micro-Swin-S", "CoM-micro-ConvNeXt-S"])
def test_a_teacher_reads_pictures_of_another_size(name: str) -> None:
    paradigm = make_paradigm(make_task(RECIPE))
    config = paradigm.config(name)
    model = paradigm.adapt(paradigm.build(config, size=40, seed=3), config, 80).eval()
    shapes = {n: v.shape for n, v in paradigm.build(config, size=80, seed=0, device="meta").state_dict().items()}
    assert {n: v.shape for n, v in model.state_dict().items()} == shapes
    with torch.no_grad():
        assert model(torch.randn(1, 3, 80, 80)).shape == (1, C)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet18", "BatchNorm"),
        ("deit_tiny_distilled_patch16_224", "no single linear layer"),
        ("deit_tinny_patch16_224", "did you mean"),
        ("CoM-DeiT-X", "CoM-DeiT-T"),
    ],
)
def test_what_cannot_be_trained_is_named_with_the_reason(name: str, said: str) -> None:
    with pytest.raises(UnknownModelError, match=said):
        make_paradigm(make_task(RECIPE)).config(name)


def test_models_cost_what_their_papers_say() -> None:
    task = make_task({"paradigm": "classify", "classes": 1000})
    for name, millions, giga in (("CoM-DeiT-T", 5.7, 1.25), ("deit_small_patch16_224", 22.1, 4.6)):
        size = model_size(task, name)
        assert size.params / 1e6 == pytest.approx(millions, rel=0.02)
        assert size.forward({"model": 1}) / 1e9 == pytest.approx(giga, rel=0.03)


@pytest.mark.parametrize(
    ("name", "percent", "parameters"),
    [
        ("in1k-deit-tsb", 24.4, (5.7, 22.1, 86.6)),
        ("in1k-deit3-smb", 49.0, (22.1, 38.8, 86.6)),
        pytest.param("in1k-swin-tsb", 54.6, (28.3, 49.6, 87.8), marks=pytest.mark.long),
        pytest.param("in1k-convnext-tsb", 54.5, (28.6, 50.2, 88.6), marks=pytest.mark.long),
    ],
)
def test_shipped_chains_are_planned_and_grow(name: str, percent: float, parameters: tuple[float, ...]) -> None:
    plan = raychain.plan(name)
    assert plan["percent_of_baseline"] == pytest.approx(percent, abs=0.1)
    assert [stage["params"] / 1e6 for stage in plan["stages"]] == pytest.approx(parameters, abs=0.06)
    assert plan["warnings"] == []


def experiment(folder: Path, tmp_path: Path, **task: Any) -> dict[str, Any]:
    return {
        "name": "places",
        "task": {"paradigm": "classify", "classes": CLASSES, **task},
        "data": {"train": str(folder / "train")},
        "chain": [{"model": "CoM-micro-DeiT-XS", "epochs": 1}, {"model": "CoM-micro-DeiT-S", "epochs": 1}],
        "train": {"global_batch": 16, "warmup": "10 %"},
        "preload": {"cache": str(tmp_path / "cache")},
        "evaluate": {"held-out": {"type": "accuracy", "data": str(folder)}},
        "storage": str(tmp_path / "runs"),
    }


def test_wrong_input_is_one_message_and_a_rate_of_another_stage_changes_no_key(tmp_path: Path) -> None:
    folder = class_shards(tmp_path / "data", 32, 10)

    def key(stage: int, **task: Any) -> str:
        return str(dry_plan(validate(experiment(folder, tmp_path, **task)))["stages"][stage]["key"])

    base = key(0)
    assert key(0, drop_path={"CoM-micro-DeiT-S": 0.1}) == base
    assert len({base, key(0, smoothing=0.1), key(0, mixup=0.8), key(0, erase=0.1), key(0, drop_path=0.1)}) == 5
    wrong = [
        ({"classes": 6}, "5, the lines of"),
        ({"augment": "rand-m9"}, "inc1"),
        ({"augment": "auto"}, "3a, or timm's"),
        ({"bce_threshold": 0.2}, "loss: bce"),
        ({"drop_path": 1.0}, "drop_path"),
        ({"mixupp": 0.1}, "did you mean mixup"),
    ]
    for task, said in wrong:
        with pytest.raises(InputError, match=said):
            dry_plan(validate(experiment(folder, tmp_path, **task)))
    with pytest.raises(InputError, match="classes"):
        validate(experiment(folder, tmp_path) | {"task": {"paradigm": "classify"}})
    zero = experiment(folder, tmp_path) | {"evaluate": {"held-out": {"type": "zero_shot", "data": str(folder)}}}
    from raychain.runs.checks import check_evaluators

    with pytest.raises(InputError, match="an evaluator of classes and pictures"):
        check_evaluators(validate(zero))
    (folder / "classnames.txt").unlink()
    with pytest.raises(InputError, match=r"(?s)label 4 in .* 0 … 2, the classes of the models"):
        dry_plan(validate(experiment(folder, tmp_path, classes=3)))
