"""Region similarity J, boundary accuracy F and their statistics, equal to DAVIS's evaluator and much faster.

Definitions: davisvideochallenge/davis2017-evaluation@ac7c43f, davis2017/metrics.py and utils.py. It is fast because
boundaries are searched in each object's box and dilated as bits, 64 pixels of a row in one integer.

Legend: N objects of one frame, masks (N, H, W) bool.
"""

import math
from typing import NamedTuple

import cv2
import numpy as np

BOUND = 0.008  # default tolerance of F as a fraction of the image's diagonal


class Statistics(NamedTuple):
    mean: float
    recall: float
    decay: float


def region_similarity(gt: np.ndarray, pred: np.ndarray, *, void: np.ndarray | None = None) -> np.ndarray:
    """Return J (N,): intersection over union of masks (N, H, W) bool, 1 where both are empty.

    The pixels `void` (H, W) bool do not count.
    """
    gt, pred = _checked(gt, pred, void)
    both, either = (np.array([np.count_nonzero(mask) for mask in masks], float) for masks in (gt & pred, gt | pred))
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def boundary_f(gt: np.ndarray, pred: np.ndarray, *, void: np.ndarray | None = None, bound: float = BOUND) -> np.ndarray:
    """Return F (N,) of masks (N, H, W) bool: the harmonic mean of precision and recall of their boundaries.

    Precision is the fraction of the predicted boundary within the tolerance of the true one, recall the reverse. F is 1
    if both boundaries are empty (also those of masks that fill the image), 0 if one of them is.

    The pixels `void` (H, W) bool are removed from both masks. A `bound` below 1 is the tolerance as a fraction of the
    image's diagonal, rounded up to pixels, otherwise in pixels.
    """
    gt, pred = _checked(gt, pred, void)
    radius = boundary_radius(gt.shape[1:], bound)
    return np.array([_boundary_f(truth, guess, radius) for truth, guess in zip(gt, pred, strict=True)], np.float64)


def boundary_radius(size: tuple[int, ...], bound: float = BOUND) -> int:
    """Return the tolerance of `boundary_f` in pixels for an image of `size` (H, W)."""
    if bound <= 0 or (bound >= 1 and bound != int(bound)):
        raise ValueError(f"bound is {bound}; give a fraction of the diagonal below 1, or an integer number of pixels")
    return int(bound) if bound >= 1 else math.ceil(bound * np.linalg.norm(size))


def box_around(mask: np.ndarray) -> tuple[slice, slice]:
    """Return the box of the nonzero pixels in `mask` (H, W), one pixel larger on each side within the image.

    J, and F with a radius in pixels, are the same in the box as in the image.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    return np.s_[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]


def statistics(values: np.ndarray, *, official_decay: bool = False) -> Statistics:
    """Return mean, recall (share above 0.5) and decay (first less last quarter) of one object's values (frames,).

    NaN is omitted from means and counts as not above 0.5. Neighboring quarters share a frame.

    `official_decay` stores the limits of the quarters in 8 bits, as DAVIS's evaluator does: they wrap above 256 frames,
    where the decay is meaningless; at exactly 256 frames it is NaN (as under numpy 2).
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
        got = f"{gt.shape} {gt.dtype} and {pred.shape} {pred.dtype}"
        raise ValueError(f"expected two stacks of masks (N, H, W) bool of one shape, got {got}")
    return (gt, pred) if void is None else (gt & ~void, pred & ~void)


def _boundary_f(gt: np.ndarray, pred: np.ndarray, radius: int) -> float:
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
    """Mark pixels that differ from their right, lower or lower right neighbor: (2, h, w) bool, cropped to a box.

    The image's lower and right edges are repeated, so their pixels do not differ from a neighbor outside.
    """
    box = box_around(gt | pred)
    masks = np.stack(
        [cv2.copyMakeBorder(mask[box].view(np.uint8), 0, 1, 0, 1, cv2.BORDER_REPLICATE) for mask in (gt, pred)]
    ).view(bool)
    pixel = masks[:, :-1, :-1]
    return (pixel ^ masks[:, :-1, 1:]) | (pixel ^ masks[:, 1:, :-1]) | (pixel ^ masks[:, 1:, 1:])


def _pack(maps: np.ndarray, gap: int) -> tuple[np.ndarray, int]:
    """Pack (2, h, w) bool into bits, row by row: (2, h * row) uint64, and `row`, the number of integers per row.

    At least `gap` bits after each row stay 0, so that shifts of up to `gap` bits do not reach the next row.
    """
    count, height, width = maps.shape
    row = math.ceil((width + gap) / 64)
    packed = np.zeros((count, height, 8 * row), np.uint8)
    packed[..., : math.ceil(width / 8)] = np.packbits(maps, axis=-1, bitorder="little")
    return packed.view("<u8").reshape(count, height * row), row


def _dilate(bits: np.ndarray, row: int, radius: int) -> np.ndarray:
    """Dilate `_pack`ed maps with a disk: all offsets with dy² + dx² <= radius².

    The disk is a stack of horizontal runs that widen towards its center; each is computed from the previous one.
    """
    length = bits.shape[1]
    out = np.zeros_like(bits)
    run, reach = bits, 0
    for dy in range(min(radius, length // row - 1), -1, -1):
        wide = math.isqrt(radius**2 - dy**2)
        while reach < wide:
            # A larger step would leave holes in runs cut by the box's first pixel, or skip an integer.
            step = min(wide - reach, reach + 1, 63)
            wider = run | run << step | run >> step
            wider[:, 1:] |= run[:, :-1] >> (64 - step)
            wider[:, :-1] |= run[:, 1:] << (64 - step)
            run, reach = wider, reach + step
        shift = dy * row
        out[:, shift:] |= run[:, : length - shift]
        out[:, : length - shift] |= run[:, shift:]
    return out
