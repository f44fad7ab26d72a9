"""What the graphs of detectors share: the levels of the backbone, boxes in the image's pixels, and the best of them.

B images, N candidates, D detections. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pe_spatial.detection.heads import Float32Linear
from pe_spatial.encoder.backbone import PerceptionEncoderPyramid
from pe_spatial.encoder.pyramid import as_float32
from pe_spatial.errors import ConfigError
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import best, separated, suppressed

OUTPUTS = ("boxes", "scores", "labels", "valid")


class DetectorGraph(nn.Module):
    """A copy of a detector of MMDetection behind its preprocessing; `coarsest` is the largest stride of a level."""

    coarsest = 64

    def __init__(self, model: Any, pixels: Pixels) -> None:
        super().__init__()
        self.model, self.pixels = copy.deepcopy(model).eval(), pixels
        for module in self.model.modules():
            if isinstance(module, Float32Linear):
                module.__class__ = nn.Linear  # type: ignore[assignment]  # without the context for autocast, which a graph does not have
        backbone = model.backbone
        self.maps = isinstance(backbone, PerceptionEncoderPyramid) and not backbone.any_size
        self.layers = [f"layer_{i}" for i in backbone.encoder.out_indices] if self.maps else []

    def outputs(self) -> list[str]:
        """Return the names of the results."""
        return list(OUTPUTS)

    def stages(self) -> list[str]:
        """Return the names of what `forward` returns after the results."""
        raise NotImplementedError

    def levels(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        """Return the requested layers of the encoder, if the graph has them, and the levels that the heads read."""
        if not self.maps:
            return (), self.model.extract_feat(images)
        backbone = self.model.backbone
        maps = backbone.encoder(backbone.normalize(images))
        levels = as_float32(backbone.pyramid(maps))
        return maps, self.model.neck(levels) if self.model.with_neck else levels


def corners(like: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (w, h, w, h) of a size (h, w) as a tensor, also of symbolic sizes."""
    one = torch.ones(1, device=like.device)
    return torch.cat((one * size[1], one * size[0])).repeat(2)


def clipped(boxes: Tensor, size: tuple[int, int], margin: float = 0.0) -> Tensor:
    """Move boxes (..., 4) into an image of (h, w), or by `margin` less at the right and at the bottom."""
    return torch.minimum(boxes.clamp(min=0), corners(boxes, size) - margin)


def rescaled(boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Tensor:
    """Move boxes (..., 4) from an image of (h, w) to its original size."""
    return boxes / corners(boxes, size) * corners(boxes, original)


def apart_by_class(
    boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor, nms: Mapping[str, Any], number: int
) -> tuple[Tensor, ...]:
    """Return the best boxes (B, D, 4), scores, labels and valid (B, D) after `nms`, as mmcv's `batched_nms`."""
    groups = torch.zeros_like(scores) if nms.get("class_agnostic", False) else labels.to(boxes)
    kept = suppressed(separated(boxes, groups, valid), scores, valid, nms["iou_threshold"])
    scores, valid, boxes, labels = best(scores, kept, number, boxes, labels)
    return blanked(boxes, scores, labels, valid)


def blanked(boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor) -> tuple[Tensor, ...]:
    """Return the same with zeros where an entry is not valid."""
    boxes = torch.where(valid[..., None], boxes, 0.0)
    return boxes, torch.where(valid, scores, 0.0), torch.where(valid, labels, 0), valid


def check_nms(name: str, nms: Mapping[str, Any] | None) -> None:
    """Raise ConfigError for a suppression other than plain NMS."""
    kind = None if nms is None else nms.get("type", "nms")
    if kind != "nms":
        raise ConfigError(f"{name} is {kind!r}; 'nms' is exported")
