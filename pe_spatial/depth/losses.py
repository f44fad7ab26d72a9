"""Losses on depth in meters: `loss(pred, target) -> scalar`, both (B, 1, H, W), where a target of 0 is missing.

All compute in float32, also under autocast, and give 0 with a gradient of 0 if no pixel is valid. All take `max_depth`
(inclusive, in meters), `loss_weight` and `across_ranks`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
import torch.distributed.nn
from mmengine.registry import MODELS
from torch import Tensor, nn

from pe_spatial.errors import ConfigError, one_of


class _DepthLoss(nn.Module):
    """What the losses share: weight, float32, the check of the sizes, and the mask of valid pixels.

    Args:
        max_depth: in meters; larger targets are ignored.
        loss_weight: factor of the loss.
        across_ranks: take sums and counts over all ranks, so that the loss is that of the complete batch. In the
            released code each rank takes its own, and the loss depends on how a batch is distributed over devices.
    """

    def __init__(self, *, max_depth: float | None = None, loss_weight: float = 1.0, across_ranks: bool = False) -> None:
        super().__init__()
        self.max_depth, self.loss_weight, self.across_ranks = max_depth, loss_weight, across_ranks

    def forward(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return the weighted loss, a float32 scalar, of pred (B, 1, H, W) > 0 against target (B, 1, H, W)."""
        if pred.shape != target.shape:
            shapes = f"the prediction is {tuple(pred.shape)} and the target {tuple(target.shape)}"
            raise ValueError(f"{shapes}; resize the prediction to the target, both (B, 1, H, W)")
        pred, target = pred.float(), target.float()  # autocast changes none of the operations below
        valid = (target > 0) & (target <= (self.max_depth or torch.inf))
        return self.loss_weight * self.compute(pred, target, valid)

    def compute(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        raise NotImplementedError

    def _sums(self, *values: Tensor) -> list[Tensor]:
        if not (self.across_ranks and torch.distributed.is_available() and torch.distributed.is_initialized()):
            return list(values)
        # Its gradient is a sum over ranks; the mean over ranks in DDP makes it that of the complete batch.
        return list(torch.distributed.nn.all_reduce(torch.stack(values)))

    def _slopes(self, difference: Tensor, valid: Tensor, *, strides: Sequence[int], step: int) -> Tensor:
        """Sum over scales the mean absolute change of `difference` (B, 1, H, W) over `step` pixels along both axes.

        The mean is over the valid pixels of a scale, not over the pairs.
        """
        total = difference.new_zeros(())
        for stride in strides:
            d, v = difference[..., ::stride, ::stride], valid[..., ::stride, ::stride]
            rows = (d[..., step:, :] - d[..., :-step, :]).abs() * (v[..., step:, :] & v[..., :-step, :])
            columns = (d[..., step:] - d[..., :-step]).abs() * (v[..., step:] & v[..., :-step])
            change, number = self._sums(rows.sum() + columns.sum(), v.sum(dtype=torch.float32))
            total = total + change / number.clamp(min=1)
        return total

    def extra_repr(self) -> str:
        options = {name: value for name, value in vars(self).items() if name != "training" and name[0] != "_"}
        return ", ".join(f"{name}={value!r}" for name, value in options.items())


@MODELS.register_module()
class SigLoss(_DepthLoss):
    """Scale-invariant logarithmic error of a batch, as DINOv2 and DINOv3 train with.

    sqrt(var(g) + 0.15 mean(g)^2), where g = ln(pred + 0.001) - ln(target + 0.001) over all valid pixels of the batch
    and var divides by N - 1. The first `warm_up` training steps, 100 in the released code, omit the variance
    (dinov2@b8931f7:dinov2/eval/depth/models/losses/sigloss.py); checkpoints hold the count.
    """

    EPS = 1e-3
    calls: Tensor

    def __init__(self, *, warm_up: int = 100, **options: Any) -> None:
        super().__init__(**options)
        self.warm_up = warm_up
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def compute(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        g = _log_difference(pred, target, valid, eps=self.EPS)
        count, total = self._sums(valid.sum(dtype=torch.float32), g.sum())
        mean = total / count.clamp(min=1)
        (squares,) = self._sums(torch.where(valid, g - mean, 0).square().sum())
        spread = squares / (count - 1).clamp(min=1)
        spread = spread * (self.calls >= self.warm_up)
        if self.training:
            self.calls += 1
        return _safe_sqrt(spread + 0.15 * mean.square())


@MODELS.register_module()
class GradientLoss(_DepthLoss):
    """Difference between the slopes of prediction and target, along both axes of the image, at four scales.

    With D = ln(pred + 0.001) - ln(target + 0.001) on every 1st, 2nd, 4th and 6th pixel: |D(y) - D(y + 2)| summed over
    the pairs of which both pixels are valid, along rows and columns, divided by the number of valid pixels of the batch
    (dinov3@6876159:dinov3/eval/depth/loss.py). DINOv2's loss slices the first two axes, batch and channel, and so is 0
    for two images per device; its recipe gives it a weight of 0.5. `log` compares logarithms, as in the recipe, or else
    depths.
    """

    EPS = 1e-3
    STRIDES = (1, 2, 4, 6)

    def __init__(self, *, log: bool = True, **options: Any) -> None:
        super().__init__(**options)
        self.log = log

    def compute(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        difference = _log_difference(pred, target, valid, eps=self.EPS) if self.log else pred - target
        return self._slopes(torch.where(valid, difference, 0), valid, strides=self.STRIDES, step=2)


@MODELS.register_module()
class SiLog(_DepthLoss):
    """Scale-invariant logarithmic error of each image, averaged over the images with valid pixels.

    sqrt(mean(d^2) - variance_focus mean(d)^2) with d = ln(pred) - ln(target): with 0.5 MMSegmentation's SiLogLoss, and
    with 0.85 the error of BTS, except for its factor of 10 and its mean over the batch; 0 gives the root mean square, 1
    ignores the scale. Predictions are at least 1e-6.
    """

    EPS = 1e-6

    def __init__(self, *, variance_focus: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        if not 0 <= variance_focus <= 1:
            raise ConfigError(f"variance_focus is {variance_focus}; give a value from 0 to 1")
        self.variance_focus = variance_focus

    def compute(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        d = _log_difference(pred.clamp(min=self.EPS), target, valid, eps=0.0)
        count = valid.sum((1, 2, 3))
        mean, square = (x.sum((1, 2, 3)) / count.clamp(min=1) for x in (d, d.square()))
        images = _safe_sqrt(square - self.variance_focus * mean.square())
        total, number = self._sums(images.sum(), (count > 0).sum(dtype=torch.float32))
        return total / number.clamp(min=1)


@MODELS.register_module()
class ScaleAndShiftInvariantLoss(_DepthLoss):
    """Squared error and slopes after the best scale and shift of each image, for relative depth.

    Half the mean squared error over the valid pixels of the batch, plus `slopes` times the differences of neighbors at
    strides 1, 2, 4 and 8 (MiDaS, arXiv 1907.01341v3, sections 5 and B, with least squares; its authors' published
    loss). Gradients also pass through scale and shift.

    Args:
        space: what is predicted up to scale and shift: 'disparity' (1 / depth, as in MiDaS) or 'depth'.
        slopes: weight of the differences of neighbors.
    """

    STRIDES = (1, 2, 4, 8)

    def __init__(self, *, space: str = "disparity", slopes: float = 0.5, **options: Any) -> None:
        super().__init__(**options)
        self.space = one_of("space", space, ("disparity", "depth"))
        self.slopes = slopes

    def compute(self, pred: Tensor, target: Tensor, valid: Tensor) -> Tensor:
        if self.space == "disparity":
            target = 1 / torch.where(valid, target, 1)
        count = valid.sum((1, 2, 3), keepdim=True).clamp(min=1)

        def mean(x: Tensor) -> Tensor:
            return torch.where(valid, x, 0).sum((1, 2, 3), keepdim=True) / count  # (B, 1, 1, 1)

        pred, target = pred - mean(pred), target - mean(target)  # the best shift
        spread = mean(pred.square())
        scale = mean(pred * target) / torch.where(spread > 0, spread, 1)
        difference = torch.where(valid, scale * pred - target, 0)
        squares, number = self._sums(difference.square().sum(), valid.sum(dtype=torch.float32))
        loss = squares / (2 * number.clamp(min=1))
        return loss + self.slopes * self._slopes(difference, valid, strides=self.STRIDES, step=1)


def _log_difference(pred: Tensor, target: Tensor, valid: Tensor, *, eps: float) -> Tensor:
    """Return ln(pred + eps) - ln(target + eps), and 0 without a gradient at invalid pixels."""
    return torch.where(valid, (pred + eps).log() - (target + eps).log(), 0)


def _safe_sqrt(x: Tensor) -> Tensor:
    """Return the square root, or |x| if x <= 0 by rounding, so that the gradient stays finite."""
    return torch.where(x > 0, torch.where(x > 0, x, 1).sqrt(), x.abs())
