"""One-stage detectors of MMDetection as one graph: pixels in; boxes, scores and labels in the image's pixels out.

Network, priors and the decoding of boxes are the head's own. What MMDetection selects image by image is written here
for a batch, with fixed lengths. A head that selects by a method of its own needs a `Selection` of its own.
B images, N priors of a level, C classes, K candidates. Boxes are x1, y1, x2, y2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import DeformConv2d, ModulatedDeformConv2d
from mmdet.models.dense_heads import FoveaHead, GFLHead, PAAHead, RepPointsHead, TOODHead, YOLOV3Head, YOLOXHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.structures.bbox import distance2bbox
from torch import Tensor

from pe_spatial.errors import ConfigError
from pe_spatial.export.deformable import FromSamples, deformed
from pe_spatial.export.detections import DetectorGraph, apart_by_class, blanked, check_nms, clipped, rescaled
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import LOWEST, best, kept_by_nms

Size = tuple[int, int]


class Selection:
    """How a `BaseDenseHead` makes candidates of its outputs, and detections of those."""

    parts: tuple[str, ...] = ("logits", "deltas")
    limited = True  # to `nms_pre` candidates, of a level or of all

    def __init__(self, head: Any) -> None:
        self.head, self.cfg = head, head.test_cfg
        check_nms("test_cfg.nms", self.cfg.get("nms"))
        if self.limited and self.cfg.get("nms_pre", -1) <= 0:
            raise ConfigError(f"test_cfg.nms_pre is {self.cfg.get('nms_pre')}; give a number of candidates")
        if getattr(getattr(head, "loss_cls", None), "custom_cls_channels", False):
            raise ConfigError(f"{type(head.loss_cls).__name__} computes scores of its own, which is not exported")
        if getattr(getattr(head, "bbox_coder", None), "clip_border", False):
            head.bbox_coder.clip_border = False  # sizes are symbols here; `clipped` does it afterwards
            self.clip = True
        else:
            self.clip = False

    def outputs(self, levels: Sequence[Tensor]) -> Any:
        """Return the outputs of the network, by level in each of `parts`."""
        return self.head(levels)

    def detections(self, outputs: Any, size: Size, original: Size) -> tuple[Tensor, ...]:
        """Return boxes (B, D, 4) in pixels of the original image, scores, labels and valid (B, D)."""
        boxes, scores, labels, valid = self.candidates(outputs, size)
        boxes = rescaled(boxes, size, original)
        smallest = self.cfg.get("min_bbox_size", -1)
        if smallest >= 0:
            valid = valid & (boxes[..., 2:] - boxes[..., :2] > smallest).all(-1)
        return apart_by_class(boxes, scores, labels, valid, self.cfg.nms, self.number(scores.shape[1]))

    def number(self, candidates: int) -> int:
        """Return how many detections there are at most."""
        return min(self.cfg.max_per_img, candidates)

    def candidates(self, outputs: Any, size: Size) -> tuple[Tensor, ...]:
        """Return boxes (B, K, 4) in pixels of the input, scores, labels and valid (B, K) of all levels."""
        parts = []
        logits, deltas, *factors = outputs
        for level, priors in enumerate(self.priors(logits)):
            scores, count = self.activated(_by_prior(logits[level], self.head.cls_out_channels)), self.cfg.nms_pre
            values = self.values(level, deltas[level])
            score, valid, place, label = chosen(scores, self.cfg.get("score_thr", 0), count)
            boxes = self.decoded(level, priors[place].flatten(0, 1), _rows(values, place).flatten(0, 1))
            if factors and factors[0] is not None:
                score = score * _rows(_by_prior(factors[0][level], 1).sigmoid(), place)[..., 0]
            parts.append((boxes.unflatten(0, place.shape), score, label, valid))
        boxes, scores, labels, valid = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        return self.inside(boxes, size), scores, labels, valid

    def priors(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Return the priors (N, 2 or 4) of each level."""
        sizes = [x.shape[-2:] for x in maps]
        return self.head.prior_generator.grid_priors(sizes, dtype=maps[0].dtype, device=maps[0].device)

    def activated(self, logits: Tensor) -> Tensor:
        """(B, N, classes) -> scores (B, N, C)."""
        return logits.sigmoid() if self.head.use_sigmoid_cls else logits.softmax(-1)[..., :-1]

    def values(self, level: int, deltas: Tensor) -> Tensor:  # noqa: ARG002
        """Return what `decoded` reads, (B, N, ...), of an output of the network."""
        return _by_prior(deltas, self.head.bbox_coder.encode_size)

    def decoded(self, level: int, priors: Tensor, values: Tensor) -> Tensor:  # noqa: ARG002
        """Priors (K, 2 or 4) and values (K, ...) -> boxes (K, 4)."""
        return self.head.bbox_coder.decode(priors, values)

    def inside(self, boxes: Tensor, size: Size) -> Tensor:
        """Clip boxes (B, K, 4) to the image, if the head does."""
        return clipped(boxes, size) if self.clip else boxes


class GFLSelection(Selection):
    """Distances are expected values of distributions."""

    def values(self, level: int, deltas: Tensor) -> Tensor:
        bins = torch.arange(self.head.reg_max + 1, device=deltas.device, dtype=deltas.dtype)  # its buffer has no ONNX
        shares = _by_prior(deltas, 4 * len(bins)).unflatten(-1, (4, len(bins))).softmax(-1)
        return shares @ bins * self.head.prior_generator.strides[level][0]

    def decoded(self, level: int, priors: Tensor, values: Tensor) -> Tensor:  # noqa: ARG002
        return self.head.bbox_coder.decode(self.head.anchor_center(priors), values)


class FoveaSelection(Selection):
    """Boxes end one pixel before the border."""

    def values(self, level: int, deltas: Tensor) -> Tensor:  # noqa: ARG002
        return _by_prior(deltas, 4)

    def decoded(self, level: int, priors: Tensor, values: Tensor) -> Tensor:
        return self.head._bbox_decode(priors, values, self.head.base_edge_list[level], (math.inf, math.inf))

    def inside(self, boxes: Tensor, size: Size) -> Tensor:
        return clipped(boxes, size, margin=1.0)


class RepPointsSelection(FoveaSelection):
    """Boxes of points, in units of the stride."""

    def decoded(self, level: int, priors: Tensor, values: Tensor) -> Tensor:
        return self.head._bbox_decode(priors, values, self.head.point_strides[level], (math.inf, math.inf))

    def inside(self, boxes: Tensor, size: Size) -> Tensor:
        return clipped(boxes, size)


class TOODSelection(FoveaSelection):
    """Scores are no logits, and boxes are sampled from the boxes nearby."""

    def outputs(self, levels: Sequence[Tensor]) -> Any:
        """As `TOODHead.forward`, for a free number of images."""
        head, scores, boxes = self.head, [], []
        for level, (x, anchors, scale) in enumerate(zip(levels, self.priors(levels), head.scales, strict=True)):
            stride, (batch, _, h, w) = head.prior_generator.strides[level][0], x.shape
            each = []
            for conv in head.inter_convs:
                x = conv(x)
                each.append(x)
            features = torch.cat(each, 1)
            mean = F.adaptive_avg_pool2d(features, (1, 1))
            logits = head.tood_cls(head.cls_decomp(features, mean))
            scores.append((logits.sigmoid() * head.cls_prob_module(features).sigmoid()).sqrt())
            raw = head.tood_reg(head.reg_decomp(features, mean))
            anchors = anchors.repeat(batch, 1)
            if head.anchor_type == "anchor_free":
                own = distance2bbox(head.anchor_center(anchors) / stride, _by_prior(scale(raw.exp()), 4).flatten(0, 1))
            else:
                own = head.bbox_coder.decode(anchors, _by_prior(scale(raw), 4).flatten(0, 1)) / stride
            own = own.reshape(batch, h, w, 4).permute(0, 3, 1, 2)
            moved = deformed(own, head.reg_offset_module(features), own.new_ones(4, 1, 1, 1), groups=4)
            wrong = (moved[:, :2] > moved[:, 2:]).any(1, keepdim=True)
            boxes.append(torch.where(wrong, own, moved))
        return scores, boxes

    def activated(self, logits: Tensor) -> Tensor:
        return logits

    def decoded(self, level: int, priors: Tensor, values: Tensor) -> Tensor:  # noqa: ARG002
        return values * self.head.prior_generator.strides[level][0]

    def inside(self, boxes: Tensor, size: Size) -> Tensor:  # noqa: ARG002
        return boxes


class PAASelection(Selection):
    """Candidates are priors with all their classes, and detections vote."""

    def detections(self, outputs: Any, size: Size, original: Size) -> tuple[Tensor, ...]:
        parts = []
        logits, deltas, factors = outputs
        for level, priors in enumerate(self.priors(logits)):
            scores = _by_prior(logits[level], self.head.cls_out_channels).sigmoid()
            scores = (scores * _by_prior(factors[level], 1).sigmoid()).sqrt()
            score, valid, place, _ = chosen(scores.amax(-1, keepdim=True), -1.0, self.cfg.nms_pre)
            values = _rows(_by_prior(deltas[level], 4), place)
            boxes = self.decoded(level, priors[place].flatten(0, 1), values.flatten(0, 1)).unflatten(0, score.shape)
            parts.append((boxes, torch.where(valid[..., None], _rows(scores, place), LOWEST)))
        boxes, scores = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
        boxes = rescaled(self.inside(boxes, size), size, original)
        threshold, classes = self.cfg.score_thr, scores.shape[-1]
        scores = torch.where(scores > threshold, scores, LOWEST).transpose(1, 2)  # (B, C, N)
        kept = kept_by_nms(boxes, scores, float(self.cfg.nms.iou_threshold)).flatten(1)
        index = torch.arange(scores[0].numel(), device=boxes.device).expand(scores.shape[0], -1)
        found, valid, index = best(scores.flatten(1), kept, self.number(index.shape[1]), index)
        labels, own = index // boxes.shape[1], _rows(boxes, index % boxes.shape[1])
        if self.head.with_score_voting:
            own = self.voted(own, boxes, _rows(scores, labels.clamp(max=classes - 1)))
        return blanked(own, found, labels, valid)

    @staticmethod
    def voted(own: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
        """Boxes (B, D, 4) and (B, N, 4), scores (B, D, N) in the class of each of the first -> averages (B, D, 4).

        A box without area stays, which in MMDetection becomes NaN.
        """
        low = torch.maximum(own[:, :, None, :2], boxes[:, None, :, :2])
        high = torch.minimum(own[:, :, None, 2:], boxes[:, None, :, 2:])
        shared = (high - low).clamp(min=0).prod(-1)
        areas = [(x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (own, boxes)]
        overlap = shared / (areas[0][:, :, None] + areas[1][:, None] - shared).clamp(min=1e-6)
        weights = torch.where((overlap > 0.01) & (scores > LOWEST), (-((1 - overlap) ** 2) / 0.025).exp() * scores, 0.0)
        total = weights.sum(-1, keepdim=True)
        return torch.where(total > 0, weights @ boxes / total, own)


class YOLOXSelection(Selection):
    """One class for each prior; all that NMS leaves are detections."""

    limited = False

    def candidates(self, outputs: Any, size: Size) -> tuple[Tensor, ...]:  # noqa: ARG002
        logits, deltas, objectness = outputs
        sizes = [x.shape[-2:] for x in logits]
        priors = self.head.prior_generator.grid_priors(sizes, device=logits[0].device, with_stride=True)
        scores, label = _joined(logits, self.head.cls_out_channels).sigmoid().max(-1)
        scores = scores * _joined(objectness, 1).sigmoid()[..., 0]
        boxes = self.head._bbox_decode(torch.cat(priors), _joined(deltas, 4))
        return boxes, scores, label, scores >= self.cfg.score_thr

    def number(self, candidates: int) -> int:
        return candidates


class YOLOV3Selection(Selection):
    """Objectness of its own threshold, and candidates of all levels together."""

    parts = ("logits",)

    def candidates(self, outputs: Any, size: Size) -> tuple[Tensor, ...]:  # noqa: ARG002
        head, (maps,) = self.head, outputs
        found = _joined(maps, head.num_attrib)
        priors = head.prior_generator.grid_priors([x.shape[-2:] for x in maps], device=found.device)
        strides = [x[:, :1].new_full(x[:, 0].shape, s) for x, s in zip(priors, head.featmap_strides, strict=True)]
        values = torch.cat((found[..., :2].sigmoid(), found[..., 2:4]), dim=-1)
        boxes = head.bbox_coder.decode(torch.cat(priors), values, torch.cat(strides)[:, None])
        objectness, scores = found[..., 4].sigmoid(), found[..., 5:].sigmoid()
        sure = objectness >= self.cfg.get("conf_thr", -1)
        scores = torch.where(sure[..., None], scores, LOWEST)
        score, valid, place, label = chosen(scores, self.cfg.get("score_thr", 0), self.cfg.nms_pre)
        return _rows(boxes, place), score * _rows(objectness[..., None], place)[..., 0], label, valid


SELECTIONS: dict[Any, type[Selection]] = {
    BaseDenseHead._predict_by_feat_single: Selection,
    GFLHead._predict_by_feat_single: GFLSelection,
    FoveaHead._predict_by_feat_single: FoveaSelection,
    RepPointsHead._predict_by_feat_single: RepPointsSelection,
    TOODHead._predict_by_feat_single: TOODSelection,
    PAAHead._predict_by_feat_single: PAASelection,
}
WHOLE: dict[Any, type[Selection]] = {
    YOLOXHead.predict_by_feat: YOLOXSelection,
    YOLOV3Head.predict_by_feat: YOLOV3Selection,
}


def selection_of(head: Any) -> type[Selection]:
    """Return how a head selects; ConfigError for one that does it by a method of its own."""
    kind = type(head)
    whole = getattr(kind, "predict_by_feat", None)
    if whole in WHOLE:
        return WHOLE[whole]
    found = SELECTIONS.get(getattr(kind, "_predict_by_feat_single", None))
    known = (BaseDenseHead.predict_by_feat, PAAHead.predict_by_feat)
    if found is None or whole not in known or kind.predict is not BaseDenseHead.predict:
        raise ConfigError(f"{kind.__name__} selects its results by a method of its own, which is not exported")
    return found


class OneStageGraph(DetectorGraph):
    """A one-stage detector; ConfigError for a head that selects in its own way, or not by plain NMS."""

    def __init__(self, model: Any, pixels: Pixels) -> None:
        kind = selection_of(model.bbox_head)
        super().__init__(model, pixels)
        self.selection = kind(self.model.bbox_head)
        self.coarsest = max(map(max, self.model.bbox_head.prior_generator.strides))
        for module in self.model.modules():
            if isinstance(module, DeformConv2d | ModulatedDeformConv2d):
                module.__class__ = FromSamples.of(type(module))

    def stages(self) -> list[str]:
        """Return the names of what `forward` returns after the results."""
        levels = range(self.model.bbox_head.prior_generator.num_levels)
        return [*self.layers, *(f"{name}_{level}" for name in ("level", *self.selection.parts) for level in levels)]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, 3) uint8 RGB -> boxes (B, D, 4), scores, labels and valid (B, D), and stages.

        Entries that are not valid are zero. Stages are the encoder's layers, the levels, and the head's outputs.
        """
        images, size = self.pixels(pixels)
        maps, levels = self.levels(images)
        outputs = self.selection.outputs(levels)
        found = self.selection.detections(outputs, size, (pixels.shape[1], pixels.shape[2]))
        return (*found, *maps, *levels, *(x for part in outputs[: len(self.selection.parts)] for x in part))


def chosen(scores: Tensor, threshold: float, count: int) -> tuple[Tensor, ...]:
    """Return the `count` best scores (B, count) of (B, N, C), which are valid, and their priors and classes.

    As `filter_scores_and_topk`; where there are fewer, the others are not valid.
    """
    batch, priors, classes = scores.shape
    flat = F.pad(scores.reshape(batch, -1), (0, count), value=LOWEST)
    index = torch.arange(priors * classes, device=scores.device)
    index = F.pad(index, (0, count)).expand(batch, -1)
    score, valid, index = best(flat, flat > threshold, count, index)
    return torch.where(valid, score, 0.0), valid, index // classes, index % classes


def _by_prior(x: Tensor, length: int) -> Tensor:
    """(B, A * length, h, w) -> (B, h * w * A, length)."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, length)


def _joined(maps: Sequence[Tensor], length: int) -> Tensor:
    return torch.cat([_by_prior(x, length) for x in maps], dim=1)


def _rows(values: Tensor, place: Tensor) -> Tensor:
    """(B, N, d) and places (B, K) -> (B, K, d)."""
    return values.gather(1, place[..., None].expand(-1, -1, values.shape[2]))
