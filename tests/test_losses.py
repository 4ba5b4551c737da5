"""The losses are open_clip's and the by-hand ones, and give the global batch's gradients at any world size."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from growing import config, embeddings, perturb, tiny
from hypothesis import given
from hypothesis import strategies as st
from open_clip.loss import ClipLoss

from raychain.core import dist as core_dist
from raychain.core.dist import gather, mean_over_ranks, world_size
from raychain.growth import grow
from raychain.paradigms import projects
from raychain.paradigms.clip.loss import contrastive_loss
from raychain.paradigms.objective import Projector
from raychain.paradigms.task import Task
from raychain.training.distillation import CAP, capped_alpha, feature_distance

BATCH, CAPTIONS, INPUT, DIM = 12, 3, 7, 5


def towers() -> dict[str, torch.Tensor]:
    """A linear image tower, a linear text tower and a logit scale, each a leaf that takes gradients."""
    rng = torch.Generator().manual_seed(0)
    return {
        "image": torch.randn(INPUT, DIM, generator=rng).requires_grad_(),
        "text": torch.randn(INPUT, DIM, generator=rng).requires_grad_(),
        "scale": torch.tensor(math.log(10.0), requires_grad=True),
    }


def inputs(captions: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[BATCH, INPUT] pictures and [BATCH, captions, INPUT] texts."""
    rng = torch.Generator().manual_seed(1)
    return torch.randn(BATCH, INPUT, generator=rng), torch.randn(BATCH, captions, INPUT, generator=rng)


def features(leaves: dict[str, torch.Tensor], image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Normalised features and exp(logit_scale)."""
    encoded = F.normalize(image @ leaves["image"], dim=-1), F.normalize(text @ leaves["text"], dim=-1)
    return *encoded, leaves["scale"].exp()


def loss_and_gradients(captions: int, rank: int = 0, world: int = 1) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients averaged over ranks, as DDP averages them, of this rank's block of the global batch."""
    leaves, block = towers(), slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    loss = contrastive_loss(*features(leaves, *(part[block] for part in inputs(captions))), BATCH)
    loss.backward()
    return mean_over_ranks(loss), {name: mean_over_ranks(leaf.grad) for name, leaf in leaves.items()}


def by_hand(image: np.ndarray, text: np.ndarray, scale: float) -> float:
    """LaCLIP's loss from its definition, one caption and one sample at a time."""
    total = []
    for k in range(text.shape[1]):
        logits = scale * image @ text[:, k].T
        for i in range(len(image)):
            total.append(np.log(np.exp(logits[i]).sum()) - logits[i, i])
            total.append(np.log(np.exp(logits[:, i]).sum()) - logits[i, i])
    return float(np.mean(total))


def test_without_a_process_group_there_is_one_rank() -> None:
    value = torch.ones(2, requires_grad=True)
    assert world_size() == 1
    assert gather(value) is value
    assert not mean_over_ranks(value).requires_grad


def test_one_caption_is_open_clips_loss_and_gradient() -> None:
    ours, ours_grad = loss_and_gradients(1)
    leaves = towers()
    image, text, scale = features(leaves, *inputs(1))
    theirs = ClipLoss()(image, text[:, 0], scale)
    theirs.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    for name, leaf in leaves.items():
        torch.testing.assert_close(ours_grad[name], leaf.grad)


def test_several_captions_are_averaged_as_by_hand() -> None:
    image, text, scale = (part.detach().double() for part in features(towers(), *inputs(CAPTIONS)))
    assert contrastive_loss(image, text, scale).item() == pytest.approx(
        by_hand(image.numpy(), text.numpy(), scale.item())
    )


def _check_gradients(rank: int, world: int, expected: dict[int, Any]) -> None:
    """Losses and gradients are those of the global batch, and others are left alone."""
    for captions, (loss, gradients) in expected.items():
        ours, ours_grad = loss_and_gradients(captions, rank, world)
        torch.testing.assert_close(ours, loss)
        for name, gradient in gradients.items():
            torch.testing.assert_close(ours_grad[name], gradient, rtol=1e-4, atol=1e-6)

    block = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
    if BATCH % world == 0:
        image, text, scale = features(towers(), *(part[block] for part in inputs(1)))
        theirs = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        torch.testing.assert_close(contrastive_loss(image, text, scale), theirs(image, text[:, 0], scale))

    local, other = (
        torch.full((2, 3), float(rank), requires_grad=True),
        torch.zeros(2 * world, 3, requires_grad=True),
    )
    beside = other * 1.0  # made before the gathering, so that backward comes to it afterwards
    joined = gather(local)
    assert joined[:, 0].tolist() == [float(r) for r in range(world) for _ in range(2)]
    ((joined + beside) * torch.full_like(other, rank + 1)).sum().backward()
    assert local.grad is not None
    assert other.grad is not None
    assert local.grad.unique().item() == world * (world + 1) / 2
    assert other.grad.unique().item() == rank + 1, "summing over ranks changed a gradient that is not gathered"


def _check_rank(rank: int, world: int, rendezvous: str) -> None:
    """What one rank checks, however gradients are summed; an assertion that fails here fails the spawning test."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    try:
        expected: dict[int, Any] = torch.load(f"{rendezvous}.expected")
        for scatters in ((), ("gloo",)):
            core_dist.SCATTERS = scatters
            _check_gradients(rank, world, expected)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("world", [2, 5])
def test_any_world_size_gives_the_loss_and_gradients_of_the_global_batch(world: int, tmp_path: Path) -> None:
    rendezvous = str(tmp_path / "rendezvous")
    torch.save({k: loss_and_gradients(k) for k in (1, CAPTIONS)}, f"{rendezvous}.expected")
    torch.multiprocessing.spawn(_check_rank, args=(world, rendezvous), nprocs=world)


def test_distillation_is_the_squared_distance_averaged_as_by_hand() -> None:
    rng = np.random.default_rng(0)
    image, text = rng.normal(size=(2, 4, 6)), rng.normal(size=(2, 4, 3, 6))
    image /= np.linalg.norm(image, axis=-1, keepdims=True)
    text /= np.linalg.norm(text, axis=-1, keepdims=True)
    of_image = np.mean([np.sum((image[0, i] - image[1, i]) ** 2) for i in range(4)])
    of_text = np.mean([np.sum((text[0, i, k] - text[1, i, k]) ** 2) for i in range(4) for k in range(3)])
    student, teacher = ((torch.from_numpy(image[n]), torch.from_numpy(text[n])) for n in (0, 1))
    assert feature_distance(student, teacher).item() == pytest.approx((of_image + of_text) / 2)
    assert feature_distance(student, student).item() == 0


def test_distillation_is_the_public_codes_up_to_its_factor() -> None:
    """500 × (mean squared error over 512 dimensions, towers summed) is alpha = 500 · 2 / 512 here."""
    student, teacher = (tuple(F.normalize(torch.randn(8, 512), dim=-1) for _ in range(2)) for _ in range(2))
    public = 500 * sum(F.mse_loss(s, t) for s, t in zip(student, teacher, strict=True))
    assert (500 * 2 / 512 * feature_distance(student, teacher)).item() == pytest.approx(float(public), rel=1e-5)


def test_equal_embedding_sizes_need_no_projection() -> None:
    projector = Projector(dict.fromkeys(("image", "text"), (6, 6)))
    image, text = F.normalize(torch.randn(4, 6), dim=-1), F.normalize(torch.randn(4, 3, 6), dim=-1)
    assert not list(projector.parameters())
    for got, given_ in zip(projector((image, text)), (image, text), strict=True):
        torch.testing.assert_close(got, given_)


@pytest.mark.parametrize(("student", "teacher"), [(8, 5), (5, 8)])
def test_different_embedding_sizes_are_projected_by_a_trained_map_a_tower(student: int, teacher: int) -> None:
    projector = Projector(dict.fromkeys(("image", "text"), (student, teacher)))
    image, text = projector((torch.randn(4, student), torch.randn(4, 3, student)))
    assert image.shape == (4, teacher)
    assert text.shape == (4, 3, teacher)
    torch.testing.assert_close(text.norm(dim=-1), torch.ones(4, 3))
    feature_distance((image, text), (torch.ones_like(image), torch.ones_like(text))).backward()
    assert len(list(projector.parameters())) == 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in projector.parameters())


def test_a_grown_model_has_its_teachers_features_at_its_first_step() -> None:
    """The projector starts as [I ‖ 0], and growth keeps a wider embedding's first numbers."""
    teacher, student = perturb(tiny(0)), tiny(1, embed_dim=24, vision_width=24, text_width=24, text_heads=3)
    grow(teacher, student, width="centred", depth="identity")
    with torch.no_grad():
        wanted, own = ([F.normalize(x, dim=-1) for x in embeddings(model)] for model in (teacher, student))
        projected = Projector(dict.fromkeys(("image", "text"), (24, 16)))(own)
    assert feature_distance(projected, wanted) < 1e-5
    assert [projects(Task(), config(embed_dim=size), config(), 16) for size in (16, 24, 8)] == [False, True, True]


positive = st.floats(2**-20, 1024, width=32)


@given(
    st.floats(0, 1e4, width=32), st.floats(0, 4, width=32), positive, st.sampled_from([torch.float32, torch.bfloat16])
)
def test_the_capped_distillation_loss_stays_below_the_task_loss(
    alpha: float, distance: float, task: float, dtype: torch.dtype
) -> None:
    d, t = torch.tensor(distance, dtype=dtype), torch.tensor(task, dtype=dtype, requires_grad=True)
    weight = capped_alpha(alpha, d, t)
    assert not weight.requires_grad
    assert 0 <= weight.item() <= alpha
    assert weight.item() * d.item() < t.item()


def test_the_cap_binds_only_where_it_must() -> None:
    assert capped_alpha(2.0, torch.tensor(0.5), torch.tensor(3.0)).item() == 2.0
    assert capped_alpha(2.0, torch.tensor(2.0), torch.tensor(3.0)).item() == pytest.approx(CAP * 1.5)
