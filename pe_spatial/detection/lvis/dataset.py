"""LVIS v1 annotations, checked as COCO's are."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from mmdet.datasets import LVISV1Dataset
from mmengine.registry import DATASETS

from pe_spatial.detection.annotations import COCO_FIELDS, Fields, is_size, is_string, read_coco
from pe_spatial.detection.coco import CheckedCocoDataset
from pe_spatial.errors import one_of

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
    """LVIS v1 instances; checks as in `CheckedCocoDataset`.

    `metainfo['image_count']` is the number of images of each class, in the order of the labels, if the file has it; 0
    for a class that is left out, which `FederatedLoss` then does not train.

    Args:
        frequencies: groups of classes whose objects are learned, of 'r', 'c', 'f'; the others are left out. Without
            'r' it is the split of open-vocabulary detection (ViLD, arXiv 2104.13921).
        options: options of `CheckedCocoDataset`.
    """

    METAINFO: ClassVar[dict[str, Any]] = {**LVISV1Dataset.METAINFO, "classes": CLASSES}

    def __init__(self, *args: Any, frequencies: Sequence[str] = FREQUENCIES, **options: Any) -> None:
        for group in frequencies:
            one_of("frequencies", group, FREQUENCIES)
        self.frequencies = frequencies
        super().__init__(*args, **options)

    def read_annotations(self) -> tuple[dict[str, Any], Counter[str]]:
        content, kinds = read_lvis(self.ann_file, **self._reading)
        classes = set(self.metainfo["classes"])
        used = [category for category in content["categories"] if category["name"] in classes]
        rest = [category["name"] for category in used if category["frequency"] not in self.frequencies]
        self.left_out = tuple({*self.left_out, *rest})
        counts = tuple(0 if c["name"] in self.left_out else c.get("image_count") for c in used)
        if all(isinstance(count, int) for count in counts):
            self._metainfo["image_count"] = counts
        return content, kinds
