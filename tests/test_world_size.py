"""Training does not depend on the number of workers: losses, gradients, micro-batches, and changes in mid-stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import BATCH, CAPTIONS, agree, reference
from torch.nn.functional import cross_entropy

from raychain.config.loading import validate
from raychain.events import Event, Step
from raychain.models import build
from raychain.paradigms.clip.objective import ClipObjective
from raychain.paradigms.objective import Projector
from raychain.runs.resolve import make_task
from raychain.training.stage import ChainWorker

STEPS = (20, 200)
WORLDS = (1, 4)
"""2 and 3 are among the changes; alone they deviate as little (4e-7 and 3e-7)."""
CHANGES = ((2, 90), (1, 130), (3, 170), (2, None))
"""World sizes, and the step at which the next one takes over."""


def models(dtype: torch.dtype) -> tuple[ClipObjective, ClipObjective]:
    """A CoM-micro-M that follows a CoM-micro-S teacher."""
    torch.manual_seed(0)
    teacher = ClipObjective(build("CoM-micro-S", seed=1)).to(dtype).eval().requires_grad_(False)
    return ClipObjective(build("CoM-micro-M", seed=2), Projector(dict.fromkeys(("image", "text"), (64, 64)))).to(
        dtype
    ), teacher


def contrastive(model: Any, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The mean of CLIP's loss over the captions."""
    total, target = torch.zeros((), dtype=torch.float64), torch.arange(BATCH)
    for k in range(CAPTIONS):
        logits = model.logit_scale.exp() * image @ text[:, k].T
        total = total + (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / (2 * CAPTIONS)
    return total


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(world, marks=pytest.mark.long) for world in (2, 4))])
def test_gradients_are_those_of_a_float64_reference_at_any_world_size(world: int, tmp_path: Path) -> None:
    agree(models, reference(models, contrastive), world, tmp_path)


def _peak(micro: int | None, pairs: int) -> int:
    """Bytes of tensors alive at once in a forward and backward pass, beyond the parameters, their gradients, and the
    share of a part that is added to them.
    """
    student = ClipObjective(build("CoM-micro-M", seed=0))
    student.micro_batch = micro
    images = torch.zeros(pairs, 40, 40, 3, dtype=torch.uint8)
    tokens = torch.ones(pairs, 1, 18, dtype=torch.long)
    with torch.profiler.profile(profile_memory=True) as profile:
        image, text = student({"images": images, "tokens": tokens}).features
        (image.sum() + text.sum()).backward()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - 2 * sum(p.nbytes for p in student.parameters())


def test_memory_is_flat_in_the_batch_with_a_micro_batch() -> None:
    small, large, whole = _peak(8, 16), _peak(8, 128), _peak(None, 128)
    assert large < 1.5 * small
    assert large < whole / 4


def curve(out: Path) -> dict[tuple[int, int], float]:
    """Loss by stage and step."""
    return {(x["stage"], x["step"]): x["loss"] for x in map(json.loads, (out / "events").read_text().splitlines())}


def _train(rank: int, world: int, rendezvous: str, task: Any, leave: int | None) -> None:
    """One rank of a worker group that saves and returns after step `leave` of the second stage."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    place = [(0, 0)]

    def emit(event: Event) -> None:
        if isinstance(event, Step):
            place[0] = event.stage, event.step
            with Path(task.out, "events").open("a") as file:
                file.write(json.dumps({"stage": event.stage, "step": event.step, "loss": event.loss}) + "\n")

    worker = ChainWorker(task, torch.device("cpu"), emit, lambda: leave is not None and place[0] >= (1, leave))
    try:
        assert worker.run() == (leave is None)
    finally:
        dist.destroy_process_group()


@pytest.mark.long
def test_losses_do_not_depend_on_the_number_of_workers_or_its_changes(tree, tmp_path) -> None:
    """200 steps in fp32 with distillation and three captions: relative deviation at most 1e-4."""
    tree |= {"evaluate": {}, "checkpoint": {"every": "1000 steps"}}
    tree["data"]["captions"]["per_image"] = CAPTIONS
    tree["train"] |= {"global_batch": 12, "log_every": 1}
    tree["chain"] = [{"model": f"CoM-micro-{m}", "epochs": f"{n} steps"} for m, n in zip("SM", STEPS, strict=True)]
    plans = {str(world): [(world, None)] for world in WORLDS} | {"2→1→3→2": CHANGES}
    curves = {}
    for name, plan in plans.items():
        out = tmp_path / name
        task = make_task(validate(tree), str(out))
        out.mkdir(exist_ok=True)
        for number, (world, leave) in enumerate(plan):
            rendezvous = str(out / f"rendezvous-{number}")
            torch.multiprocessing.spawn(_train, args=(world, rendezvous, task, leave), nprocs=world)
        curves[name] = curve(out)
    assert len(curves["1"]) == sum(STEPS)
    for name, found in curves.items():
        assert found.keys() == curves["1"].keys()
        worst = max(abs(loss / curves["1"][place] - 1) for place, loss in found.items())
        print(f"{name} workers: largest relative deviation {worst:.1e}")
        assert worst < 1e-4, name
