"""Mask R-CNN and Cascade R-CNN as one graph: pixels in; boxes, scores, labels and masks in the image's pixels out.

The weights and layers are those of the trained model. What MMDetection computes image by image, with results of
changing length, is written here for a batch with fixed lengths and a flag for each entry.
B images, P proposals, D detections, C classes. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from torch import Tensor, nn
from torchvision.ops import roi_align

from pe_spatial.detection.heads import Detectron2BBoxHead, Detectron2CascadeRoIHead, Detectron2RPNHead
from pe_spatial.errors import ConfigError
from pe_spatial.export.detections import DetectorGraph, blanked, check_nms, clipped, rescaled
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import LOWEST, best, separated, suppressed
from pe_spatial.runtime.compare import PROPOSALS


class TwoStageGraph(DetectorGraph):
    """A two-stage detector of MMDetection.

    `model` is copied. ConfigError for parts that are not written here, by their class.
    """

    def __init__(self, model: Any, pixels: Pixels) -> None:
        check_parts(model)
        super().__init__(model, pixels)
        for level, anchors in enumerate(model.rpn_head.prior_generator.base_anchors):
            self.register_buffer(f"anchors_{level}", anchors.clone(), persistent=False)
        self.rpn, self.rcnn = model.rpn_head.test_cfg, model.roi_head.test_cfg
        heads = self.model.roi_head.bbox_head
        self.heads: list[Any] = list(heads) if isinstance(heads, nn.ModuleList) else [heads]
        extractors = self.model.roi_head.bbox_roi_extractor
        several = isinstance(extractors, nn.ModuleList)
        self.extractors: list[Any] = list(extractors) if several else [extractors] * len(self.heads)
        self.detectron2 = isinstance(self.heads[-1], Detectron2BBoxHead)
        self.masks: bool = model.roi_head.with_mask

    def outputs(self) -> list[str]:
        """Return the names of the results."""
        return [*super().outputs(), *(["masks"] if self.masks else [])]

    def stages(self) -> list[str]:
        """Return the names of what `forward` returns after the results."""
        levels = range(len(self.model.rpn_head.prior_generator.strides))
        names = [f"{name}_{level}" for name in ("level", "objectness", "deltas") for level in levels]
        return [*self.layers, *names, PROPOSALS]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, 3) uint8 RGB -> boxes (B, D, 4), scores, labels and valid (B, D), masks (B, D, H, W), and stages.

        Entries that are not valid are zero. Stages are the layers of the encoder, the levels of the pyramid, the
        outputs of the RPN, and the proposals in pixels of the network's input.
        """
        images, size = self.pixels(pixels)
        original = pixels.shape[1], pixels.shape[2]
        maps, levels = self.levels(images)
        objectness, deltas = zip(*map(self._rpn, levels), strict=True)
        proposals, valid = self._propose(objectness, deltas, size)
        boxes, scores, labels, valid = self._detect(levels, proposals, valid, size)
        results = [self._masks(levels, boxes, labels, original, size) & valid[..., None, None]] if self.masks else []
        found = blanked(rescaled(boxes, size, original), scores, labels, valid)
        return (*found, *results, *maps, *levels, *objectness, *deltas, proposals)

    def _rpn(self, level: Tensor) -> tuple[Tensor, Tensor]:
        head = self.model.rpn_head
        x = F.relu(head.rpn_conv(level))
        return head.rpn_cls(x), head.rpn_reg(x)

    def _propose(
        self, objectness: Sequence[Tensor], deltas: Sequence[Tensor], size: tuple[int, int]
    ) -> tuple[Tensor, Tensor]:
        """Return proposals (B, P, 4), best first, and which are valid (B, P)."""
        head, count = self.model.rpn_head, self.rpn.nms_pre
        parts = []
        for level, (score, delta) in enumerate(zip(objectness, deltas, strict=True)):
            score = score.permute(0, 2, 3, 1).flatten(1)
            score = score if isinstance(head, Detectron2RPNHead) else score.sigmoid()
            delta = delta.permute(0, 2, 3, 1).reshape(score.shape[0], -1, 4)
            anchors = self._anchors(level, objectness[level]).expand(score.shape[0], -1, -1)
            # small levels have fewer anchors than `count`: fill them up with invalid ones
            delta, anchors = F.pad(delta, (0, 0, 0, count)), F.pad(anchors, (0, 0, 0, count))
            score = F.pad(score, (0, count), value=LOWEST)
            parts.append(best(score, score > LOWEST, count, anchors, delta))
        scores, valid, anchors, delta = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        boxes = decode(head.bbox_coder, anchors, delta, size)
        if self.rpn.get("min_bbox_size", -1) >= 0:
            valid = valid & ((boxes[..., 2:] - boxes[..., :2]) > self.rpn.min_bbox_size).all(-1)
        groups = torch.arange(len(parts), device=boxes.device).repeat_interleave(count).to(boxes)
        kept = suppressed(separated(boxes, groups, valid), scores, valid, self.rpn.nms.iou_threshold)
        number = min(self.rpn.max_per_img, len(parts) * count)
        _, valid, boxes = best(scores, kept, number, boxes)
        return torch.where(valid[..., None], boxes, 0.0), valid

    def _anchors(self, level: int, like: Tensor) -> Tensor:
        """Return the anchors (1, h * w * A, 4) of a level, in the order of the outputs."""
        stride_x, stride_y = self.model.rpn_head.prior_generator.strides[level]
        rows = torch.arange(like.shape[2], device=like.device, dtype=torch.float32) * stride_y
        columns = torch.arange(like.shape[3], device=like.device, dtype=torch.float32) * stride_x
        x, y = columns.expand(like.shape[2], -1), rows[:, None].expand(-1, like.shape[3])
        shifts = torch.stack((x, y, x, y), dim=-1).flatten(0, 1)  # (h * w, 4)
        return (shifts[:, None] + getattr(self, f"anchors_{level}")).flatten(0, 1)[None]

    def _detect(
        self, levels: Sequence[Tensor], rois: Tensor, valid: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return boxes (B, D, 4) in pixels of the input, scores, labels and valid (B, D)."""
        stages = []
        for stage, head in enumerate(self.heads):
            logits, deltas = head(self._pool(self.extractors[stage], levels, rois).flatten(0, 1))
            logits, deltas = (x.unflatten(0, rois.shape[:2]) for x in (logits, deltas))
            stages.append(logits)
            if stage < len(self.heads) - 1:
                rois = decode(head.bbox_coder, rois, _of_class(head, logits, deltas), size)
        scores = self._probabilities(stages)[..., :-1]  # (B, P, C)
        classes = scores.shape[-1]
        deltas = deltas.unflatten(-1, (-1, 4))  # (B, P, C or 1, 4)
        boxes = decode(self.heads[-1].bbox_coder, rois[:, :, None].expand_as(deltas), deltas, size)
        boxes = boxes.expand(-1, -1, classes, -1).flatten(1, 2)
        labels = torch.arange(classes, device=boxes.device).expand_as(scores).flatten(1)
        scores = torch.where(valid[..., None], scores, LOWEST).flatten(1)
        valid = scores > self.rcnn.score_thr
        apart = separated(boxes, labels.to(boxes), valid)
        kept = suppressed(apart, scores, valid, self.rcnn.nms.iou_threshold)
        number = min(self.rcnn.max_per_img, scores.shape[1])
        scores, valid, boxes, labels = best(scores, kept, number, boxes, labels)
        if self.detectron2:
            valid = valid & (boxes[..., 2:] > boxes[..., :2]).all(-1)
        return boxes, scores, labels, valid

    def _probabilities(self, stages: Sequence[Tensor]) -> Tensor:
        if self.detectron2:
            return torch.stack([head.probabilities(x) for head, x in zip(self.heads, stages, strict=True)]).mean(0)
        return torch.stack(list(stages)).mean(0).softmax(-1)

    def _pool(self, extractor: Any, levels: Sequence[Tensor], rois: Tensor) -> Tensor:
        """Levels and RoIs (B, P, 4) -> (B, P, C, h, w), each RoI from its level.

        A level sees the RoIs of the others as points, which cost nothing, so that all shapes are fixed.
        """
        batch, number = rois.shape[:2]
        image = torch.arange(batch, device=rois.device, dtype=rois.dtype)[:, None, None].expand(-1, number, 1)
        flat = torch.cat((image, rois), dim=-1).flatten(0, 1)
        levels = levels[: extractor.num_inputs]
        target = extractor.map_roi_levels(flat, len(levels))
        pooled: Any = None
        for index, (level, layer) in enumerate(zip(levels, extractor.roi_layers, strict=True)):
            here = target == index
            own = torch.cat((flat[:, :1], torch.where(here[:, None], flat[:, 1:], 0.0)), dim=1)
            part = roi_align(
                level, own, layer.output_size, layer.spatial_scale, layer.sampling_ratio, bool(layer.aligned)
            )
            part = torch.where(here[:, None, None, None], part, 0.0)
            pooled = part if pooled is None else pooled + part
        return pooled.unflatten(0, (batch, number))

    def _masks(
        self, levels: Sequence[Tensor], boxes: Tensor, labels: Tensor, original: tuple[int, int], size: tuple[int, int]
    ) -> Tensor:
        """Return the masks (B, D, H, W) bool of boxes in pixels of the input, in the image's own size."""
        roi_head: Any = self.model.roi_head
        heads, extractors = roi_head.mask_head, roi_head.mask_roi_extractor
        several = isinstance(heads, nn.ModuleList)
        pairs = list(zip(heads, extractors, strict=True)) if several else [(heads, extractors)]
        each = [head(self._pool(extractor, levels, boxes).flatten(0, 1)).sigmoid() for head, extractor in pairs]
        probabilities = torch.stack(each).mean(0)  # (B * D, C or 1, 28, 28)
        if not pairs[-1][0].class_agnostic:
            index = labels.reshape(-1, 1, 1, 1).expand(-1, 1, *probabilities.shape[2:])
            probabilities = probabilities.gather(1, index)
        boxes = rescaled(boxes, size, original)
        masks = paste(probabilities[:, 0].unflatten(0, boxes.shape[:2]), boxes, original)
        return masks >= self.rcnn.mask_thr_binary


def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks (B, D, m, m) bilinearly into their boxes (B, D, 4): (B, D, H, W), zero outside.

    Equal to MMDetection's `grid_sample`: both axes are products with the weights of a bilinear interpolation.
    """
    side = masks.shape[-1]
    cells = torch.arange(side, device=masks.device, dtype=torch.float32)
    weights = []
    for axis, length in ((1, size[0]), (0, size[1])):
        low, high = boxes[..., axis], boxes[..., axis + 2]
        pixels = torch.arange(length, device=masks.device, dtype=torch.float32) + 0.5
        places = (pixels - low[..., None]) / (high - low).clamp(min=1e-6)[..., None] * side - 0.5
        weights.append((1 - (places[..., None] - cells).abs()).clamp(min=0))  # (B, D, length, m)
    rows, columns = weights
    return rows @ masks @ columns.transpose(-1, -2)


def decode(coder: Any, rois: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Apply deltas (..., 4) to boxes (..., 4) as DeltaXYWHBBoxCoder does, and clip the result to the image."""
    deltas = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
    centers, sides = (rois[..., :2] + rois[..., 2:]) * 0.5, rois[..., 2:] - rois[..., :2]
    largest = float(abs(np.log(16 / 1000)))
    moves, growth = sides * deltas[..., :2], deltas[..., 2:]
    if coder.add_ctr_clamp:
        growth = growth.clamp(max=largest)
        if np.isfinite(coder.ctr_clamp):
            moves = moves.clamp(-coder.ctr_clamp, coder.ctr_clamp)
    else:
        growth = growth.clamp(-largest, largest)
    centers, sides = centers + moves, sides * growth.exp()
    boxes = torch.cat((centers - sides * 0.5, centers + sides * 0.5), dim=-1)
    return clipped(boxes, size) if coder.clip_border else boxes


def _of_class(head: Any, logits: Tensor, deltas: Tensor) -> Tensor:
    """Return the deltas (B, P, 4) of the likeliest class."""
    if head.reg_class_agnostic:
        return deltas
    label = logits[..., :-1].argmax(-1)[..., None, None].expand(-1, -1, 1, 4)
    return deltas.unflatten(-1, (-1, 4)).gather(2, label)[:, :, 0]


def check_parts(model: Any) -> None:
    """Raise ConfigError for a detector with parts that this graph does not write."""
    known: dict[str, tuple[type, ...]] = {
        "rpn_head": (RPNHead, Detectron2RPNHead),
        "roi_head": (StandardRoIHead, CascadeRoIHead, Detectron2CascadeRoIHead),
    }
    for name, kinds in known.items():
        part = getattr(model, name, None)
        if type(part) not in kinds:
            allowed = ", ".join(kind.__name__ for kind in kinds)
            raise ConfigError(f"the {name} is a {type(part).__name__}; exported are {allowed}")
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, nn.ModuleList) else [heads]:
        if head.custom_activation and not isinstance(head, Detectron2BBoxHead):
            raise ConfigError(f"{type(head.loss_cls).__name__} computes scores of its own, which is not exported")
    for name, cfg in (("rpn", model.rpn_head.test_cfg), ("rcnn", model.roi_head.test_cfg)):
        check_nms(f"test_cfg.{name}.nms", cfg.nms)
