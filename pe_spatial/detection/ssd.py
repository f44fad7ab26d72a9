"""SSD's head of MMDetection, which there trains but cannot predict."""

from mmdet.models.dense_heads import SSDHead
from mmengine.registry import MODELS


@MODELS.register_module()
class PredictingSSDHead(SSDHead):
    """MMDetection 3.3's `SSDHead` with the attribute that its prediction asks for (open-mmlab/mmdetection#11063)."""

    loss_cls = None
