"""Prompts: masks, clicks and boxes in pixels of a frame, checked and brought to the size of the model's image.

Importing it needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.images import bilinear_weights

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

BOX_CORNERS = (2, 3)
"""Labels of the first and the second corner of a box."""


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where an object is on a frame: a mask, or clicks and a box, in pixels of the frame.

    Args:
        points: (n, 2), x and y of each click; the top left pixel is 0, 0.
        labels: (n,), 1 for a click on the object and 0 for one beside it.
        box: x0, y0, x1, y1.
        mask: (H, W), true or 1 on the object.
    """

    points: ArrayLike | None = None
    labels: ArrayLike | None = None
    box: ArrayLike | None = None
    mask: ArrayLike | None = None


class Clicks(NamedTuple):
    points: np.ndarray  # (n, 2) float32, in pixels of the model's image
    labels: np.ndarray  # (n,) int32: 0 beside the object, 1 on it, or `BOX_CORNERS`


def read_prompt(where: str, prompt: Prompt, size: tuple[int, int], side: int) -> Clicks | np.ndarray:
    """Return clicks, or a mask (1, S, S) float32 of 0 and 1; DatasetError for a prompt that cannot be used.

    `where` is the name of the prompt in error messages, `size` (H, W) of the frame, `side` S of the model's image.
    """
    if not isinstance(prompt, Prompt):
        raise DatasetError(f"{where} is a {type(prompt).__name__}; give a Prompt(points=, labels=, box=, mask=)")
    clicks = prompt.points is not None or prompt.box is not None
    if clicks == (prompt.mask is not None):
        raise DatasetError(f"{where} needs either a mask, or points, a box or both")
    if (prompt.points is None) != (prompt.labels is None):
        raise DatasetError(f"{where} has points without labels or labels without points; give one label per point")
    return _read_clicks(where, prompt, size, side) if clicks else _read_mask(where, prompt.mask, size, side)


def _read_clicks(where: str, prompt: Prompt, size: tuple[int, int], side: int) -> Clicks:
    height, width = size
    points: np.ndarray = np.zeros((0, 2), np.float32)
    labels: np.ndarray = np.zeros(0, np.int32)
    if prompt.points is not None:
        points, labels = _numbers(where, prompt.points), _numbers(where, prompt.labels)
        if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1] or not points.size:
            raise DatasetError(f"{where} has points {points.shape} and labels {labels.shape}; give (n, 2) and (n,)")
        if not np.isin(labels, (0, 1)).all():
            raise DatasetError(f"{where} has labels {labels.tolist()}; 1 is on the object and 0 beside it")
        inside = (points >= 0) & (points < (width, height))
        if not inside.all():
            outside = points[~inside.all(axis=1)][0].tolist()
            raise DatasetError(f"{where} has a point at {outside}, outside the frame of {width}x{height} (x, y)")
    if prompt.box is not None:
        box = _numbers(where, prompt.box)
        if box.shape != (4,) or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
            raise DatasetError(
                f"{where} has the box {box.tolist()}; expected x0 < x1 and y0 < y1 within the frame of {width}x{height}"
            )
        points, labels = np.concatenate((box.reshape(2, 2), points)), np.concatenate((BOX_CORNERS, labels))
    scaled = points.astype(np.float32) / np.array([width, height], np.float32) * np.float32(side)
    return Clicks(scaled, labels.astype(np.int32))


def _read_mask(where: str, mask: ArrayLike | None, size: tuple[int, int], side: int) -> np.ndarray:
    values = _numbers(where, mask)
    if values.shape != size or not ((values == 0) | (values == 1)).all():
        raise DatasetError(
            f"{where} has a mask of shape {values.shape} with values from {values.min(initial=0):g} to "
            f"{values.max(initial=0):g}; expected {size}, the frame's, with 0 and 1 (for example index == id)"
        )
    if not values.any():
        raise DatasetError(f"{where} has an empty mask; omit the prompt if the object is not in the frame")
    rows, columns = (bilinear_weights(length, side, antialias=True) for length in size)
    small = (rows @ values @ columns.T).astype(np.float32)  # rounded, so that half covered pixels are exactly 0.5
    # sam2 takes pixels that are half covered; an object smaller than that keeps the pixel that it covers most
    return (small >= min(small.max(), 0.5)).astype(np.float32)[None]


def _numbers(where: str, values: Any) -> np.ndarray:
    """Return finite float32 numbers."""
    try:
        array = values.cpu().numpy() if hasattr(values, "cpu") else np.asarray(values)
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        array = np.full(1, np.nan, np.float32)
    if not np.isfinite(array).all():
        raise DatasetError(f"{where} must hold finite numbers only")
    return array
