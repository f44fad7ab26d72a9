"""Region similarity J, boundary accuracy F and their statistics, equal to DAVIS's evaluator and much faster.

Definitions: davisvideochallenge/davis2017-evaluation@ac7c43f, davis2017/metrics.py and utils.py. What is fast here:
boundaries are sought in each object's own box, and dilated as bits, 64 pixels of a row in one integer.

Legend: N objects of one frame, masks (N, H, W) bool.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np

BOUND = 0.008  # default tolerance of F as a share of the image's diagonal


class Statistics(NamedTuple):
    """Of one object's values over its frames."""

    mean: float
    recall: float
    decay: float


def region_similarity(gt: np.ndarray, pred: np.ndarray, *, void: np.ndarray | None = None) -> np.ndarray:
    """Return J (N,): intersection over union of masks (N, H, W) bool, 1 where both are empty.

    Args:
        void: (H, W) bool, pixels that do not count.
    """
    gt, pred = _checked(gt, pred, void)
    values = []
    for truth, guess in zip(gt, pred, strict=True):
        both = np.count_nonzero(truth & guess)
        either = np.count_nonzero(truth) + np.count_nonzero(guess) - both
        values.append(both / either if either else 1.0)
    return np.array(values, dtype=np.float64)


def boundary_f(gt: np.ndarray, pred: np.ndarray, *, void: np.ndarray | None = None, bound: float = BOUND) -> np.ndarray:
    """Return F (N,) of masks (N, H, W) bool: the harmonic mean of precision and recall of their boundaries.

    Precision is the share of the predicted boundary that lies within the tolerance of the true one, recall the reverse.
    Both boundaries empty (also those of masks that fill the image) gives 1, one of them 0.

    Args:
        void: (H, W) bool, pixels taken out of both masks.
        bound: the tolerance: below 1 a share of the image's diagonal, rounded up to pixels; otherwise whole pixels.
    """
    gt, pred = _checked(gt, pred, void)
    radius = boundary_radius(gt.shape[1:], bound)
    return np.array([_boundary_f(truth, guess, radius) for truth, guess in zip(gt, pred, strict=True)], np.float64)


def boundary_radius(size: tuple[int, ...], bound: float = BOUND) -> int:
    """Return the tolerance of `boundary_f` in pixels for an image of `size` (H, W)."""
    if bound <= 0 or (bound >= 1 and bound != int(bound)):
        raise ValueError(f"bound is {bound}; give a share of the diagonal between 0 and 1, or whole pixels")
    return int(bound) if bound >= 1 else math.ceil(bound * np.linalg.norm(size))


def box_around(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the box of what is not 0 in `mask` (H, W), and one pixel more on each side that the image has.

    J, and F with a radius in pixels, are the same in the box as in the image.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return np.s_[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]


def statistics(values: np.ndarray, *, official_decay: bool = False) -> Statistics:
    """Return mean, recall (share above 0.5) and decay (first less last quarter) of one object's values (frames,).

    NaN are left out of means and count as not above 0.5. Quarters share their limiting frames.

    Args:
        official_decay: the limits as DAVIS's evaluator stores them, in 8 bits: they wrap above 256 frames, and the
            decay means nothing there; at exactly 256 frames it is NaN (as under numpy 2).
    """
    values = np.asarray(values, np.float64)
    limits = (np.round(np.linspace(1, len(values), 5) + 1e-10) - 1).astype(np.int64)
    ends = limits + 1
    if official_decay:
        limits, ends = limits & 255, (ends & 255)
    first, last = (_mean(values[limits[i] : ends[i + 1]]) for i in (0, 3))
    return Statistics(_mean(values), float(np.mean(values > 0.5)), first - last)


def _mean(values: np.ndarray) -> float:
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _checked(gt: np.ndarray, pred: np.ndarray, void: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    if gt.ndim != 3 or gt.shape != pred.shape or gt.dtype != bool or pred.dtype != bool:
        raise ValueError(
            f"masks must be two stacks (N, H, W) bool of one shape, got {gt.shape} {gt.dtype} and {pred.shape} "
            f"{pred.dtype}"
        )
    return (gt, pred) if void is None else (gt & ~void, pred & ~void)


def _boundary_f(gt: np.ndarray, pred: np.ndarray, radius: int) -> float:
    """Return F of one object's masks (H, W)."""
    boundaries = _boundaries(gt, pred)  # (2, h, w)
    if np.array_equal(*boundaries):  # both may be empty
        return 1.0
    totals = [np.count_nonzero(boundary) for boundary in boundaries]
    if not all(totals):
        return 0.0
    bits, row = _pack(boundaries, radius)
    met = bits & _dilate(bits, row, radius)[::-1]
    recall, precision = (
        np.count_nonzero(np.unpackbits(part.view(np.uint8))) / total for part, total in zip(met, totals, strict=True)
    )
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _boundaries(gt: np.ndarray, pred: np.ndarray) -> np.ndarray:
    """Mark where a pixel differs from its right, lower or lower right neighbor: (2, h, w) bool, a box that holds all.

    At the image's lower and right edge there is no neighbor to differ from: the edge is repeated.
    """
    box = box_around(gt | pred)
    masks = np.stack(
        [cv2.copyMakeBorder(mask[box].view(np.uint8), 0, 1, 0, 1, cv2.BORDER_REPLICATE) for mask in (gt, pred)]
    ).view(bool)
    pixel = masks[:, :-1, :-1]
    return (pixel ^ masks[:, :-1, 1:]) | (pixel ^ masks[:, 1:, :-1]) | (pixel ^ masks[:, 1:, 1:])


def _pack(maps: np.ndarray, gap: int) -> tuple[np.ndarray, int]:
    """Pack (2, h, w) bool into bits, rows one after the other: (2, h * row) uint64, and row, the integers of one row.

    At least `gap` bits after each row stay 0, so that shifts by at most so many do not reach the next.
    """
    count, height, width = maps.shape
    row = math.ceil((width + gap) / 64)
    packed = np.zeros((count, height, 8 * row), np.uint8)
    packed[..., : math.ceil(width / 8)] = np.packbits(maps, axis=-1, bitorder="little")
    return packed.view("<u8").reshape(count, height * row), row


def _dilate(bits: np.ndarray, row: int, radius: int) -> np.ndarray:
    """Dilate `_pack`ed maps with a disc: all offsets with dy² + dx² <= radius².

    The disc is a pile of horizontal runs that widen towards its middle; each is made from the one before.
    """
    length = bits.shape[1]
    out = np.zeros_like(bits)
    run, reach = bits, 0
    for dy in range(min(radius, length // row - 1), -1, -1):
        wide = math.isqrt(radius**2 - dy**2)
        while reach < wide:
            # Further would leave holes in runs that the first pixel of the box has cut in half, or skip an integer.
            step = min(wide - reach, reach + 1, 63)
            wider = run | run << step | run >> step
            wider[:, 1:] |= run[:, :-1] >> (64 - step)
            wider[:, :-1] |= run[:, 1:] << (64 - step)
            run, reach = wider, reach + step
        shift = dy * row
        out[:, shift:] |= run[:, : length - shift]
        out[:, : length - shift] |= run[:, shift:]
    return out
