"""Soft-NMS in rounds of independent boxes instead of one box at a time: the same result in tens of steps.

Scores only fall, so the score of a box is final once all boxes that overlap it score less. Each round picks all such
boxes at once and decays the others. The decays, the score at which a box is dropped and the shift that separates
classes are those of perception_models@3e352cc:apps/detection/DETA_pe/models/utils_softnms.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pe_spatial.errors import ConfigError

METHODS: dict[str, dict[str, float]] = {
    "quad": {"iou_threshold": 0.7, "quad_scale": 0.5},
    "linear": {"iou_threshold": 0.7},
    "gaussian": {"sigma": 0.5},
    "hard": {"iou_threshold": 0.7},
}
"""The options of each method, with the values of the released evaluation."""
PRUNE = 0.001
"""A box is dropped as soon as its score is not above this; only the best box of all is exempt."""
_BLOCK = 2**22  # IoUs computed at once


def soft_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, *, method: str = "quad", **options: float | None
) -> tuple[Tensor, Tensor]:
    """Decay the scores of boxes that overlap a better one of their class; return kept (indices, scores), best first.

    Classes are separated by adding label * (largest coordinate + 1) to the boxes. This rounds them, by 0.004 pixels for
    label 90 in 640 pixels, which can lift an IoU over the threshold; the rounding depends on the label.

    Args:
        boxes, scores: (N, 4) as x1, y1, x2, y2, and (N,); computed in float32.
        labels: (N,), integers >= 0.
        method: the factor of an overlapping box's score: 'quad' (1 - IoU)^quad_scale and 'linear' 1 - IoU, both where
            IoU is above iou_threshold; 'hard' 0 where it is not below; 'gaussian' exp(-IoU^2 / sigma) everywhere.
        options: options of the method in `METHODS`; None for the value there. ConfigError for others.
    """
    chosen = method_options(method, options, METHODS)
    scores = scores.float()
    if not len(scores):
        return torch.empty(0, dtype=torch.long, device=boxes.device), scores
    boxes = boxes.float()
    boxes = boxes + (labels.to(boxes) * (boxes.max() + 1))[:, None]
    alive = scores > PRUNE
    alive[scores.nan_to_num(nan=-1).argmax()] = True
    index = alive.nonzero()[:, 0]  # of the remaining boxes, in the given ones
    boxes, scores, alive = boxes[index], scores[index], alive[index]
    first, second, decay = _pairs(boxes, method, chosen)

    kept = torch.zeros_like(alive)
    while len(first):
        swap = scores[first] < scores[second]  # the first of equal scores wins, as in argmax
        winner, loser = torch.where(swap, second, first), torch.where(swap, first, second)
        blocked = torch.zeros_like(alive)
        blocked[loser] = True
        picked = alive & ~blocked
        kept |= picked
        alive &= blocked
        falls = picked[winner]
        scores.scatter_reduce_(0, loser[falls], decay[falls], "prod")
        alive &= scores > PRUNE
        both = alive[first] & alive[second]
        first, second, decay = first[both], second[both], decay[both]
    order = (kept | alive).nonzero()[:, 0]
    order = order[scores[order].argsort(descending=True, stable=True)]
    return index[order], scores[order]


def method_options(
    method: str | None, given: Mapping[str, float | None], methods: Mapping[Any, Mapping[str, float]]
) -> dict[str, float]:
    """Return all options of `method`; ConfigError for an unknown method or an option that it does not have."""
    if method not in methods:
        raise ConfigError(f"method is {method!r}; allowed are {', '.join(map(repr, methods))}")
    options = {name: value for name, value in given.items() if value is not None}
    unknown = options.keys() - methods[method].keys()
    if unknown:
        allowed = ", ".join(methods[method]) or "none"
        raise ConfigError(f"method {method!r} has no {', '.join(sorted(unknown))}; remove it (allowed: {allowed})")
    return {**methods[method], **options}


def _pairs(boxes: Tensor, method: str, options: Mapping[str, float]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the pairs i, j (P,), i < j, of boxes of which one decays the other, and the factors (P,)."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    rows = max(1, _BLOCK // len(boxes))
    parts = []
    for start in range(0, len(boxes), rows):
        chunk = boxes[start : start + rows, None]  # (R, 1, 4) against (M, 4): earlier boxes are done
        others = boxes[start:]
        sides = (torch.min(chunk[..., 2:], others[:, 2:]) - torch.max(chunk[..., :2], others[:, :2])).clamp_(min=0)
        overlap = sides[..., 0] * sides[..., 1]  # (R, M)
        union = areas[start : start + rows, None] + areas[start:] - overlap
        iou = overlap / union  # NaN for two empty boxes, which then do not touch
        threshold = options.get("iou_threshold", 0)
        touching = iou >= threshold if method == "hard" else iou > threshold
        i, j = touching.triu_(1).nonzero(as_tuple=True)
        parts.append((i + start, j + start, _decay(iou[i, j], method, options)))
    first, second, decay = map(torch.cat, zip(*parts, strict=True))
    return first, second, decay


def _decay(iou: Tensor, method: str, options: Mapping[str, float]) -> Tensor:
    if method == "quad":
        return (1 - iou) ** options["quad_scale"]
    if method == "linear":
        return 1 - iou
    if method == "gaussian":
        return torch.exp(-(iou**2) / options["sigma"])
    return torch.zeros_like(iou)
