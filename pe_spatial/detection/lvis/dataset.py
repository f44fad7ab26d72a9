"""LVIS v1 annotations, checked as COCO's are."""

from collections import Counter
from typing import Any, ClassVar

from mmdet.datasets import LVISV1Dataset
from mmengine.registry import DATASETS

from pe_spatial.detection.annotations import COCO_FIELDS, Fields, is_size, is_string, read_coco
from pe_spatial.detection.coco import CheckedCocoDataset

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in 1 to 10, 11 to 100, or more training images
# As the files spell them; mmdet corrects one.
CLASSES = tuple(name.replace("stereo_equipment", "stero_equipment") for name in LVISV1Dataset.METAINFO["classes"])
LVIS_FIELDS: Fields = {
    "images": {
        "id": lambda value: isinstance(value, int),
        "coco_url": lambda value: is_string(value) and "/" in value,
        "height": is_size,
        "width": is_size,
        "neg_category_ids": lambda value: isinstance(value, list),
        "not_exhaustive_category_ids": lambda value: isinstance(value, list),
    },
    "categories": {**COCO_FIELDS["categories"], "frequency": FREQUENCIES.__contains__},
    "annotations": {
        **COCO_FIELDS["annotations"],
        "image_id": lambda value: isinstance(value, int),
        "area": lambda value: isinstance(value, int | float),
        "segmentation": lambda value: isinstance(value, list),
    },
}


def read_lvis(path: str, **options: Any) -> tuple[dict[str, Any], Counter[str]]:
    """Read an LVIS v1 json and convert it to COCO's format.

    Images get the `file_name` that their address ends with ('train2017/000000000030.jpg'), because those of LVIS's val
    are in both folders. Categories are ordered by id, as in Detectron2. Args and errors as in `read_coco`.
    """
    content, counts = read_coco(path, fields=LVIS_FIELDS, **options)
    for image in content["images"]:
        image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    content["categories"].sort(key=lambda category: category["id"])
    return content, counts


@DATASETS.register_module()
class CheckedLVISDataset(CheckedCocoDataset):
    """LVIS v1 instances; args and checks as in `CheckedCocoDataset`.

    `metainfo['image_count']` is the number of images of each class, in the order of the labels, if the file has it.
    """

    METAINFO: ClassVar[dict[str, Any]] = {**LVISV1Dataset.METAINFO, "classes": CLASSES}

    def read_annotations(self) -> tuple[dict[str, Any], Counter[str]]:
        content, kinds = read_lvis(self.ann_file, **self._reading)
        classes = set(self.metainfo["classes"])
        counts = tuple(c.get("image_count") for c in content["categories"] if c["name"] in classes)
        if all(isinstance(count, int) for count in counts):
            self._metainfo["image_count"] = counts
        return content, kinds
