"""SigLIP: the loss is open_clip's, exact at any world size; a chain with it trains, grows, resumes and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from torch.nn.parallel import DistributedDataParallel

import raychain
from raychain.config.experiment import Distill
from raychain.config.loading import validate
from raychain.core.dist import mean_over_ranks, rank_slice
from raychain.errors import InputError
from raychain.paradigms import make_paradigm, make_task
from raychain.paradigms.objective import Objective
from raychain.paradigms.siglip import sigmoid_loss
from raychain.training.step import forward_backward

BATCH, CAPTIONS, TASK = 10, 3, make_task({"paradigm": "siglip"})


def features(captions: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(BATCH, 6, generator=rng, dtype=torch.float64), dim=-1).requires_grad_()
    text = F.normalize(torch.randn(BATCH, captions, 6, generator=rng, dtype=torch.float64), dim=-1).requires_grad_()
    return image, text, torch.tensor(10.0).double().requires_grad_(), torch.tensor(-10.0).double().requires_grad_()


def test_one_caption_is_open_clips_loss_and_gradient() -> None:
    ours, theirs = features(), features()
    sigmoid_loss(*ours).backward()
    image, text, scale, bias = theirs
    loss = SigLipLoss()(image, text[:, 0], scale, bias)
    loss.backward()
    assert sigmoid_loss(*features()).item() == pytest.approx(loss.item(), rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-12)


def models(dtype: torch.dtype) -> tuple[Objective, Objective]:
    """A CoM-micro-M that follows a CoM-micro-S, both with a logit bias."""
    siglip = make_paradigm(TASK)
    small, large = siglip.config("CoM-micro-S"), siglip.config("CoM-micro-M")
    teacher = siglip.objective(siglip.build(small, size=40, seed=1), small).to(dtype).eval().requires_grad_(False)
    return siglip.objective(siglip.build(large, size=40, seed=2), large, small).to(dtype), teacher


def batch(part: slice) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (BATCH, 40, 40, 3), generator=rng, dtype=torch.uint8)
    return {"images": images[part], "tokens": torch.randint(1, 90, (BATCH, CAPTIONS, 18), generator=rng)[part]}


def reference() -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients from the definitions, in float64, of the whole batch in one process."""
    student, teacher = models(torch.float64)
    whole, encoded = batch(slice(None)), []
    for side in (student, teacher):
        pixels = (whole["images"].permute(0, 3, 1, 2).double() - side.mean) / side.std
        image = side.model.encode_image(pixels, normalize=True)
        encoded.append((image, torch.stack([side.model.encode_text(t, normalize=True) for t in whole["tokens"]])))
    (image, text), (image_t, text_t) = encoded
    task = torch.zeros((), dtype=torch.float64)
    for k in range(CAPTIONS):
        for i in range(BATCH):
            for j in range(BATCH):
                logit = student.model.logit_scale.exp() * image[i] @ text[j, k] + student.model.logit_bias
                task = task - F.logsigmoid(logit if i == j else -logit) / (BATCH * CAPTIONS)
    distance = ((image - image_t) ** 2).sum(-1).mean() / 2 + ((text - text_t) ** 2).sum(-1).mean() / 2
    alpha = min(2.0, 0.999 * task.item() / distance.item())
    (task + alpha * distance).backward()
    return (task + alpha * distance).item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def _compare(rank: int, world: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        loss, gradients = torch.load(f"{rendezvous}.expected")
        for micro in (None, 2):
            student, teacher = models(torch.float32)
            student.micro_batch = teacher.micro_batch = micro
            wrapped = DistributedDataParallel(student) if world > 1 else student
            part = batch(rank_slice(BATCH, rank, world))
            losses = forward_backward(wrapped, student, teacher, part, Distill(), BATCH)
            assert float(mean_over_ranks(losses.total)) == pytest.approx(loss, rel=1e-6)
            found = {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
            assert found.keys() == gradients.keys()
            assert "model.logit_bias" in found
            largest = max(float(gradient.abs().max()) for gradient in gradients.values())
            for name, gradient in gradients.items():
                error = (found[name].double() - gradient).norm() / gradient.norm().clamp_min(1e-3 * largest)
                assert error < 1e-5, f"{name}: {error:.1e} at {world} workers, micro-batch {micro}"
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(world, marks=pytest.mark.long) for world in (2, 4))])
def test_gradients_are_those_of_a_float64_reference_at_any_world_size(world: int, tmp_path: Path) -> None:
    rendezvous = str(tmp_path / "rendezvous")
    torch.save(reference(), f"{rendezvous}.expected")
    torch.multiprocessing.spawn(_compare, args=(world, rendezvous), nprocs=world)


@pytest.mark.slow
def test_a_chain_trains_grows_continues_and_reports(ray_session: None, tree: dict[str, Any]) -> None:
    tree["task"] = {"paradigm": "siglip", "init_logit_bias": -8.0}
    tree["chain"][1]["epochs"] = "8 steps"
    tree["chain"], chain = tree["chain"][:1], tree["chain"]
    raychain.run(validate(tree))
    run = raychain.run(validate(tree | {"chain": chain}))
    out = Path(tree["storage"]) / "tiny"
    assert [stage["status"] for stage in run["stages"]] == ["reused", "trained"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["logit_scale"] == pytest.approx(10, rel=0.2)
    assert lines[0]["logit_bias"] == pytest.approx(-8, abs=0.1)
    grown = [line for line in lines if line["stage"] == 1]
    assert all(0 < line["distill_loss"] < line["task_loss"] for line in grown)
    loaded = open_clip.create_model(f"local-dir:{out}/stages/1-CoM-micro-M")
    assert loaded.logit_bias.item() == pytest.approx(lines[-1]["logit_bias"], abs=0.05)
    assert "siglip" in (out / "report.html").read_text()
    assert all(metric == metric for stage in run["stages"] for metric in stage["metrics"].values())


def test_the_loss_is_part_of_a_stages_key_and_options_are_checked(tree: dict[str, Any]) -> None:
    def key(**task: object) -> str:
        from raychain.runs.resolve import dry_plan

        return str(dry_plan(validate(tree | ({"task": task} if task else {})))["stages"][0]["key"])

    keys = {key(), key(paradigm="siglip"), key(paradigm="siglip", init_logit_scale=math.log(5))}
    assert len(keys) == 3
    assert key(paradigm="clip") == key()
    for task, said in (({"paradigm": "siglp"}, "did you mean siglip"), ({"paradigm": "siglip", "x": 1}, "task")):
        with pytest.raises(InputError, match=said):
            validate(tree | {"task": task})
