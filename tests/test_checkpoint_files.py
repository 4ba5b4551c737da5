"""Checkpoints as people have them on disk: read, or refused with one message; nothing in them runs or is downloaded."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
import zipfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn

import open_clip
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

import raychain
from raychain.api.grow import grow_checkpoint
from raychain.core.finite import FiniteScan, not_finite
from raychain.errors import InputError, RunFailed
from raychain.models.building import build_config
from raychain.models.checkpoints import CheckpointError, read_checkpoint
from raychain.models.registry import UnknownModelError

CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
PREPROCESSING = {"size": 16, "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2], "interpolation": "bicubic"}
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    return {name: value.clone() for name, value in build_config(deepcopy(CONFIG), seed=0).state_dict().items()}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever asks the network for anything fails the test."""

    def refuse(*_: object) -> NoReturn:
        pytest.fail("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    save_file(tensors(), path / "open_clip_model.safetensors")
    describe(path)
    return path


def describe(folder: Path, **keys: Any) -> None:
    document = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING} | keys
    (folder / "open_clip_config.json").write_text(json.dumps(document))


def vision(**keys: Any) -> dict[str, Any]:
    return {"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | keys}}


def text(**keys: Any) -> dict[str, Any]:
    return {"model_cfg": CONFIG | {"text_cfg": CONFIG["text_cfg"] | keys}}


def test_a_folder_is_read_as_open_clip_reads_it(folder: Path) -> None:
    read = read_checkpoint(folder)
    assert read.config == CONFIG
    theirs = open_clip.create_model(f"local-dir:{folder}")
    assert all(torch.equal(value, theirs.state_dict()[name]) for name, value in read.model.state_dict().items())
    assert read.model.visual.preprocess_cfg["std"] == [0.2, 0.2, 0.2]


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "a key of another version": (vision(rope_base=3), "vision_cfg.rope_base: a key that open_clip"),
    "a top-level key": ({"model_cfg": CONFIG | {"pretrained": "/etc/passwd"}}, "pretrained: a key"),
    "no object": ({"model_cfg": [CONFIG]}, "no model_cfg"),
    "tower of text": (text(width="8"), "text_cfg.width: '8'"),
    "a number for a tower": ({"model_cfg": CONFIG | {"text_cfg": 5}}, "text_cfg: 5"),
    "true for a number": (vision(layers=True), "vision_cfg.layers"),
    "null": (text(layers=None), "text_cfg.layers: None"),
    "below zero": (vision(width=-16), "1 to 65,536 allowed"),
    "endless layers": (vision(layers=10**9), "1 to 512 allowed"),
    "endless captions": (text(context_length=10**6), "2 to 8,192 allowed"),
    "no such pooling": (vision(pool_type="x", attentional_pool=True), "no model that can be built"),
    "no such block": (text(act_kwargs={"x": 1}), "no model that can be built"),
    "tokens and features": (vision(output_tokens=True), "image tower"),
    "heads of text": (text(heads=3), "no model that can be built"),
    "a trunk with weights of a hub": (vision(timm_model_name="hf-hub:timm/resnet18"), "hf-hub:timm/resnet18"),
    "a trunk in a folder": (vision(timm_model_name="local-dir:/tmp"), "local-dir:/tmp"),
    "an unknown trunk": (vision(timm_model_name="resnet_of_next_year"), "resnet_of_next_year"),
    "a hub's text tower": (text(hf_model_name="a/b", hf_model_pretrained=True), "must be downloaded"),
    "a hub's tokenizer": (text(hf_tokenizer_name="a/b"), "must be downloaded"),
    "a tokenizer's file": (text(tokenizer_kwargs={"bpe_path": "/dev/zero"}), "bpe_path"),
    "a tokenizer's data": (text(tokenizer_kwargs={"reduction_mask": "syntax"}), "reduction_mask"),
    "special tokens": (text(tokenizer_kwargs={"additional_special_tokens": ["("]}), "tokenizer"),
    "few tokens": (text(vocab_size=100), "vocab_size"),
    "a list of preprocessing": ({"preprocess_cfg": [1]}, "preprocess_cfg is a list"),
    "one mean": ({"preprocess_cfg": {"mean": [0.5]}}, "preprocess_cfg.mean: 1 numbers"),
    "mean of text": ({"preprocess_cfg": {"mean": ["a", "b", "c"]}}, "preprocess_cfg.mean"),
    "no deviation": ({"preprocess_cfg": {"std": [1, 1, 0]}}, "preprocess_cfg.std"),
    "grey": ({"preprocess_cfg": {"mode": "L"}}, "preprocess_cfg.mode"),
    "a key of preprocessing": ({"preprocess_cfg": {"gamma": 2.2}}, "preprocess_cfg.gamma"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_cannot_be_used_are_one_message(case: str, folder: Path, tmp_path: Path) -> None:
    keys, says = CONFIGS[case]
    describe(folder, **keys)
    for command in (
        lambda: raychain.evaluate(str(folder), "none.tar", cache=str(tmp_path / "cache")),
        lambda: grow_checkpoint(folder, "CoM-micro-S", tmp_path / "grown"),
    ):
        with pytest.raises(InputError) as caught:
            command()
        assert says in str(caught.value)
        assert len(str(caught.value)) < 1500
    assert not (tmp_path / "grown").exists()


def test_a_trunk_that_wants_pretrained_weights_gets_those_of_the_file(tmp_path: Path) -> None:
    own = {"timm_model_name": "test_resnet", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    config = CONFIG | {"vision_cfg": own | {"timm_model_pretrained": True}}
    model = build_config(deepcopy(config), seed=3)
    save_file({name: value.clone() for name, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    describe(tmp_path, model_cfg=config)
    read = read_checkpoint(tmp_path)
    assert not_finite(read.model.state_dict()) is None
    assert torch.equal(read.model.visual.head.proj.weight, model.visual.head.proj.weight)


def cast(kind: torch.dtype) -> Callable[[Tensors], Tensors]:
    return lambda given: {name: value.to(kind) for name, value in given.items()}


def swap(name: str, value: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda given: given | {name: value(given[name])}


KEY = "visual.conv1.weight"
WEIGHTS: dict[str, tuple[Callable[[Tensors], Any], str]] = {
    "nothing": (lambda _: {}, "is missing"),
    "a list": (lambda given: list(given.values()), "no state dict"),
    "a tensor": (lambda given: given[KEY], "no state dict"),
    "numbers for names": (lambda given: dict(enumerate(given.values())), "no state dict"),
    "no tensors": (lambda given: dict.fromkeys(given, 1.0), "is no tensor"),
    "an optimiser's state": (
        lambda given: {"epoch": 1, "optimizer": {"state": given}},
        "its keys are epoch, optimizer",
    ),
    "one missing": (lambda given: {n: v for n, v in given.items() if n != KEY}, "is missing"),
    "one more": (lambda given: given | {"visual.extra": given[KEY]}, "no visual.extra"),
    "another shape": (swap(KEY, lambda value: value[:4]), "has shape (4, 3, 8, 8)"),
    "endless shape": (swap(KEY, lambda value: value[:1, :1, :1, :1].expand(2**20, 2**20, 1, 1)), "has shape"),
    "a list for the logit scale": (swap("logit_scale", lambda value: value.expand(3)), "logit_scale has shape (3,)"),
    "whole numbers": (swap(KEY, lambda value: value.to(torch.int8)), "is int8"),
    "complex": (swap(KEY, lambda value: value.to(torch.complex64)), "is complex64"),
    "sparse": (swap(KEY, lambda value: value.to_sparse()), "plain numbers"),
    "meta": (swap(KEY, lambda value: value.to("meta")), "plain numbers"),
    "quantised": (swap(KEY, lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8)), "plain numbers"),
    "nested": (swap(KEY, lambda v: torch.nested.as_nested_tensor([v, v[:1]])), "plain numbers"),
    "all NaN": (lambda given: {n: v * float("nan") for n, v in given.items()}, "tensors are not finite, first "),
    "one infinity": (swap(KEY, lambda value: value.index_fill(0, torch.tensor(3), torch.inf)), f"first {KEY}"),
    "too large for fp32": (
        swap(KEY, lambda value: value.double() * 1e300),
        f"tensors are not finite, first {KEY}",
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
@pytest.mark.filterwarnings("ignore")  # of nested and quantised tensors, while the test makes them
def test_tensors_that_are_not_the_models_are_one_message(case: str, folder: Path) -> None:
    change, says = WEIGHTS[case]
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(change(tensors()), folder / "model.pt")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(folder)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 1000


WRAPPED: dict[str, Callable[[Tensors], Any]] = {
    "plain": lambda given: given,
    "half": cast(torch.float16),
    "bfloat16": cast(torch.bfloat16),
    "double": cast(torch.float64),
    "state_dict": lambda given: {"epoch": 3, "state_dict": given},
    "model": lambda given: {"model": given, "optimizer": {}},
    "DDP": lambda given: {"state_dict": {f"module.{name}": value for name, value in given.items()}},
    "compiled": lambda given: {f"_orig_mod.{name}": value for name, value in given.items()},
    "DDP of compiled": lambda given: {f"module._orig_mod.{name}": value for name, value in given.items()},
    "scale in a list": swap("logit_scale", lambda value: value.reshape(1)),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_the_ways_in_which_people_keep_weights_are_read(case: str, folder: Path) -> None:
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(WRAPPED[case](tensors()), folder / "model.pt")
    read = read_checkpoint(folder).model.state_dict()
    assert all(value.dtype == torch.float32 for value in read.values())
    for name, value in tensors().items():
        torch.testing.assert_close(read[name], value, rtol=0.01, atol=0.01)


def test_an_average_of_torchs_is_read(folder: Path) -> None:
    model = build_config(deepcopy(CONFIG), seed=0)
    average = AveragedModel(model)
    average.update_parameters(model)
    (folder / "open_clip_model.safetensors").unlink()
    torch.save(average.state_dict(), folder / "ema.pt")
    assert torch.equal(read_checkpoint(folder).model.visual.proj, model.visual.proj)


def header(length: int, content: bytes = b"") -> bytes:
    return struct.pack("<Q", length) + content


def bomb(path: Path) -> None:
    """A zip file of some kilobytes that unpacks to 64 MB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("model/data/0", "w") as entry:
        for _ in range(64):
            entry.write(bytes(2**20))


def script(path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))


FILES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "empty": ("open_clip_model.safetensors", lambda path: path.write_bytes(b"")),
    "noise": ("open_clip_model.safetensors", lambda path: path.write_bytes(bytes(range(256)) * 40)),
    "truncated": ("open_clip_model.safetensors", lambda path: os.truncate(path, path.stat().st_size // 2)),
    "long header": ("open_clip_model.safetensors", lambda path: path.write_bytes(header(2**62))),
    "header longer than the file": ("open_clip_model.safetensors", lambda path: path.write_bytes(header(2**20, b"{}"))),
    "header of garbage": ("open_clip_model.safetensors", lambda path: path.write_bytes(header(4, b"[[[["))),
    "a type of its own": (
        "open_clip_model.safetensors",
        lambda path: path.write_bytes(
            header(55, b'{"logit_scale":{"dtype":"Q9","shape":[],"data_offsets":[0,4]}}'[:55])
        ),
    ),
    "a page": ("model.pt", lambda path: path.write_bytes(b"<html>404</html>")),
    "an empty pt": ("model.pt", lambda path: path.write_bytes(b"")),
    "half a zip": ("model.pt", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(100))),
    "a zip bomb": ("model.pt", bomb),
    "TorchScript": ("model.pt", script),
    "a pipe": ("model.pt", os.mkfifo),
    "a folder": ("model.pt", Path.mkdir),
    "a device": ("model.pt", lambda path: path.symlink_to("/dev/zero")),
    "a link to itself": ("model.pt", lambda path: path.symlink_to(path)),
}


@pytest.mark.parametrize("case", FILES)
def test_files_of_other_kinds_are_one_message_within_seconds(case: str, folder: Path, recwarn) -> None:
    name, make = FILES[case]
    if name.endswith(".pt"):
        (folder / "open_clip_model.safetensors").unlink()
    make(folder / name)
    recwarn.clear()
    for path in (folder, folder / name):
        started = time.process_time()
        with pytest.raises(CheckpointError) as caught:
            read_checkpoint(path)
        assert len(str(caught.value)) < 1000
        assert time.process_time() - started < 10
    assert not recwarn.list


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda path: path.write_bytes(b" " * 2**21)])
def test_configs_that_are_no_small_files_are_one_message(make: Callable[[Path], Any], folder: Path) -> None:
    (folder / "open_clip_config.json").unlink()
    make(folder / "open_clip_config.json")
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize("path", ["/dev/zero", "/dev/null", "~nobody-of-that-name/x", "a\0b", "x" * 5000, "none"])
def test_paths_that_are_no_files_are_one_message(path: str) -> None:
    with pytest.raises(CheckpointError):
        read_checkpoint(path)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=8),
    st.sampled_from([0, 1, 2, 8, 16, 224, "", "avg", "tok", "none", "resnet18", "test_vit", "hf-hub:a/b", "linear"]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=3)
)
KNOWN = [
    (tower, field)
    for tower, kind in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg))
    for field in kind.__dataclass_fields__
]
SCALAR_KEYS = ("quick_gelu", "init_logit_bias", "init_logit_scale", "nonscalar_logit_scale", "cast_dtype")
TOP = [("", key) for key in ("embed_dim", "vision_cfg", "text_cfg", "custom_text", "multimodal_cfg", *SCALAR_KEYS)]
BESIDE = [("preprocess_cfg", key) for key in (*PREPROCESSING, "mode", "resize_mode", "fill_color", "other")]


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """A valid open_clip_config.json with up to three keys added, changed or taken away."""
    document: dict[str, Any] = {"model_cfg": deepcopy(CONFIG), "preprocess_cfg": dict(PREPROCESSING)}
    for part, key in draw(st.lists(st.sampled_from([*KNOWN, *TOP, *BESIDE]), min_size=1, max_size=3)):
        target = document[part] if part == "preprocess_cfg" else document["model_cfg"]
        target = target.get(part, {}) if part in ("vision_cfg", "text_cfg") else target
        if not isinstance(target, dict):
            continue
        if draw(st.integers(0, 9)):
            target[key] = draw(VALUES)
        else:
            target.pop(key, None)
    return document


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("mutated")
    save_file(tensors(), path / "open_clip_model.safetensors")
    return path


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(mutated())
@example({"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": [16, 16]}}})
@example({"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"patch_size": None}}})
@example({"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": [{}, [1]]}}})
@example({"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"image_size": [16, 24]}}})
@example({"model_cfg": CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": [1, 1, 1, 1]}}})
@example({"model_cfg": CONFIG | {"text_cfg": CONFIG["text_cfg"] | {"embed_cls": True}}})
@example({"model_cfg": CONFIG | {"custom_text": True}})
def test_a_config_of_any_content_is_used_or_refused(shared: Path, document: dict[str, Any]) -> None:
    """Where it is used, pictures and captions can be encoded."""
    (shared / "open_clip_config.json").write_text(json.dumps(document))
    started = time.process_time()
    refusal, model = "", None
    try:
        model = read_checkpoint(shared).model.eval()
    except (CheckpointError, UnknownModelError) as error:
        refusal = str(error)
    if model is not None:
        size = model.visual.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        with torch.no_grad():
            assert model.encode_image(torch.zeros(2, 3, height, width)).shape == (2, 8)
            assert model.encode_text(torch.ones(2, model.context_length, dtype=torch.long)).shape == (2, 8)
    assert (model is None) == (0 < len(refusal) < 1000)
    assert time.process_time() - started < 10


def test_features_that_overflow_have_no_accuracy(folder: Path, demo: Path, tmp_path: Path) -> None:
    """The weights are finite, what comes of them is not."""
    huge = swap("visual.proj", lambda value: torch.full_like(value, 3e38))(tensors())
    save_file(huge, folder / "open_clip_model.safetensors")
    with pytest.raises(RunFailed, match="not finite"):
        raychain.evaluate(str(folder), str(demo / "zero_shot" / "test"), cache=str(tmp_path / "cache"))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 39), st.sampled_from([torch.nan, torch.inf, -torch.inf])),
             max_size=3),
    st.lists(st.integers(1, 97), min_size=1, max_size=4),
)  # fmt: skip
def test_a_file_that_passes_by_is_finite_exactly_when_its_tensors_are(sizes, spoilt, pieces) -> None:
    """However its bytes are cut, and whatever whole numbers stand between the others."""
    from safetensors.torch import save

    held = {f"t{i}": torch.linspace(-1, 1, size) for i, size in enumerate(sizes)}
    held["count"] = torch.tensor([0x7F800000, -1, 0x7FC000007FC00000])  # as bytes, infinity and NaN of 32 bits
    for which, place, value in spoilt:
        if which < len(sizes) and place < sizes[which]:
            held[f"t{which}"][place] = value
    content, scan, at, turn = save(held), FiniteScan(), 0, 0
    while at < len(content):
        scan.feed(content[at : at + pieces[turn % len(pieces)]])
        at, turn = at + pieces[turn % len(pieces)], turn + 1
    assert scan.problem == not_finite(held)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff" * 100, header(5, b"[1,2]") + bytes(50), header(2**63, b"x")])
def test_a_file_of_another_kind_that_passes_by_has_nothing_to_find(content: bytes) -> None:
    scan = FiniteScan()
    scan.feed(content)
    assert scan.problem is None
