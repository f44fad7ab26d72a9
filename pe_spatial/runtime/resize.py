"""Resizing in numpy as OpenCV and torch do it, because the runtimes need neither."""

from __future__ import annotations

import numpy as np

from pe_spatial.images import bilinear_weights


def resize_bilinear(maps: np.ndarray, size: tuple[int, ...], *, align_corners: bool = False) -> np.ndarray:
    """Resize (..., h, w) float32 to (..., H, W), as cv2.INTER_LINEAR and torch's bilinear do."""
    if maps.shape[-2:] == tuple(size):
        return maps
    weights = _corner_weights if align_corners else bilinear_weights
    rows, columns = (weights(*sides).astype(np.float32) for sides in zip(maps.shape[-2:], size, strict=True))
    return rows @ maps @ columns.T


def resize_pixels(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (H, W, C) uint8 to (h, w, C), bit for bit as cv2.INTER_LINEAR.

    OpenCV works in fixed point: weights of 11 bits, 4 bits dropped after the rows, the rest after the columns.
    """
    height, width = size
    if image.shape[:2] == (height, width):
        return image
    left, right, a, b = _taps(width, image.shape[1], zero_beyond=True)
    pixels = image.astype(np.int64)
    rows = (pixels[:, left] * a[:, None] + pixels[:, right] * b[:, None]) >> 4
    top, bottom, a, b = _taps(height, image.shape[0], zero_beyond=False)
    a, b = a[:, None, None], b[:, None, None]
    return ((((a * rows[top]) >> 16) + ((b * rows[bottom]) >> 16) + 2) >> 2).clip(0, 255).astype(np.uint8)


def resize_area(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Shrink (H, W, C) uint8 to (h, w, C) as cv2.INTER_AREA: each pixel is the mean of what it covers."""
    rows, columns = (_area_weights(*sides) for sides in zip(image.shape[:2], size, strict=True))
    means = np.einsum("yh,hwc->ywc", rows, np.einsum("xw,hwc->hxc", columns, image, optimize=True), optimize=True)
    return np.rint(means).astype(np.uint8)


def _taps(size: int, side: int, *, zero_beyond: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the two cells that each of `size` places reads, and their weights of 0 to 2048.

    Beyond the border OpenCV moves the weights to the last cell along rows, but not along columns.
    """
    places = ((np.arange(size) + 0.5) * (side / size) - 0.5).astype(np.float32)
    first = np.floor(places)
    rest = places - first
    if zero_beyond:
        rest = np.where((first < 0) | (first >= side - 1), np.float32(0), rest)
        first = first.clip(0, side - 1)
    left, right = ((first + step).clip(0, side - 1).astype(np.int64) for step in (0, 1))
    a, b = (np.rint(weight * np.float32(2048)).astype(np.int64) for weight in (1 - rest, rest))
    return left, right, a, b


def _area_weights(side: int, size: int) -> np.ndarray:
    """Return the matrix (size, side) of means over `side / size` pixels."""
    edges = np.arange(size + 1) * (side / size)
    cells = np.arange(side)
    covered = np.minimum(edges[1:, None], cells + 1) - np.maximum(edges[:-1, None], cells)
    covered = covered.clip(0)
    return covered / covered.sum(1, keepdims=True)


def _corner_weights(side: int, size: int) -> np.ndarray:
    """Return the matrix (size, side) of a bilinear resize with aligned corners."""
    places = np.linspace(0, side - 1, size)
    return np.maximum(1 - np.abs(np.arange(side) - places[:, None]), 0)
