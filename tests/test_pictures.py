"""Pictures of odd shapes, depths and modes: in bounded memory, to the bit where they must be, never silently white."""

import io
import json
import logging
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_broken_shards import pair, shard_of, surveyed
from test_feed import SIZE, WANTED, numbers
from typer.testing import CliRunner

from raychain.cli.data import data
from raychain.data import health, pixels
from raychain.data.cache import ShardCache
from raychain.data.decode import resize, resize_exactly, shorter_to
from raychain.data.health import Unusable, picture
from raychain.data.pictures import PictureReader
from raychain.data.pixels import Frame, framed
from raychain.data.spec import Resizing, Spec
from raychain.evaluators.reading import tables

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning", "ignore:Palette images")


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(width: int, height: int, colour: int = 2, depth: int = 8, rows: int = 0) -> bytes:
    """A PNG of zeros that says it has this size, with `rows` rows of data."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    channels = {0: 1, 2: 3, 6: 4}[colour]
    content = zlib.compress(bytes(1 + width * channels * depth // 8) * rows)
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b"")


# Size


sides = st.one_of(st.integers(1, 9), st.integers(1, 90), st.integers(1, 700))


@given(
    sides,
    sides,
    st.sampled_from([8, 33]),
    st.sampled_from(["bicubic", "bilinear"]),
    st.booleans(),
    st.integers(1, 4000),
)
@settings(max_examples=150, deadline=None)
def test_a_picture_resized_in_pieces_is_pillows_to_the_bit(
    width: int, height: int, size: int, kernel: str, squash: bool, piece: int
) -> None:
    image = noise(width, height, seed=width)
    across, down = (size, size) if squash else shorter_to(width, height, size)
    frame = Frame(across, down, round((across - size) / 2), round((down - size) / 2), size, size)
    whole = framed(image, frame, kernel)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pixels, "LARGE", 0)
        patch.setattr(pixels, "PIECE", piece)
        assert np.array_equal(framed(image, frame, kernel), whole)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
@pytest.mark.parametrize("exactly", [True, False])
def test_pieces_of_any_mode_are_converted_as_the_whole(
    mode: str, exactly: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(90, 50)
    odd = (
        Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
        if mode == "I;16"
        else image.convert(mode)
    )
    content = encoded(odd)
    opened = [Image.open(io.BytesIO(content)) for _ in range(2)]
    frame = Frame(36, 20, 8, 0, 20, 20)
    whole = framed(opened[0], frame, exactly=exactly)
    monkeypatch.setattr(pixels, "LARGE", 100)
    monkeypatch.setattr(pixels, "PIECE", 64)
    assert np.array_equal(framed(opened[1], frame, exactly=exactly), whole)


@pytest.mark.parametrize("shape", [(3000, 2), (2, 3000), (1, 700), (700, 1), (999, 31)])
def test_a_long_picture_is_open_clips_to_the_bit(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from open_clip.transform import PreprocessCfg, image_transform_v2

    image = noise(*shape)
    config = PreprocessCfg(size=40, mean=(0, 0, 0), std=(1, 1, 1))
    theirs = image_transform_v2(config, is_train=False)(image)
    monkeypatch.setattr(pixels, "LARGE", 4000)
    ours = resize_exactly(encoded(image), 40, Resizing())
    assert torch.equal(torch.from_numpy(ours).permute(2, 0, 1) / 255, theirs)
    quick = resize(encoded(image), 40)
    assert np.abs(quick.astype(int) - ours).max() <= 1


HOSTILE = """
import io, resource, sys
from PIL import Image
from raychain.data.decode import resize, resize_exactly
from raychain.data.spec import Resizing
from test_pictures import encoded, png
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for content in (
    png(65_000, 1, rows=1), png(1, 65_000, colour=6, rows=65_000), png(9_000_000, 1, colour=0, rows=1),
    png(2_000_000, 1, colour=0, depth=16, rows=1), encoded(Image.new("L", (65_000, 1)), "JPEG"),
    encoded(Image.new("RGB", (3, 16_000)), "WEBP"), png(100_000, 340, rows=340), png(5_800, 5_800, 0, rows=5_800),
):
    assert resize_exactly(content, 224, Resizing()).shape == (224, 224, 3)
    assert resize(content, 224).shape == (224, 224, 3)
    assert resize(content, 224, whole=True).size <= 3 * 2**25
assert resize_exactly(png(100_000, 9, rows=9), 64, Resizing(squash=True)).shape == (64, 64, 3)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
sys.exit(f"{(peak - before) / 1024:.0f} MiB" if peak - before > 700 * 1024 else 0)
"""


def test_no_picture_takes_more_than_a_few_hundred_megabytes() -> None:
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    run = subprocess.run([sys.executable, "-c", HOSTILE], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


LARGE_WEBP = re.sub(
    rb"(?<=VP8L.{5})....",
    struct.pack("<I", 5_999 | 5_999 << 14),
    encoded(noise(8, 8), "WEBP", lossless=True),
    flags=re.DOTALL,
)
"""It says that it has 6,000 × 6,000 pixels."""


@pytest.mark.parametrize(
    "content",
    [
        png(12_000, 12_000),
        png(12_000, 12_000, colour=6),
        png(13_300, 13_300),
        png(2_000_000_000, 1),
        LARGE_WEBP,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
    ],
    ids=["rgb", "rgba", "Pillow's limit", "wide", "webp", "PostScript"],
)  # fmt: skip
def test_what_would_take_more_is_refused(content: bytes) -> None:
    for decoder, arguments in ((resize, (32,)), (resize_exactly, (32, Resizing()))):
        with pytest.raises(Unusable) as refused:
            picture(decoder, content, *arguments)
        assert refused.value.kind in (health.BOMB, health.UNREADABLE)


def test_progressive_coefficients_count() -> None:
    sizes = {}
    for options in ({}, {"progressive": True}, {"progressive": True, "subsampling": 0}):
        image = Image.open(io.BytesIO(encoded(noise(64, 64), "JPEG", **options)))
        sizes[len(options)] = pixels._needed(image) / 64**2
    assert sizes == {0: 4, 1: 7, 2: 10}


def test_check_and_run_agree_on_what_is_too_large(tmp_path: Path) -> None:
    more = [pair("a", png(20_000, 1, rows=1), txt=b"1 0"), pair("b", png(12_000, 12_000), txt=b"1 0")]
    path = shard_of(tmp_path / "x.tar", *more)
    result = CliRunner().invoke(data, ["check", str(path), "--json", "--workers", "1"])
    found = json.loads(result.stdout)
    assert (found["usable"], found["bad"]) == (5, {health.BOMB: 1})
    table = ShardCache(tmp_path / "cache", 10**8).table(
        surveyed(path), PictureReader(Spec(WANTED, SIZE, "numbers"), numbers)
    )
    assert (table.size, table.bad.counts) == (5, {health.BOMB: 1})


# Depth and modes


RAMP = np.linspace(0, 65_535, 64 * 64).reshape(64, 64).astype(np.uint16)


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(RAMP)),
        encoded(Image.fromarray(RAMP), "TIFF"),
        encoded(Image.fromarray(RAMP.astype(np.int32)), "PPM"),
        encoded(Image.frombytes("I;16B", (64, 64), RAMP.astype(">u2").tobytes()), "TIFF"),
    ],
    ids=["png", "tiff", "pgm", "big-endian tiff"],
)
def test_sixteen_bits_of_grey_keep_their_upper_eight(content: bytes) -> None:
    expected = np.repeat((RAMP >> 8).astype(np.uint8)[..., None], 3, 2)
    assert np.array_equal(resize(content, 64), expected)
    clipped = resize_exactly(content, 64, Resizing())
    assert np.array_equal(clipped, np.array(Image.open(io.BytesIO(content)).convert("RGB"))), "as open_clip has it"
    assert (clipped == 255).mean() > 0.9


@pytest.mark.parametrize("numbers", [np.float32, np.int32])
def test_numbers_of_unknown_range_are_refused_not_guessed(numbers: type) -> None:
    content = encoded(Image.fromarray(RAMP.astype(numbers)), "TIFF")
    with pytest.raises(Unusable, match="unknown range"):
        resize(content, 64)
    assert np.array_equal(
        resize_exactly(content, 64, Resizing()), np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    )


def test_sixteen_bit_colour_and_grey_look_alike() -> None:
    """Pillow reads 16-bit colour as its upper eight bits."""
    colour = bytearray(png(8, 8, colour=2, depth=16, rows=8))
    grey = encoded(Image.fromarray(np.full((8, 8), 0x8000, np.uint16)))
    raw = b"".join(b"\0" + b"\x80\x00" * 24 for _ in range(8))
    start = colour.index(b"IDAT") - 4
    content = zlib.compress(raw)
    body = struct.pack(">I", len(content)) + b"IDAT" + content + struct.pack(">I", zlib.crc32(b"IDAT" + content))
    end = png(1, 1)[-12:]
    assert np.array_equal(resize(bytes(colour[:start]) + body + end, 8), resize(grey, 8))


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("1", {}), ("L", {}), ("LA", {}), ("P", {}), ("RGB", {}), ("RGBA", {}), ("L", {"transparency": 9}),
        ("P", {"transparency": 3}), ("P", {"transparency": bytes(range(200))}), ("RGB", {"transparency": (1, 2, 3)}),
    ],
)  # fmt: skip
def test_other_modes_are_open_clips_colours(mode: str, options: dict[str, object]) -> None:
    content = encoded(noise(64, 64).convert(mode), **options)
    theirs = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.array_equal(resize(content, 64), theirs)
    assert np.array_equal(resize_exactly(content, 64, Resizing()), theirs)


def test_four_colours_are_converted_as_pillow_does() -> None:
    content = encoded(noise(64, 64).convert("CMYK"), "JPEG")
    theirs = np.array(Image.open(io.BytesIO(content)).convert("RGB"))
    assert np.abs(resize(content, 64).astype(int) - theirs).max() <= 1
    assert np.array_equal(resize_exactly(content, 64, Resizing()), theirs)


def scans(tmp_path: Path) -> Path:
    more = (pair("scan", encoded(Image.fromarray(RAMP)), txt=b"1 0"),
            pair("float", encoded(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), txt=b"1 0"))  # fmt: skip
    return shard_of(tmp_path / "x.tar", *more)


def test_data_check_tells_of_deep_pictures(tmp_path: Path) -> None:
    path = scans(tmp_path)
    found = json.loads(CliRunner().invoke(data, ["check", str(path), "--json", "--workers", "1"]).stdout)
    assert found["usable"] == 5
    assert (found["noted"], found["bad"]) == ({health.DEEP: 1}, {health.UNREADABLE: 1})
    assert found["noted_samples"][0]["key"] == "scan"
    table = CliRunner().invoke(data, ["check", str(path), "--workers", "1", "--max-bad-fraction", "1"])
    assert table.exit_code == 0
    assert "scan – scaled to 8 bits for training" in table.stdout


def test_measuring_says_what_it_clips_also_out_of_the_cache(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = surveyed(scans(tmp_path))
    spec = Spec(WANTED, SIZE, "numbers", exactly=Resizing())
    for _ in range(2):
        health._log.cache_clear()
        caplog.clear()
        cache = ShardCache(tmp_path / "cache", 10**8)
        with caplog.at_level(logging.WARNING, "raychain.data"):
            [(table, rows)] = tables([found], PictureReader(spec, numbers), cache, rank=0, world=1, threads=1)
        assert (table.size, len(rows), table.noted.counts) == (6, 6, {health.DEEP: 2})
        assert not table.bad
        [said] = [record.getMessage() for record in caplog.records]
        assert "2 grey of more than 8 bits: scan" in said
        assert "open_clip" in said
    trained = ShardCache(tmp_path / "cache", 10**8).table(found, PictureReader(Spec(WANTED, SIZE, "numbers"), numbers))
    assert (trained.size, trained.bad.counts, bool(trained.noted)) == (5, {health.UNREADABLE: 1}, False)
