"""COCO annotations and images, checked: errors name the file and the fix; unusable boxes are skipped and counted."""

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine import fileio
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS

from pe_spatial.engine.loading import LoadCheckedImage, RefetchBrokenMixin
from pe_spatial.errors import DatasetError

_NAMED = 5  # how many items an error lists before 'and N more'
_ROUNDING = 0.5  # pixels by which a box may leave its image without being counted as clipped


@DATASETS.register_module()
class CheckedCocoDataset(RefetchBrokenMixin, CocoDataset):
    """COCO instances, checked once when they are loaded.

    Boxes are clipped to their image; boxes outside it, smaller than a pixel or with numbers that are not finite are
    skipped and counted in the log. Files that are not COCO, unknown classes and missing images raise DatasetError.

    Args:
        skip_missing: omit and count missing images in training; an evaluation would count their objects as missed.
        options: options of mmdet's `CocoDataset`.
    """

    COCOAPI: Any

    def __init__(self, *args: Any, skip_missing: bool = False, **options: Any) -> None:
        self.skip_missing = skip_missing
        super().__init__(*args, **options)
        if self.test_mode and any(getattr(step, "skip_broken", False) for step in self.pipeline.transforms):
            raise DatasetError(
                f"LoadCheckedImage(skip_broken=True) in the test pipeline of {self.ann_file}: a test cannot "
                "replace an image by another one; set skip_broken=False there"
            )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read, check and clean the annotation file, then let mmdet parse it."""
        content = self.read_annotations()
        self._check_classes(content)
        counts = clean_coco(content, self.ann_file)
        counts.update(missing=self._check_images(content["images"]))
        self._check_masks(content)
        coco = self.COCOAPI()
        coco.dataset = content
        coco.createIndex()
        coco.img_ann_map, coco.cat_img_map = coco.imgToAnns, coco.catToImgs
        self.COCOAPI = lambda _: coco  # mmdet calls it with the path of the file
        try:
            data_list = super().load_data_list()
        finally:
            del self.COCOAPI
        self._report(content, counts)
        return data_list

    def read_annotations(self) -> dict[str, Any]:
        """Read the annotation file; subclasses convert other formats to COCO's here."""
        return read_coco(self.ann_file, annotated=not self.test_mode, backend_args=self.backend_args)

    def filter_data(self) -> list[dict[str, Any]]:
        """Filter as mmdet does; DatasetError if no image remains."""
        kept = super().filter_data()
        if not kept:
            raise DatasetError(
                f"no image of {self.ann_file} has a usable box of the classes "
                f"{_listed(list(self.metainfo['classes']))} (filter_cfg={self.filter_cfg}); see the counts logged above"
            )
        return kept

    def _check_classes(self, content: Mapping[str, Any]) -> None:
        # mmdet would drop unknown classes and silently renumber the others.
        classes = list(self.metainfo["classes"])
        names = [category["name"] for category in content["categories"]]
        absent = [name for name in classes if name not in names]
        if absent:
            raise DatasetError(
                f"{self.ann_file} has no categories {_listed(absent)}; it has {_listed(names, 20)}. "
                "Set metainfo=dict(classes=(...)) of the datasets, and num_classes of the heads, to those"
            )
        # mmdet numbers the labels as the file orders its categories, and names them as `classes` does.
        order = [name for name in names if name in classes]
        if order != classes:
            raise DatasetError(
                f"{self.ann_file} has its categories in the order {_listed(order, 20)}, the classes are "
                f"{_listed(classes, 20)}; set metainfo=dict(classes=(...)) in the file's order, "
                "and name each category once"
            )

    def _check_images(self, images: list[dict[str, Any]]) -> int:
        """Remove or report missing images; return their number."""
        folder = self.data_prefix.get("img", "")
        steps = [step for step in self.pipeline.transforms if isinstance(step, LoadCheckedImage | LoadImageFromFile)]
        backend_args = (steps and steps[0].backend_args) or self.backend_args
        if not isinstance(fileio.get_file_backend(folder, backend_args=backend_args), LocalBackend):
            return 0
        listed: dict[str, set[str]] = {}  # listing each folder once is far cheaper than looking for each image

        def exists(image: Mapping[str, Any]) -> bool:
            parent, name = os.path.split(os.path.join(folder, image["file_name"]))
            if parent not in listed:
                listed[parent] = set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else set()
            return name in listed[parent]

        missing = [image for image in images if not exists(image)]
        if missing and (self.test_mode or not self.skip_missing):
            files = _listed([os.path.join(folder, image["file_name"]) for image in missing])
            remedy = "" if self.test_mode else ", or set skip_missing=True of the dataset to train without them"
            raise DatasetError(
                f"{len(missing)} of the {len(images)} images in {self.ann_file} are missing: {files}; "
                f"check data_root (--data-root) and data_prefix{remedy}"
            )
        ids = {image["id"] for image in missing}
        images[:] = [image for image in images if image["id"] not in ids]
        return len(missing)

    def _check_masks(self, content: Mapping[str, Any]) -> None:
        loaders = [step for step in self.pipeline.transforms if getattr(step, "with_mask", False)]
        objects = [a for a in content.get("annotations", ()) if not a.get("iscrowd")] if loaders else []
        without = [a["id"] for a in objects if not a.get("segmentation")]
        if without:
            raise DatasetError(
                f"{len(without)} annotations of {self.ann_file} have no segmentation (ids {_listed(without)}), but the "
                "pipeline loads masks; add them, or train a detector without masks (with_mask=False, no mask head)"
            )
        encoded = [a["id"] for a in objects if isinstance(a["segmentation"], Mapping)]
        if encoded and not all(getattr(step, "poly2mask", True) for step in loaders):
            raise DatasetError(
                f"{len(encoded)} annotations of {self.ann_file} hold run-length masks (ids {_listed(encoded)}), which "
                "LoadAnnotations(poly2mask=False) would drop; set poly2mask=True"
            )

    def _report(self, content: Mapping[str, Any], counts: Counter[str]) -> None:
        annotations = content.get("annotations", [])
        empty = len(content["images"]) - len({a["image_id"] for a in annotations})
        skipped = ", ".join(f"{counts[kind]} {kind}" for kind in _SKIPPED if counts[kind]) or "none"
        MMLogger.get_current_instance().info(
            f"{self.ann_file}: {len(content['images'])} images ({empty} without boxes, {counts['missing']} missing), "
            f"{len(annotations)} boxes ({counts['clipped']} clipped); skipped boxes: {skipped}"
        )


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_id(value: Any) -> bool:
    return isinstance(value, int | str)


def is_size(value: Any) -> bool:
    return _is_number(value) and value > 0


Fields = Mapping[str, Mapping[str, Callable[[Any], object]]]
COCO_FIELDS: Fields = {
    "images": {"id": is_id, "file_name": lambda x: is_string(x) and x, "height": is_size, "width": is_size},
    "categories": {"id": is_id, "name": is_string},
    "annotations": {"id": is_id, "image_id": is_id, "category_id": is_id, "bbox": lambda _: True},  # see clean_coco
}


def read_coco(
    path: str, *, annotated: bool, backend_args: Mapping[str, Any] | None = None, fields: Fields = COCO_FIELDS
) -> dict[str, Any]:
    """Read a COCO json and check its structure; DatasetError if the file is missing or is not COCO json.

    Args:
        path: a file, or an address of mmengine's file backends.
        annotated: whether it must contain annotations (a test set need not).
        backend_args: options of mmengine's file backend.
        fields: the lists that the file must contain, and a check for each key of their entries.
    """
    try:
        content = json.loads(fileio.get_text(path, backend_args=backend_args))
    except FileNotFoundError:
        raise DatasetError(f"no annotation file at {path}; check data_root (--data-root) and ann_file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text ({error}); give a COCO json") from error
    except json.JSONDecodeError as error:
        raise DatasetError(f"{path} is not valid json ({error}); download or write it again") from error
    for name, keys in fields.items():
        if name == "annotations" and not annotated and name not in content:
            continue
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DatasetError(
                f"{path} is not a COCO instance file: it has no list {name!r}; give an instances_*.json "
                "(for LVIS, an lvis_v1_*.json)"
            )
        for i, entry in enumerate(content[name]):
            absent = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if absent:
                raise DatasetError(f"{path}: {name}[{i}] has no {', '.join(absent)}; fix or remove it")
            wrong = [key for key, holds in keys.items() if not holds(entry[key])]
            if wrong:
                raise DatasetError(f"{path}: {name}[{i}] has {wrong[0]} {entry[wrong[0]]!r}; fix or remove it")
        twice = [key for key, count in Counter(entry["id"] for entry in content[name]).items() if count > 1]
        if twice:
            raise DatasetError(f"{path}: {name} contains ids more than once ({_listed(twice)}); make them unique")
    if not content["images"] or (annotated and not content["annotations"]):
        what = "images" if not content["images"] else "annotations, so there is nothing to learn from it"
        raise DatasetError(f"{path} contains no {what}; give the file of an annotated set")
    return content


_SKIPPED = ("outside", "smaller than a pixel", "not finite", "of unknown images")


def clean_coco(content: dict[str, Any], path: str) -> Counter[str]:
    """Clip boxes to their images and remove unusable ones, in place.

    Returns how many boxes were 'clipped' (by more than rounding), and skipped for each reason. Raises DatasetError for
    category ids that the file does not define.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    defined = {category["id"] for category in content["categories"]}
    annotations = content.get("annotations", [])
    unknown = Counter(a["category_id"] for a in annotations if a["category_id"] not in defined)
    if unknown:
        raise DatasetError(
            f"{path}: {unknown.total()} annotations have category ids that the file does not define "
            f"({_listed(sorted(unknown, key=str))}); add these categories or remove the annotations"
        )
    counts: Counter[str] = Counter()
    kept = []
    for annotation in annotations:
        size = sizes.get(annotation["image_id"])
        if size is None:
            counts["of unknown images"] += 1
            continue
        box, kind = _clip(annotation["bbox"], *size)
        counts[kind] += 1
        if box is None:
            continue
        annotation["bbox"], area = box, annotation.get("area")
        annotation["area"] = area if _is_number(area) and area > 0 else box[2] * box[3]
        annotation.setdefault("iscrowd", 0)
        kept.append(annotation)
    if annotations:
        content["annotations"] = kept
    return counts


def _clip(box: Any, width: float, height: float) -> tuple[list[float] | None, str]:
    """Return the part of `box` (x, y, w, h) inside the image, or None if unusable, and how to count it."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)):
        return None, "not finite"
    x, y, w, h = box
    left, top, right, bottom = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if w > 0 and h > 0 and (right <= left or bottom <= top):
        return None, "outside"
    if right - left < 1 or bottom - top < 1:
        return None, "smaller than a pixel"
    moved = max(left - x, top - y, x + w - right, y + h - bottom)
    return [left, top, right - left, bottom - top], "clipped" if moved > _ROUNDING else "unchanged"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(values: list[Any], limit: int = _NAMED) -> str:
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more
