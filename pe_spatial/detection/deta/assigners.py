"""DETA's assigners, both by IoU. Boxes are (cx, cy, w, h) in 0..1 of the unpadded input.

Source: perception_models@3e352cc:apps/detection/DETA_pe/models/assigner.py.
"""

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.registry import TASK_UTILS
from torch import Tensor
from torchvision.ops import box_iou

from pe_spatial.errors import ConfigError

Match = tuple[Tensor, Tensor]  # indices (M,) of boxes, and (M,) of the object that each of them predicts


class DETAAssigner:
    """Match each object with the boxes of highest IoU, as many as a random choice of positives gives it.

    A box is positive if its IoU with an object is high enough, or the highest of that object; it counts for the object
    that it overlaps most. An object with c chosen positives is matched with the min(c, topk) boxes of highest IoU,
    whichever object they count for, so one box may predict two objects.

    Args:
        pos_iou: least IoU of a positive box, in (0, 1].
        topk: largest number of boxes for one object.
    """

    def __init__(self, *, pos_iou: float, topk: int) -> None:
        if not 0 < pos_iou <= 1 or topk < 1:
            raise ConfigError(f"pos_iou={pos_iou} must be in (0, 1], topk={topk} at least 1")
        self.pos_iou = pos_iou
        self.topk = topk

    def max_positives(self, num_boxes: int) -> int:
        """Return the number of positives to choose from `num_boxes` boxes."""
        raise NotImplementedError

    def positives(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """IoU (G, N) of at least one object -> the best object (N,) of each box, and whether it is positive (N,).

        If no box overlaps an object, its highest IoU is 0 and every box is positive.
        """
        highest, best = iou.max(dim=0)
        is_best = (iou == iou.amax(dim=1, keepdim=True)).any(dim=0)
        return best, (highest >= self.pos_iou) | is_best

    @torch.no_grad()
    def assign(self, boxes: Tensor, objects: Tensor, *, permutation: Tensor | None = None) -> Match:
        """Boxes (N, 4) and objects (G, 4) -> the matches, ordered by object and then by decreasing IoU.

        Args:
            boxes: anchors or proposals.
            objects: ground truth; an object without area overlaps nothing.
            permutation: (P,), the order in which the P positives are chosen; random by default.
        """
        if not len(objects):
            empty = boxes.new_zeros(0, dtype=torch.long)
            return empty, empty
        # NaN where neither has an area
        iou = box_iou(bbox_cxcywh_to_xyxy(objects), bbox_cxcywh_to_xyxy(boxes)).nan_to_num(nan=0)
        best, positive = self.positives(iou)
        index = positive.nonzero().squeeze(1)
        if permutation is None:
            permutation = torch.randperm(len(index), device=index.device)
        index = index[permutation[: self.max_positives(len(boxes))]]
        counts = best[index].bincount(minlength=len(objects))  # (G,)
        highest = iou.topk(min(self.topk, len(boxes)), dim=1).indices  # (G, topk)
        matched = torch.arange(highest.shape[1], device=counts.device) < counts[:, None]
        return highest[matched], matched.nonzero()[:, 0]


@TASK_UTILS.register_module()
class DETAFirstStageAssigner(DETAAssigner):
    """Match anchors with objects to train the proposals of the encoder.

    Args:
        pos_iou, topk: see `DETAAssigner`.
        num_positives: largest number of positives in an image.
    """

    def __init__(self, *, pos_iou: float = 0.7, topk: int = 4, num_positives: int = 128) -> None:
        super().__init__(pos_iou=pos_iou, topk=topk)
        self.num_positives = num_positives

    def max_positives(self, num_boxes: int) -> int:  # noqa: ARG002  (the second stage needs it)
        return self.num_positives


@TASK_UTILS.register_module()
class DETASecondStageAssigner(DETAAssigner):
    """Match the proposals that the decoder starts from with objects, once for all of its layers.

    Args:
        pos_iou, topk: see `DETAAssigner`.
        pos_fraction: largest fraction of positive proposals, in [0, 1].
    """

    def __init__(self, *, pos_iou: float = 0.6, topk: int = 4, pos_fraction: float = 0.25) -> None:
        super().__init__(pos_iou=pos_iou, topk=topk)
        self.pos_fraction = pos_fraction

    def max_positives(self, num_boxes: int) -> int:
        return int(num_boxes * self.pos_fraction)
