"""Test-time augmentation of boxes."""

from typing import Any

from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS


@MODELS.register_module()
class BoxTTA(DetTTAModel):
    """Merge the boxes of several views of an image. Masks are not predicted, because mmdet cannot merge them."""

    def test_step(self, data: Any) -> list[DetDataSample]:
        roi_head: Any = getattr(self.module, "roi_head", None)
        mask_head = getattr(roi_head, "mask_head", None)
        if mask_head is None:
            return super().test_step(data)
        roi_head.mask_head = None
        try:
            return super().test_step(data)
        finally:
            roi_head.mask_head = mask_head
