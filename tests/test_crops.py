"""Random crops: where they lie, and that what lies there is what a batch holds."""

import io
from pathlib import Path

import numpy as np
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from raychain.data.cache import ShardCache
from raychain.data.crops import crop_boxes
from raychain.data.loader import Feed, Loader
from raychain.data.members import Wanted
from raychain.data.order import Order
from raychain.data.pictures import PictureReader
from raychain.data.shards import survey
from raychain.data.spec import Spec


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
