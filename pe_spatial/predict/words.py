"""Detections whose classes are words: proposals or detections of any detector, named by a PE-Core."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.dataset import pseudo_collate
from torch import Tensor
from torchvision.ops import batched_nms, nms

from pe_spatial.errors import ConfigError
from pe_spatial.language.regions import RegionClassifier
from pe_spatial.predict.predictor import Predictor
from pe_spatial.predict.results import Detections

if TYPE_CHECKING:
    from pe_spatial.predict.predictor import DetectionPredictor, ObjectPredictor

PROPOSALS = 100
"""The best proposals of an image that are named."""


class NamedPredictor(Predictor):
    """A detector whose classes are the names of a `RegionClassifier`.

    Args:
        base: the predictor of the detector, or of SAM 2.
        classifier: names regions.
        proposals: name class-agnostic proposals (an RPN's, DETA's, SAM 2's masks); otherwise the detections.
    """

    task = "detection"

    def __init__(self, base: ObjectPredictor, classifier: RegionClassifier, *, proposals: bool) -> None:
        super().__init__(base.model, device=base.device, dtype=base.dtype)
        self.base, self.classifier, self.proposals = base, classifier, proposals
        self.score, self.class_names = base.score, classifier.names

    def _prepare(self, rgb: np.ndarray) -> tuple[Any, np.ndarray]:
        return self.base._prepare(rgb), rgb

    def _shape(self, item: tuple[Any, np.ndarray]) -> Any:
        return self.base._shape(item[0])

    def _predict(self, items: Sequence[tuple[Any, np.ndarray]]) -> list[Detections]:
        inputs, images = zip(*items, strict=True)
        found = self.base._propose(inputs, images) if self.proposals else self.base._predict(inputs)
        return [self._named(one, rgb) for one, rgb in zip(found, images, strict=True)]

    def _named(self, found: Detections, rgb: np.ndarray) -> Detections:
        named = name_regions(found, rgb, self.classifier)
        if self.proposals:
            boxes, scores = torch.from_numpy(named.boxes), torch.from_numpy(named.scores)
            named = named.select(batched_nms(boxes, scores, torch.from_numpy(named.labels), 0.5).numpy())
        return named.filter(score=self.score)


def name_regions(found: Detections, rgb: np.ndarray, classifier: RegionClassifier) -> Detections:
    """Return the detections under the names of a classifier; those that are background are dropped.

    The score is that of the detection times the probability of its name.
    """
    masks = None if found.crops is None else (crop.full(found.image_size) for crop in found.crops)
    probabilities = classifier(rgb, found.boxes, masks)
    labels = probabilities.argmax(1)
    scores = (found.scores * probabilities[np.arange(len(labels)), labels]).astype(np.float32)
    named = replace(found, labels=labels, scores=scores, class_names=(*classifier.names, *classifier.background))
    kept = named.select(labels < len(classifier.names))
    return replace(kept, class_names=classifier.names)


@torch.inference_mode()
def propose(base: DetectionPredictor, items: Sequence[Any], images: Sequence[np.ndarray]) -> list[Detections]:
    """Return the best class-agnostic proposals of a detector; ConfigError for one that has none."""
    model = getattr(base.model, "module", base.model)
    with base._precision():
        data = model.data_preprocessor(pseudo_collate(items), False)
        inputs, samples = data["inputs"], data["data_samples"]
        if hasattr(model, "pre_decoder") and hasattr(model, "nms_iou_threshold"):
            found = _of_deta(model, inputs, samples)
        elif getattr(model, "with_rpn", False):
            results = model.rpn_head.predict(model.extract_feat(inputs), samples, rescale=True)
            found = [(result.bboxes, result.scores) for result in results]
        else:
            raise ConfigError(
                f"a {type(model).__name__} has no class-agnostic proposals; name its detections (proposals=False)"
            )
    return [_detections(*one, rgb) for one, rgb in zip(found, images, strict=True)]


def _of_deta(model: Any, inputs: Tensor, samples: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
    levels = model.extract_feat(inputs)
    with torch.autocast(inputs.device.type, enabled=False):
        proposals = model.forward_transformer(levels, samples)["proposals"]
    found = []
    for boxes, logits, anchors, sample in zip(
        proposals["enc_boxes"], proposals["enc_logits"], proposals["anchors"], samples, strict=True
    ):
        valid = ~anchors.eq(1).all(-1)  # others are in the padding or too close to a border
        height, width = sample.ori_shape[:2]
        corners = bbox_cxcywh_to_xyxy(boxes[valid].float()).clamp(0, 1) * boxes.new_tensor([width, height] * 2)
        scores, best = logits[valid, 0].float().sigmoid().topk(min(1000, int(valid.sum())))
        kept = nms(corners[best], scores, 0.7)
        found.append((corners[best][kept], scores[kept]))
    return found


def _detections(boxes: Tensor, scores: Tensor, rgb: np.ndarray) -> Detections:
    best = scores.topk(min(PROPOSALS, len(scores))).indices
    return Detections(
        boxes=boxes[best].float().cpu().numpy().reshape(-1, 4),
        scores=scores[best].float().cpu().numpy(),
        labels=np.zeros(len(best), np.int64),
        class_names=("object",),
        image_size=(rgb.shape[0], rgb.shape[1]),
    )
