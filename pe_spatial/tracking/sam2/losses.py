"""SAM 2's training loss over all predictions for all frames of a clip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmengine.dist import all_reduce
from torch import Tensor


class Prediction(NamedTuple):
    """The mask decoder's output for N objects on a frame, with M candidates (1 or 3)."""

    masks: Tensor  # (N, M, H, W), logits
    ious: Tensor  # (N, M), predicted
    scores: Tensor  # (N, 1), logits that the object is in the frame


@dataclass(frozen=True, kw_only=True)
class MultiStepLoss:
    """Focal, dice, IoU and presence losses, summed over the predictions of all frames, divided by the object count.

    Of several candidates the one with the smallest focal and dice loss is trained. Masks and IoUs are trained if the
    object is in the frame, its presence always. Equal to facebookresearch/sam2@2b90b9f:training/loss_fns.py
    (`MultiStepMultiMasksAndIous`); the defaults are those of its training configs, not of that class.

    Args:
        mask_weight, dice_weight, iou_weight, score_weight: weights of the four losses.
        alpha, gamma: focal loss of masks.
        score_alpha, score_gamma: focal loss of presence; a negative alpha with gamma 0 is plain cross-entropy.
        all_ious: train the predicted IoU of all candidates instead of the best one's.
        iou_l1: use the absolute difference of IoUs instead of the square.
        predicts_scores: whether the model predicts presence; if not, every object counts as present.
    """

    mask_weight: float = 20.0
    dice_weight: float = 1.0
    iou_weight: float = 1.0
    score_weight: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0
    score_alpha: float = -1.0
    score_gamma: float = 0.0
    all_ious: bool = True
    iou_l1: bool = True
    predicts_scores: bool = True

    def __call__(self, frames: Sequence[Sequence[Prediction]], targets: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss_mask, loss_dice, loss_iou and loss_score.

        `frames` holds the predictions for each of T frames in order, `targets` is (T, N, H, W) bool. With several
        processes the losses are divided by the mean number of objects per process, so that the gradients
        averaged by DDP equal those of one process with all objects.
        """
        count = torch.tensor(float(targets.shape[1]), device=targets.device)
        all_reduce(count, op="mean")
        pairs = [(one, target[:, None]) for many, target in zip(frames, targets, strict=True) for one in many]
        sums = [self._losses(prediction, target) for prediction, target in pairs]
        weights = (self.mask_weight, self.dice_weight, self.iou_weight, self.score_weight)
        names = ("loss_mask", "loss_dice", "loss_iou", "loss_score")
        totals = (torch.stack(terms).sum() / count.clamp(min=1) for terms in zip(*sums, strict=True))
        return {name: total * weight for name, total, weight in zip(names, totals, weights, strict=True)}

    def _losses(self, prediction: Prediction, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sum the four losses over N objects; `target` is (N, 1, H, W)."""
        masks, truth = prediction.masks.float(), target.float().expand_as(prediction.masks)
        focal = _focal(masks, truth, self.alpha, self.gamma).mean((2, 3))  # (N, M), as all below
        dice = _dice(masks, truth)
        predicted = masks > 0
        true_iou = (predicted & target).sum((2, 3)) / (predicted | target).sum((2, 3)).clamp(min=1)
        off = prediction.ious.float() - true_iou
        iou = off.abs() if self.iou_l1 else off.square()
        best = (self.mask_weight * focal + self.dice_weight * dice).argmin(1, keepdim=True)
        focal, dice = focal.gather(1, best), dice.gather(1, best)
        iou = iou.mean(1, keepdim=True) if self.all_ious else iou.gather(1, best)
        if not self.predicts_scores:
            return focal.sum(), dice.sum(), iou.sum(), focal.new_zeros(())
        present = target.flatten(1).any(1, keepdim=True).float()
        score = _focal(prediction.scores.float(), present, self.score_alpha, self.score_gamma)
        return (focal * present).sum(), (dice * present).sum(), (iou * present).sum(), score.sum()


def _focal(logits: Tensor, target: Tensor, alpha: float, gamma: float) -> Tensor:
    """Return the focal loss (RetinaNet, eq. 5) of each element."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    missed = probability + target - 2 * probability * target  # 1 - p_t
    loss = entropy * missed**gamma
    return loss if alpha < 0 else loss * (1 - alpha + (2 * alpha - 1) * target)


def _dice(logits: Tensor, target: Tensor) -> Tensor:
    probability = logits.sigmoid()
    both = (probability * target).sum((2, 3))
    return 1 - (2 * both + 1) / (probability.sum((2, 3)) + target.sum((2, 3)) + 1)
