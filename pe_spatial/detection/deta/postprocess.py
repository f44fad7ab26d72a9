"""From the logits and boxes of a DETA decoder layer to detections in pixels, by any of the released suppressions."""

from collections.abc import Mapping, Sequence

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.structures import InstanceData
from torch import Tensor
from torchvision.ops import batched_nms

from pe_spatial.detection.soft_nms import METHODS, method_options, soft_nms
from pe_spatial.errors import ConfigError

_METHODS: dict[str | None, Mapping[str, float]] = {None: {}, "nms": {"iou_threshold": 0.7}}
_METHODS.update(METHODS)


def postprocess(
    logits: Tensor,
    boxes: Tensor,
    *,
    size: tuple[int, int],
    method: str | None = "nms",
    candidates: int | None = None,
    max_per_img: int | None = 100,
    class_ids: Sequence[int] | None = None,
    **options: float | None,
) -> InstanceData:
    """Return the `bboxes` (N, 4) in pixels, not clipped, `scores` and `labels` of one image, best first.

    Every pair of query and class is a candidate (perception_models@3e352cc:apps/detection/DETA_pe/models/
    deformable_detr.py). Plain NMS is torchvision's, which treats classes differently on CPUs and GPUs.

    Args:
        logits, boxes: (Q, C), before the sigmoid, and (Q, 4) as cx, cy, w, h, relative to the image.
        size: height and width of the original image.
        method: 'nms', a method of `soft_nms`, or None for no suppression.
        candidates: how many of the best enter the suppression; None for the released 10000 ('nms') or 2000 (soft).
        max_per_img: number of detections to return; None for all. The released code cuts to 100, but not after
            soft-NMS.
        class_ids: (C,), numbers that separate the classes during suppression, COCO category ids in the released
            detectors; None for the labels themselves. They influence the last digit of an IoU.
        options: options of the method: iou_threshold, quad_scale, sigma. ConfigError for one that it does not have.
    """
    chosen = method_options(method, options, _METHODS)
    if class_ids is not None and len(class_ids) != logits.shape[1]:
        raise ConfigError(
            f"class_ids has {len(class_ids)} entries for {logits.shape[1]} classes; give one for each, or None"
        )
    height, width = size
    scores = logits.float().sigmoid().flatten()
    if candidates is None:
        candidates = {None: max_per_img, "nms": 10000}.get(method, 2000)
    if candidates is not None and (len(scores) > candidates or method is None):
        scores, index = scores.topk(min(candidates, len(scores)))
    else:
        index = torch.arange(len(scores), device=scores.device)
    labels = index % logits.shape[1]
    corners = bbox_cxcywh_to_xyxy(boxes.float())
    corners = (corners * corners.new_tensor([width, height, width, height]))[index // logits.shape[1]]
    groups = labels if class_ids is None else labels.new_tensor(class_ids)[labels]
    if method is None:
        keep = scores.argsort(descending=True, stable=True)
    elif method == "nms":
        keep = batched_nms(corners, scores, groups, chosen["iou_threshold"])
    else:
        keep, decayed = soft_nms(corners, scores, groups, method=method, **chosen)
        scores = scores.scatter(0, keep, decayed)
    keep = keep[:max_per_img]
    return InstanceData(bboxes=corners[keep], scores=scores[keep], labels=labels[keep])
