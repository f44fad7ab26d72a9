"""Non-maximum suppression as one operator with a result of fixed shape, which ONNX has too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

LOWEST = -3e38
"""A score below all scores: nothing at it or below takes part."""


@torch.library.custom_op("pe_spatial::kept_by_nms", mutates_args=())
def kept_by_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Return which boxes survive, (B, C, N) bool, as torchvision's `nms` on each class of each image alone.

    Args:
        boxes, scores: (B, N, 4) as x1, y1, x2, y2, and (B, C, N); a score of `LOWEST` does not take part.
        iou_threshold: IoU above which the lower of two boxes is dropped.
    """
    kept = torch.zeros_like(scores, dtype=torch.bool)
    for image in range(scores.shape[0]):
        for group in range(scores.shape[1]):
            index = (scores[image, group] > LOWEST).nonzero()[:, 0]
            best = nms(boxes[image, index], scores[image, group, index], iou_threshold)
            kept[image, group, index[best]] = True
    return kept


@kept_by_nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:  # noqa: ARG001
    return torch.empty_like(scores, dtype=torch.bool)


def translations() -> dict[Any, Any]:
    """Return how ONNX writes the operator, for `Exportable.translations`."""
    from onnxscript import opset20
    from onnxscript.onnx_types import BOOL, FLOAT

    op: Any = opset20

    def write(boxes: FLOAT, scores: FLOAT, iou_threshold: float) -> BOOL:
        limits = (op.Constant(value_floats=[value]) for value in (iou_threshold, LOWEST))
        number = op.Shape(scores, start=2, end=3)
        places = op.NonMaxSuppression(boxes, scores, number, *limits)  # (K, 3): image, class, box
        marks = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(places, start=0, end=1))
        nothing = op.Expand(op.Constant(value_floats=[0.0]), op.Shape(scores))
        return op.Greater(op.ScatterND(nothing, places, marks), op.Constant(value_floats=[0.5]))

    return {torch.ops.pe_spatial.kept_by_nms.default: write}


def suppressed(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float) -> Tensor:
    """Return which of the valid boxes (B, N, 4) survive, (B, N) bool."""
    scores = torch.where(valid, scores, LOWEST)
    return kept_by_nms(boxes, scores[:, None], float(iou_threshold))[:, 0] & valid


def separated(boxes: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """Move the boxes (B, N, 4) of each group (N,) apart, so that one suppression serves all groups.

    As in mmcv's and torchvision's `batched_nms`, down to the rounding: by group * (largest coordinate + 1).
    """
    largest = torch.where(valid[..., None], boxes, LOWEST).amax((1, 2))  # (B,)
    return boxes + (groups * (largest[:, None] + 1))[..., None]


def best(scores: Tensor, valid: Tensor, number: int, *values: Tensor) -> tuple[Tensor, ...]:
    """Return the `number` best scores (B, number), which of them are valid, and their rows of `values` (B, N, ...)."""
    scores, index = torch.where(valid, scores, LOWEST).topk(number)
    chosen = (_rows(value, index) for value in values)
    return scores, scores > LOWEST, *chosen


def _rows(values: Tensor, index: Tensor) -> Tensor:
    if values.ndim == 2:
        return values.gather(1, index)
    return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))
