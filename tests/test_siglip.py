"""SigLIP: the loss is open_clip's, exact at any world size; a chain with it trains, grows, resumes and reports."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import SigLipLoss
from ranks import BATCH, CAPTIONS, agree, reference

import raychain
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.paradigms import make_paradigm, make_task
from raychain.paradigms.objective import Objective
from raychain.paradigms.siglip import sigmoid_loss

TASK = make_task({"paradigm": "siglip"})


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


def sigmoid(model: Any, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The sigmoid loss of every pair by itself."""
    total = torch.zeros((), dtype=torch.float64)
    for k in range(CAPTIONS):
        for i in range(BATCH):
            for j in range(BATCH):
                logit = model.logit_scale.exp() * image[i] @ text[j, k] + model.logit_bias
                total = total - F.logsigmoid(logit if i == j else -logit) / (BATCH * CAPTIONS)
    return total


@pytest.mark.parametrize("world", [1, 3, *(pytest.param(world, marks=pytest.mark.long) for world in (2, 4))])
def test_gradients_are_those_of_a_float64_reference_at_any_world_size(world: int, tmp_path: Path) -> None:
    expected = reference(models, sigmoid)
    assert "model.logit_bias" in expected[1]
    agree(models, expected, world, tmp_path)


@pytest.mark.slow
@pytest.mark.long
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
