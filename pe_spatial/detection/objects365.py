"""Objects365 v2, checked as COCO is."""

from collections import Counter
from typing import Any

from mmengine.registry import DATASETS

from pe_spatial.detection.coco import CheckedCocoDataset
from pe_spatial.errors import DatasetError


@DATASETS.register_module()
class CheckedObjects365Dataset(CheckedCocoDataset):
    """Objects365 v2 instances; args as in `CheckedCocoDataset`, but the classes are those of the file.

    Some files have the published names of the classes and some corrected ones; the ids 1 to 365 are the same. Images
    are expected where the archives unpack: `patch8/objects365_v1_00420917.jpg`, even if a file has
    `images/v1/patch8/...`.
    """

    def read_annotations(self) -> tuple[dict[str, Any], Counter[str]]:
        content, counts = super().read_annotations()
        if [category["id"] for category in content["categories"]] != list(range(1, 366)):
            raise DatasetError(
                f"{self.ann_file} does not have the categories 1 to 365 of Objects365 v2, in this order; give a "
                "zhiyuan_objv2_*.json, or use CheckedCocoDataset for another set"
            )
        self._metainfo["classes"] = tuple(category["name"] for category in content["categories"])
        for image in content["images"]:
            image["file_name"] = "/".join(image["file_name"].split("/")[-2:])
        return content, counts
