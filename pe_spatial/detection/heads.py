"""Heads of MMDetection that keep their delicate part in float32 under autocast."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import RPNHead
from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class Float32RPNHead(RPNHead):
    """RPNHead whose two predictors compute in float32 under autocast.

    In bfloat16 the scores of neighbouring anchors tie, and mmcv's NMS on CPUs takes float32 only. The convolutions
    before them, which are all of the cost, stay in the low precision.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, H, W) -> objectness (B, A, H, W) and box deltas (B, 4 A, H, W), both float32."""
        x = F.relu(self.rpn_conv(x))
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            return self.rpn_cls(x), self.rpn_reg(x)


@MODELS.register_module()
class Float32Linear(nn.Linear):
    """A linear layer in float32 under autocast, for `cls_predictor_cfg` and `reg_predictor_cfg` of box heads."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), float32."""
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())
