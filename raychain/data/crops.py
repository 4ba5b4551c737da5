"""Where random resized crops lie: a pure function of seeds and picture sizes."""

from __future__ import annotations

import numpy as np

from raychain.data.order import mix

TRIES = 10
RATIO = (3 / 4, 4 / 3)
"""Width by height of a crop."""


def crop_boxes(height: np.ndarray, width: np.ndarray, area: tuple[float, float], seed: np.ndarray) -> np.ndarray:
    """Top, left, height and width of torchvision's RandomResizedCrop in each of n pictures, int64 [n, 4].

    `height`, `width` in pixels and `seed` are integers [n]; `area` is the range of the crop's share of the picture. The
    largest square is taken where TRIES draws do not fit.
    """
    height, width = height.astype(np.int64), width.astype(np.int64)
    u_n2T, places_n2 = _uniform(seed, 0, 2 * TRIES).reshape(-1, 2, TRIES), _uniform(seed, 1, 2)
    pixels = (height * width)[:, None] * (area[0] + (area[1] - area[0]) * u_n2T[:, 0])
    ratio = np.exp(np.log(RATIO[0]) + np.log(RATIO[1] / RATIO[0]) * u_n2T[:, 1])
    w_nT, h_nT = (np.rint(np.sqrt(side)).astype(np.int64) for side in (pixels * ratio, pixels / ratio))
    fits = (w_nT > 0) & (w_nT <= width[:, None]) & (h_nT > 0) & (h_nT <= height[:, None])
    row, first, square = np.arange(len(seed)), fits.argmax(1), np.minimum(height, width)
    w, h = (np.where(fits.any(1), side[row, first], square) for side in (w_nT, h_nT))
    top, left = (places_n2 * np.stack([height - h + 1, width - w + 1], 1)).astype(np.int64).T
    return np.stack([top, left, h, w], 1)


def _uniform(seed: np.ndarray, stream: int, count: int) -> np.ndarray:
    """float64 [n, count] in 0 ≤ u < 1."""
    return (mix(seed[:, None], stream, np.arange(count)[None]) >> np.uint64(11)) * 2.0**-53
