"""Models that are made between two known ones: sizes, growth, names, and how runs, plans and searches use them."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import yaml
from growing import config as tiny_config
from growing import cosine, embeddings, perturb, relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import raychain
from raychain import plan
from raychain.config import opened
from raychain.config.loading import validate
from raychain.errors import InputError
from raychain.growth import grow
from raychain.models import model_config, model_names
from raychain.models.building import build_config
from raychain.models.configs import check_config
from raychain.models.generation import GenerationError, between, image_params, name_between, sizes
from raychain.models.registry import use_models
from raychain.paradigms import make_paradigm, model_size
from raychain.paradigms.generating import generated_models
from raychain.paradigms.siglip import SigLipTask
from raychain.paradigms.task import Task
from raychain.runs.checks import check_chain
from raychain.runs.resolve import make_task
from raychain.schema.generate import Generate
from raychain.searching.space import make_space
from raychain.training.artifact import write_artifact

VIT, MICRO = ("CoM-ViT-T-16", "CoM-ViT-L-16"), ("CoM-micro-S", "CoM-micro-L")
BETWEEN_MICRO = {"between": list(MICRO), "ratios": [2, 4], "head_dim": 32}


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    yield
    use_models(None)


def twenty(small: str, large: str) -> list[float]:
    """Twenty ratios, evenly spread by their logarithms, below that of the two models."""
    sizes = [model_size(Task(), name).principal_params for name in (small, large)]
    return [(sizes[1] / sizes[0]) ** (i / 21) for i in range(1, 21)]


def counted(config: dict[str, Any]) -> int:
    """Parameters of the image tower as open_clip builds it."""
    return sum(parameter.numel() for parameter in build_config(config, seed=0, device="meta").visual.parameters())


@pytest.mark.parametrize(("small", "large"), [VIT, MICRO, ("CoM-ViT-T-16", "CoM-ViT-BL-16")])
def test_twenty_ratios_are_met_within_five_per_cent_by_models_of_whole_heads(small: str, large: str) -> None:
    ends = model_config(small), model_config(large)
    low, high = (sizes(config) for config in ends)
    made = [between(*ends, ratio) for ratio in twenty(small, large)]
    for config, ratio in zip(made, twenty(small, large), strict=True):
        own = sizes(config)
        assert counted(config) == image_params(config, own)
        assert counted(config) / counted(ends[0]) == pytest.approx(ratio, rel=0.05)
        assert own.image.width % low.image.head == own.text.width % low.text.head == 0
        for a, b, c in ((low.image, own.image, high.image), (low.text, own.text, high.text)):
            assert a.width <= b.width <= c.width
            assert a.layers <= b.layers <= c.layers
            assert a.hidden <= b.hidden <= c.hidden
        assert own.image.head == low.image.head
        check_config(config)
    assert len({name_between(small, large, ends, config) for config in made}) == 20


def shortened(config: dict[str, Any], **vision: Any) -> dict[str, Any]:
    """The same widths and heads; a twelfth of a ViT's layers, few words and pixels."""
    found = deepcopy(config)
    fewer = 12 if found["vision_cfg"]["layers"] >= 12 else 1
    found["vision_cfg"].update(
        layers=-(-found["vision_cfg"]["layers"] // fewer), image_size=32, patch_size=16, **vision
    )
    found["text_cfg"].update(layers=-(-found["text_cfg"]["layers"] // fewer), vocab_size=64, context_length=8)
    return found


def drift(small: dict[str, Any], large: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Relative error and cosine of both embeddings after growth, in float64."""
    before, after = perturb(build_config(small, seed=0).double()), build_config(large, seed=1).double()
    grow(before, after, width="centred", depth="identity")
    towers = zip(("image", "text"), embeddings(after), embeddings(before), strict=True)
    return {tower: (relative_error(grown, own), cosine(grown, own)) for tower, grown, own in towers}


@pytest.mark.parametrize(("small", "large"), [VIT, MICRO])
def test_growth_into_and_out_of_each_of_twenty_models_is_exact(small: str, large: str) -> None:
    ends = model_config(small), model_config(large)
    for ratio in twenty(small, large):
        made = between(*ends, ratio)
        for pair in ((ends[0], made), (made, ends[1])):
            plain = drift(*(shortened(c, no_ln_pre=True) for c in pair))
            assert max(error for error, _ in plain.values()) < 1e-12
        with_ln_pre = drift(shortened(ends[0]), shortened(made))
        assert with_ln_pre["text"][0] < 1e-12
        assert with_ln_pre["image"][1] > 1 - 1e-6


@pytest.mark.parametrize(("small", "large", "ratio"), [(*VIT, 3.0), (*MICRO, 2.0)])
def test_growth_along_a_ladder_is_exact(small: str, large: str, ratio: float) -> None:
    names = generated_models(Task(), Generate(between=(small, large), ratios=(ratio,)), "generate")
    assert names[0] == small
    assert names[-1] == large
    assert len(names) > 3
    configs = [model_config(name) for name in names]
    for pair in itertools.pairwise(configs):
        assert max(error for error, _ in drift(*(shortened(c, no_ln_pre=True) for c in pair)).values()) < 1e-12


@st.composite
def any_ends(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    head = draw(st.sampled_from([8, 16, 64]))
    common = {
        "vision_no_ln_pre": draw(st.booleans()),
        "vision_ls_init_value": draw(st.sampled_from([None, 0.1])),
        "vision_pool_type": draw(st.sampled_from(["tok", "avg"])),
        "vision_head_width": head,
    }
    small, large = dict(common), dict(common)
    for tower in ("vision", "text"):
        heads, layers = draw(st.integers(1, 6)), draw(st.integers(1, 6))
        more, deeper = draw(st.integers(0, 8)), draw(st.integers(0, 8))
        for config, count, depth in ((small, heads, layers), (large, heads + more, layers + deeper)):
            config.update({f"{tower}_width": count * head, f"{tower}_layers": depth})
            config.update({"text_heads": count} if tower == "text" else {})
    large["embed_dim"] = draw(st.sampled_from([8, 16, 24, 48]))
    return tiny_config(**small), tiny_config(**large)


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(ends=any_ends(), share=st.floats(0.05, 0.95))
def test_between_any_two_models_the_ratio_is_met_or_refused(
    ends: tuple[dict[str, Any], dict[str, Any]], share: float
) -> None:
    before = deepcopy(ends)
    most = counted(ends[1]) / counted(ends[0])
    ratio = most**share
    if ratio <= 1.01:
        return
    try:
        made = between(*ends, ratio)
    except GenerationError as error:
        found = error
    else:
        found = None
    if found:
        assert found.option == "ratios"
        return
    assert ends == before
    assert made == between(*ends, ratio)
    assert counted(made) / counted(ends[0]) == pytest.approx(ratio, rel=0.05)
    for small, large in ((ends[0], made), (made, ends[1])):
        models = [build_config(config, seed=0, device="meta") for config in (small, large)]
        from raychain.growth import check

        check(*models, width="centred", depth="identity")


def test_names_say_the_sizes_and_configs_that_raychain_has_keep_its_names() -> None:
    ask = {"between": ("CoM-ViT-T-16", "CoM-ViT-B-16"), "ratios": (2.0, 4.0)}
    names = generated_models(Task(), Generate.model_validate(ask), "generate")
    assert names == ("CoM-ViT-T-16", "CoM-ViT-w256-d12-m4.875-t320-16", "CoM-ViT-S-16", "CoM-ViT-w576-d12-m3.5-t448-16",
                     "CoM-ViT-B-16")  # fmt: skip
    assert sizes(model_config(names[1])).image == (256, 12, 4.875, 64)


def test_what_is_made_does_not_change_from_version_to_version() -> None:
    """Names in a best.yaml or a chain are made anew: they have to come again."""
    names = generated_models(Task(), Generate(between=VIT, ratios=(2.0, 3.0, 4.0), head_dim=64), "generate")
    assert names == (
        "CoM-ViT-T-16",
        "CoM-ViT-w256-d14-t320-16",
        "CoM-ViT-w320-d13-t320-16",
        "CoM-ViT-w320-d18-t384-16",
        "CoM-ViT-w448-d18-t448-16",
        "CoM-ViT-w512-d16-t448-16",
        "CoM-ViT-w640-d18-t576-16",
        "CoM-ViT-w768-d21-t640-16",
        "CoM-ViT-w832-d22-t640-16",
        "CoM-ViT-L-16",
    )
    micro = generated_models(Task(), Generate(between=MICRO, ratios=(2.0, 3.0)), "generate")
    assert micro == (
        "CoM-micro-S",
        "CoM-micro-w96-d2-m3.625-t96-td2",
        "CoM-micro-w96-d3-t96-td3",
        "CoM-micro-w96-d3-m5.875-t128-td3",
        "CoM-micro-w160-d3-t160-td3",
        "CoM-micro-L",
    )


def test_a_stage_folder_of_a_generated_model_loads_in_open_clip(tmp_path: Path) -> None:
    for paradigm in (make_paradigm(Task()), make_paradigm(SigLipTask(paradigm="siglip"))):
        name = paradigm.between(*MICRO, 3.0)
        config, folder = paradigm.config(name), tmp_path / paradigm.name
        folder.mkdir()
        write_artifact(folder, paradigm, paradigm.build(config, size=40, seed=0), config, 40)
        model = open_clip.create_model(f"local-dir:{folder}")
        assert model.visual.conv1.out_channels == config["vision_cfg"]["width"]
        assert model.visual.transformer.resblocks[0].mlp.c_fc.out_features == sizes(dict(config)).image.hidden
        assert torch.isfinite(model.encode_image(torch.randn(1, 3, 40, 40))).all()
        assert (getattr(model, "logit_bias", None) is not None) == (paradigm.name == "siglip")


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown": ({"between": ["CoM-micro-X", "CoM-micro-L"]}, "generate.between", "CoM-micro-L"),
    "the larger first": (
        {"between": ["CoM-micro-L", "CoM-micro-S"]},
        "generate.between",
        "write the smaller one first",
    ),
    "one model": ({"between": ["CoM-micro-L"]}, "generate.0.between.1", "this key is required"),
    "Swin": ({"between": ["CoM-Swin-T", "CoM-Swin-L"]}, "generate.between", "timm_model_name"),
    "a ResNet": ({"between": ["RN50", "RN50x64"]}, "generate.between", "of a ResNet"),
    "families": ({"between": ["CoM-micro-S", "CoM-ViT-L-16"]}, "generate.between", "they differ in"),
    "heads": ({"between": ["CoM-micro-S", "CoM-micro-L"], "head_dim": 64}, "generate.head_dim", "leave it out"),
    "too large": ({"ratios": [2, 99]}, "generate.ratios", "ratios below 15.5"),
    "too small": ({"ratios": [1.01]}, "generate.0.ratios.0", "greater than or equal to 1.1"),
    "not to be met": ({"between": ["CoM-micro-S", "CoM-micro-M"], "ratios": [1.15, 1.9]}, "generate.ratios", "nearest"),
    "a key": ({"ratio": 3}, "generate.0.ratio", "ratios"),
}


def tree(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "made",
        "data": {"train": "nowhere/{0..3}.tar", "samples": 16_000},
        "train": {"global_batch": 128, "warmup": "10 %"},
        "evaluate": {"zero_shot": "nowhere"},
    }
    return base | changes


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_made_is_one_message(case: str) -> None:
    ask, where, says = WRONG[case]
    with pytest.raises(InputError) as error:
        opened(validate(tree(generate=BETWEEN_MICRO | {"head_dim": None} | ask)))
    assert where in str(error.value)
    assert says in str(error.value)
    assert not error.value.args[4:]


def test_a_paradigm_without_a_rule_refuses() -> None:
    from raychain.paradigms.base import Paradigm

    class Plain(Paradigm):
        name = "plain"

    Plain.__abstractmethods__ = frozenset()
    with pytest.raises(GenerationError, match="plain has not"):
        Plain(Task()).between("a", "b", 2.0)  # type: ignore[abstract]


def test_a_users_model_of_the_same_name_is_kept_apart(tmp_path: Path) -> None:
    name = generated_models(Task(), Generate(between=MICRO, ratios=(3.0,)), "generate")[1]
    config = model_config(name)
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    same = opened(validate(tree(generate=BETWEEN_MICRO | {"ratios": [3]}, models=str(tmp_path))))
    assert name in (same.family or ())
    (tmp_path / f"{name}.json").write_text(json.dumps(config | {"quick_gelu": True}))
    with pytest.raises(InputError, match="rename a config of `models`"):
        opened(validate(tree(generate=BETWEEN_MICRO | {"ratios": [3]}, models=str(tmp_path))))


def test_the_planner_proposes_chains_of_generated_models() -> None:
    made = plan(validate(tree(generate={"between": list(VIT), "ratios": [2, 3, 4]})))
    models = [stage["model"] for stage in made["stages"]]
    assert models[-1] == "CoM-ViT-L-16"
    assert any("-w" in model for model in models)
    assert all(2 <= stage["expansion_ratio"] <= 4.1 for stage in made["stages"][1:])
    named = plan(validate(tree(family=[*models], generate={"between": list(VIT), "ratios": [2, 3, 4]})))
    assert named["stages"] == made["stages"]
    check_chain(opened(validate(tree(generate={"between": list(VIT), "ratios": [2, 3, 4]}, chain=[
        {"model": stage["model"], "epochs": stage["epochs"]} for stage in made["stages"]]))))  # fmt: skip


def test_chains_of_models_that_do_not_grow_are_left_out_of_plans_and_searches() -> None:
    """Of twelve models between T and B, some are narrower than a smaller one's MLPs."""
    ask = {"between": ["CoM-ViT-T-16", "CoM-ViT-B-16"], "ratios": [1.5, 2, 3]}
    made = plan(validate(tree(generate=ask)))
    check_chain(opened(validate(tree(generate=ask, chain=[
        {"model": stage["model"], "epochs": stage["epochs"]} for stage in made["stages"]]))))  # fmt: skip
    space = make_space(opened(validate(tree(search={"space": {"generate": ask, "lengths": [3]}}, generate=[]) | {
        "chain": [{"model": "CoM-ViT-T-16", "epochs": 4}, {"model": "CoM-ViT-B-16", "epochs": 2}]})))  # fmt: skip
    assert 0 < len(space.chains) < math.comb(len(space.sizes) - 1, 2)
    with pytest.raises(InputError, match="grow into one another"):
        plan(validate(tree(generate=ask, allocation={"all_models": True})))


def test_keys_hold_the_config_and_not_the_name(demo: Path, tmp_path: Path) -> None:
    name = generated_models(Task(), Generate(between=MICRO, ratios=(3.0,)), "generate")[1]
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.json").write_text(json.dumps(model_config(name)))
    (folder / "other.json").write_text(json.dumps(model_config(name) | {"quick_gelu": True}))
    base = tree(data={"train": str(demo / "train")}, preload={"cache": str(tmp_path / "cache")})
    base |= {"evaluate": {}, "storage": str(tmp_path / "runs")}

    def keys(middle: str, **options: Any) -> list[str]:
        chain = [{"model": m, "epochs": 1} for m in ("CoM-micro-S", middle, "CoM-micro-L")]
        experiment = opened(validate(base | {"chain": chain} | options))
        check_chain(experiment)
        return [stage.key for stage in make_task(experiment, str(tmp_path / "out")).stages]

    made = keys(name, generate=BETWEEN_MICRO | {"ratios": [3]})
    assert made == keys("mine", models=str(folder))
    assert made == keys(name, generate=BETWEEN_MICRO | {"ratios": [2, 3, 5]})
    assert made[0] == keys("other", models=str(folder))[0]
    assert made[1:] != keys("other", models=str(folder))[1:]


def test_a_search_tries_them_and_its_best_chain_is_an_experiment_that_knows_them() -> None:
    chain = [{"model": m, "epochs": 2} for m in MICRO]
    given = tree(chain=chain, search={"space": {"generate": BETWEEN_MICRO}})
    space = make_space(opened(validate(given)))
    names = [size.name for size in space.sizes]
    assert (names[0], names[-1]) == MICRO
    assert len(names) == 5
    assert len(space.chains) == 2 ** (len(names) - 1) - 1
    point = next(p for p in space.points() if any("-w" in model for model in str(p["chain"]).split(" → ")))
    written = yaml.safe_load(yaml.safe_dump(space.chosen(point).model_dump(mode="json", exclude_unset=True)))
    use_models(None)
    best = opened(validate({key: value for key, value in written.items() if value is not None}))
    assert {stage.model for stage in best.chain} <= set(model_names())
    check_chain(best)
    beside = make_space(opened(validate(tree(chain=chain, search={"space": {"generate": BETWEEN_MICRO,
                                                                            "models": "CoM-micro-M"}}))))  # fmt: skip
    assert {size.name for size in beside.sizes} == {*names, "CoM-micro-M"}


@pytest.mark.long
def test_a_search_trains_a_chain_with_a_generated_model_and_its_best_chain_runs_alone(
    ray_session: None, tree: dict[str, Any], tmp_path: Path
) -> None:
    """Workers know it by its configuration, its stage folder is open_clip's, and best.yaml makes it anew."""
    space = {"generate": {"between": list(MICRO), "ratios": 4}, "lengths": [3], "alpha": [0, 2]}
    space |= {"split": {"total": "60 %", "shares": 1}}
    chain = [{"model": model, "epochs": "8 steps"} for model in MICRO]
    search = {"trials": 2, "space": space, "controls": None, "sampler": "grid", "seeds": 0}
    evaluate = {"zero_shot": tree["evaluate"]["zero_shot"]}
    baseline = {"model": "CoM-micro-L", "epochs": "40 steps"}
    raychain.search(validate(tree | {"chain": chain, "search": search, "evaluate": evaluate, "baseline": baseline}))
    out = Path(tree["storage"]) / f"{tree['name']}-search"
    result = json.loads((out / "search.json").read_text())
    assert [trial["status"] for trial in result["trials"]] == ["succeeded"] * 2
    made = "CoM-micro-w96-d3-m5.875-t128-td3"
    assert [stage["model"] for stage in result["best"]["chain"]] == [MICRO[0], made, MICRO[1]]
    use_models(None)
    best = raychain.run(str(out / "best.yaml"))
    assert [stage["key"] for stage in best["stages"]] == result["best"]["keys"]
    assert {stage["status"] for stage in best["stages"]} <= {"reused", "shared"}
    folder = Path(tree["storage"]) / f"{tree['name']}-best" / "stages" / f"1-{made}"
    assert open_clip.create_model(f"local-dir:{folder}").visual.conv1.out_channels == 96
