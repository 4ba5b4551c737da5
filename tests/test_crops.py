"""Random crops: where they lie, and that what lies there is what a batch holds."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raychain.data.cache import ShardCache
from raychain.data.crops import crop_boxes
from raychain.data.decode import scale
from raychain.data.device_crops import in_fp32, resized
from raychain.data.loader import Feed, Loader
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.pictures import PictureReader
from raychain.data.shards import survey
from raychain.data.spec import Representation, Spec


@given(st.integers(1, 60), st.integers(1, 60), st.floats(0.05, 1), st.integers(0, 2**64 - 1))
@settings(max_examples=100)
def test_random_crops_lie_in_the_picture_and_are_decided_by_the_seed(
    height: int, width: int, low: float, seed: int
) -> None:
    sizes = np.array([height]), np.array([width])
    [[top, left, h, w]] = boxes = crop_boxes(*sizes, (low, 1.0), np.array([seed], np.uint64))
    assert 0 <= top <= top + h <= height
    assert 0 <= left <= left + w <= width
    assert min(h, w) > 0
    np.testing.assert_array_equal(boxes, crop_boxes(*sizes, (low, 1.0), np.array([seed], np.uint64)))


def test_random_crops_cover_the_asked_share_of_the_picture() -> None:
    side = np.full(4000, 200)
    top, left, h, w = crop_boxes(side, side, (0.25, 0.5), np.arange(4000, dtype=np.uint64)).T
    areas = h * w / 200**2
    assert 0.245 < areas.min() < 0.255
    assert 0.495 < areas.max() < 0.505
    assert abs(areas.mean() - 0.375) < 0.005
    assert 0.74 < (w / h).min() < (w / h).max() < 1.35
    assert abs(np.log(w / h).mean()) < 0.01
    assert abs((top / (200 - h)).mean() - 0.5) < 0.02
    assert abs((left / (200 - w)).mean() - 0.5) < 0.02
    assert abs(np.corrcoef(top, left)[0, 1]) < 0.05


def test_a_crop_is_resized_to_the_models_size(tmp_path: Path) -> None:
    y, x = np.mgrid[0:60, 0:80].astype(np.uint8)
    picture = io.BytesIO()
    Image.fromarray(np.stack([3 * x, 4 * y, x], -1)).save(picture, "png")
    wanted = Wanted(("txt",))
    with webdataset.TarWriter(f"{tmp_path}/x.tar") as tar:
        tar.write({"__key__": "0", "png": picture.getvalue(), "txt": "1"})
    [shard] = survey([f"{tmp_path}/x.tar"], wanted, tmp_path, "data.train")
    feed = Feed(
        (shard,),
        Order((1,), seed=3),
        PictureReader(Spec(wanted, 40, "ones", True), lambda texts: np.ones((len(texts), 1)), 1, (0.25, 0.5)),
    )
    cache = ShardCache(tmp_path, 2**20)
    with Loader(feed, cache, global_batch=1, start=0, stop=20) as loader:
        crops = [batch["images"][0] for batch in loader]
    assert {tuple(crop.shape) for crop in crops} == {(40, 40, 3)}
    assert len({(int(crop[0, 0, 0]), int(crop[0, 0, 1])) for crop in crops}) > 15
    for crop in crops:  # both gradients run through the crop
        assert 80 < int(crop[20, -1, 0]) - int(crop[20, 0, 0]) < 180
        assert 100 < int(crop[-1, 20, 1]) - int(crop[0, 20, 1]) < 230


def test_crops_resized_on_a_gpu_are_those_of_the_processor_within_two_levels() -> None:
    """By the same arithmetic, here in a CPU's fp32."""
    padded, size, rng = 100, 40, np.random.default_rng(0)
    side = np.concatenate([rng.integers(5, padded + 1, (40, 2)), [[size, size], [padded, padded], [1, 1]]])
    window = rng.integers(0, 256, (len(side), padded, padded, 3), np.uint8)
    mirrored = rng.random(len(side)) < 0.5
    inputs = [torch.from_numpy(array) for array in (window, side, mirrored)]
    found, own = in_fp32(*inputs, size).numpy().astype(int), resized(*inputs, size).numpy()
    for i, (height, width) in enumerate(side):
        expected = scale(window[i, :height, :width].copy(), size, size)[:, :: -1 if mirrored[i] else 1]
        np.testing.assert_array_equal(own[i], expected)
        assert np.abs(found[i] - expected).max() <= 2
        assert np.abs(found[i] - expected).mean() < 0.03
    np.testing.assert_array_equal(found[-3], window[-3, :size, :size][:, :: -1 if mirrored[-3] else 1])
    changed = window.copy()
    for i, (height, width) in enumerate(side):  # what lies beside a crop has no part in it
        changed[i, height:], changed[i, :, width:] = 7, 9
    np.testing.assert_array_equal(in_fp32(torch.from_numpy(changed), *inputs[1:], size), found)


@pytest.mark.parametrize("pixels", ["raw", "jpeg"])
@pytest.mark.parametrize("size", [40, 112])
def test_batches_whose_crops_are_resized_on_the_device_hold_the_same(
    tmp_path: Path, pixels: Representation, size: int
) -> None:
    rng, wanted = np.random.default_rng(0), Wanted(("txt",))
    with webdataset.TarWriter(f"{tmp_path}/x.tar") as tar:
        for i, (width, height) in enumerate([(200, 150), (90, 170), (700, 130), (30, 20), (160, 160)]):  # one panorama
            picture = io.BytesIO()
            pixels_hw3 = rng.integers(0, 256, (height // 10, width // 10, 3), np.uint8)
            Image.fromarray(pixels_hw3).resize((width, height)).save(picture, "png")
            tar.write({"__key__": str(i), "png": picture.getvalue(), "txt": "1"})
    [shard] = survey([f"{tmp_path}/x.tar"], wanted, tmp_path, "data.train")
    spec = Spec(wanted, size, "ones", True, pixels)
    host = PictureReader(spec, lambda texts: np.ones((len(texts), 1)), 1, (0.9, 1.0))
    device = replace(host, on_device=True)
    assert host.digest == device.digest, "one cache for both"
    assert dict(device.identity) == {**host.identity, "augment_on": "device"}
    batches = []
    for reader, threads in ((host, 1), (device, 1), (device, 3)):
        feed = Feed((shard,), Order((5,), seed=3), reader)
        with Loader(feed, ShardCache(tmp_path, 2**26), global_batch=7, start=0, stop=4, threads=threads) as loader:
            read = list(loader)
        assert ("window" in read[0].columns) is reader.on_device
        batches.append([batch.to(torch.device("cpu")) for batch in read])
    for expected, *others in zip(*batches, strict=True):
        for found in others:
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected)
