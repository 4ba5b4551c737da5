"""MACs are the paper's: its table, its percentages of independent training, its family ratios."""

import pytest
import torchvision

from raychain.models import model_config, parameter_count
from raychain.paradigms import model_size as size_of
from raychain.paradigms.task import Task
from raychain.planning.macs import ModelSize, PartSize, stage_macs, tower_sizes

SAMPLES, ITEMS = 2_890_000, {"image": 1, "text": 7}
TABLE_G = {  # model: image tower, text tower on one caption (docs/method.md)
    "T": (1.254, 0.763),
    "C": (2.136, 1.181),
    "S": (4.599, 1.690),
    "M": (7.991, 2.289),
    "B": (17.563, 2.980),
    "BL": (30.855, 6.650),
    "L": (61.554, 6.650),
}


def model_size(model: str, image_size: int | None = None) -> ModelSize:
    return size_of(Task(), model, image_size)


def name(size: str) -> str:
    return f"CoM-ViT-{size}-16"


def chain_macs(chain: dict[str, int]) -> int:
    """Training MACs of a chain {size: epochs} in its order."""
    total, teacher = 0, None
    for size, epochs in chain.items():
        student = model_size(name(size))
        total += stage_macs(student, teacher, epochs * SAMPLES, ITEMS)
        teacher = student
    return total


@pytest.mark.parametrize("size", TABLE_G)
def test_forward_macs_are_the_papers(size: str) -> None:
    macs = model_size(name(size)).parts
    assert macs["image"].macs / 1e9 == pytest.approx(TABLE_G[size][0], rel=5e-3)
    assert macs["text"].macs / 1e9 == pytest.approx(TABLE_G[size][1], rel=5e-3)


@pytest.mark.parametrize(
    ("chain", "percent"),
    [
        ({"B": 128, "L": 14}, 47.8),
        ({"S": 128, "B": 24, "L": 15}, 35.9),
        ({"T": 128, "S": 24, "B": 19, "L": 14}, 27.6),
        ({"L": 128}, 100.0),
    ],
)
def test_chain_percentages_are_the_papers(chain: dict[str, int], percent: float) -> None:
    assert 100 * chain_macs(chain) / chain_macs({"L": 128}) == pytest.approx(percent, abs=0.1)


@pytest.mark.parametrize(
    ("chain", "ratio"),
    [
        ({"T": 128, "S": 24, "B": 19, "L": 14}, 5.68),
        ({"T": 128, "C": 24, "S": 21, "M": 18, "B": 15, "BL": 12, "L": 9}, 7.09),
    ],
)
def test_family_ratios_are_the_papers(chain: dict[str, int], ratio: float) -> None:
    independent = sum(chain_macs({size: 128}) for size in chain)
    assert independent / chain_macs(chain) == pytest.approx(ratio, abs=0.01)


def test_attention_products_are_counted() -> None:
    """A one-layer change of 12 is a twelfth of the blocks' cost by hand: 12·L·W² + 2·L²·W a layer."""
    macs = model_size(name("T")).parts["image"].macs
    length, width, layers = 197, 192, 12
    by_hand = layers * (12 * length * width**2 + 2 * length**2 * width) + 196 * 3 * 16**2 * width + width * 512
    assert macs == by_hand


def test_image_size_changes_only_the_image_tower() -> None:
    small, large = model_size("CoM-micro-S").parts, model_size("CoM-micro-S", 48).parts
    assert large["text"] == small["text"]
    assert large["image"].macs > 1.4 * small["image"].macs


def test_stage_macs_count_three_student_forwards_and_one_teacher_forward() -> None:
    student, teacher = (
        ModelSize("toy", {"image": PartSize(1, 10 * macs, 1), "text": PartSize(1, macs, 1)}, "image")
        for macs in (10, 5)
    )
    assert stage_macs(student, None, 2, ITEMS) == 2 * 3 * 170
    assert stage_macs(student, teacher, 2, ITEMS) == 2 * (3 * 170 + 85)


@pytest.mark.parametrize("model", ["CoM-micro-L", "CoM-ViT-M-16", "RN50"])
def test_one_block_stands_for_all_that_are_alike(model: str) -> None:
    size = model_size(model)
    assert tuple(size.parts.values()) == tower_sizes(model_config(model), every_layer=True)
    assert size.params == parameter_count(model)


def swin_macs_by_hand(width: int, depths: tuple[int, ...], window: int = 7, side: int = 56, out: int = 512) -> int:
    """Swin's image tower from the formulas of its paper (section 3.2), patch merging and projection included."""
    total = side**2 * 4 * 4 * 3 * width
    for stage, depth in enumerate(depths):
        tokens, channels = (side >> stage) ** 2, width << stage
        if stage:
            total += tokens * (4 * channels // 2) * channels  # merging: four neighbours of half the width, into one
        projections, mlp, products = (
            4 * tokens * channels**2,
            8 * tokens * channels**2,
            2 * window**2 * tokens * channels,
        )
        total += depth * (projections + mlp + products)
    return total + (width << (len(depths) - 1)) * out


SWIN = {"T": (96, (2, 2, 6, 2)), "S": (96, (2, 2, 18, 2)), "B": (128, (2, 2, 18, 2)), "L": (192, (2, 2, 18, 2))}


@pytest.mark.parametrize("size", SWIN)
def test_swin_macs_are_the_papers_formulas(size: str) -> None:
    """fvcore 0.1.5 counts the same matrix products to the last MAC: 4.490, 8.741, 15.430 and 34.475 G."""
    assert model_size(f"CoM-Swin-{size}").parts["image"].macs == swin_macs_by_hand(*SWIN[size])


@pytest.mark.parametrize("size", ["T", "S", "B"])
def test_swin_macs_are_what_torchvision_publishes(size: str) -> None:
    """Its models have a 1,000-class head where ours project to 512."""
    published = torchvision.models.get_model_weights(f"swin_{size.lower()}").DEFAULT.meta["_ops"]
    assert model_size(f"CoM-Swin-{size}").parts["image"].macs / 1e9 == pytest.approx(published, rel=1e-2)
