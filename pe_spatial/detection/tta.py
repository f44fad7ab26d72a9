"""Test-time augmentation of boxes."""

from __future__ import annotations

from mmdet.models.test_time_augs import DetTTAModel
from mmdet.structures import DetDataSample
from mmengine.registry import MODELS


@MODELS.register_module()
class BoxTTA(DetTTAModel):
    """Merge the boxes of several views of an image; masks, which mmdet cannot merge, are left out."""

    def merge_preds(self, data_samples_list: list[list[DetDataSample]]) -> list[DetDataSample]:
        """Merge the views (inner lists) of each image into one sample without masks."""
        for views in data_samples_list:
            for view in views:
                view.pred_instances.pop("masks", None)
        return super().merge_preds(data_samples_list)
