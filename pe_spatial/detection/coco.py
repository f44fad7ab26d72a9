"""COCO annotations and images, checked: errors name the file and the fix; unusable boxes are skipped and counted."""

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine import fileio
from mmengine.config import Config
from mmengine.fileio.backends import LocalBackend
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS

from pe_spatial.detection.annotations import IGNORED, SKIPPED, as_nfc, read_coco
from pe_spatial.engine.classes import add_imports
from pe_spatial.engine.loading import LoadCheckedImage, RefetchBrokenMixin
from pe_spatial.engine.nodes import use_checked
from pe_spatial.errors import ConfigError, DatasetError, listed


@DATASETS.register_module()
class CheckedCocoDataset(RefetchBrokenMixin, CocoDataset):
    """COCO instances, checked once when they are loaded.

    Boxes are clipped to their image; boxes outside it, smaller than a pixel or with numbers that are not finite are
    skipped and counted in the log. Files that are not COCO, unknown classes and missing images raise DatasetError.

    Args:
        skip_missing: omit and count missing images in training; an evaluation would count their objects as missed.
        left_out: classes whose objects are not learned, as if nobody had annotated them; they keep their labels.
        options: options of mmdet's `CocoDataset`.
    """

    COCOAPI: Any

    def __init__(
        self, *args: Any, skip_missing: bool = False, left_out: Sequence[str] = (), **options: Any
    ) -> None:
        self.skip_missing, self.left_out = skip_missing, as_nfc(left_out)
        super().__init__(*args, **options)
        if self.test_mode and any(getattr(step, "skip_broken", False) for step in self.pipeline.transforms):
            raise DatasetError(
                f"LoadCheckedImage(skip_broken=True) in the test pipeline of {self.ann_file}: a test cannot "
                "replace an image by another one; set skip_broken=False there"
            )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Read the cleaned annotations, check them against the config, then let mmdet parse them."""
        self._check_names()
        content, counts = self.read_annotations()
        self._check_classes(content)
        self._leave_out(content)
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
        if not self.test_mode and all(i["ignore_flag"] for entry in data_list for i in entry["instances"]):
            crowds = ". Single objects have iscrowd=0" if counts["crowds"] else ""
            raise DatasetError(
                f"{self.ann_file} has no object of the classes {listed(self.metainfo['classes'])} to learn; "
                f"not learned: {_described(counts, SKIPPED + IGNORED)}{crowds}"
            )
        return data_list

    def read_annotations(self) -> tuple[dict[str, Any], Counter[str]]:
        """Read the annotation file as `read_coco` does; subclasses read other formats here."""
        return read_coco(self.ann_file, **self._reading)

    @property
    def _reading(self) -> dict[str, Any]:
        masks = any(getattr(step, "with_mask", False) for step in self.pipeline.transforms)
        return dict(annotated=not self.test_mode, masks=masks, backend_args=self.backend_args)

    def filter_data(self) -> list[dict[str, Any]]:
        """Filter as mmdet does; DatasetError if no image remains."""
        kept = super().filter_data()
        if not kept:
            raise DatasetError(
                f"no image of {self.ann_file} has a usable box of the classes "
                f"{listed(list(self.metainfo['classes']))} (filter_cfg={self.filter_cfg}); see the counts logged above"
            )
        return kept

    def _check_names(self) -> None:
        classes = self.metainfo["classes"]
        if isinstance(classes, str):
            raise ConfigError(f"classes is the text {classes!r}; write ({classes!r},)")
        wrong = [name for name in classes if not isinstance(name, str)]
        if wrong or not classes:
            what = f"class {wrong[0]!r} is not a name" if wrong else "there is no class"
            raise ConfigError(f"{what}; give metainfo=dict(classes=('name', ...)) of the dataset")
        self._metainfo["classes"] = as_nfc(classes)
        twice = [name for name, count in Counter(self._metainfo["classes"]).items() if count > 1]
        if twice:
            raise ConfigError(f"classes has {twice[0]!r} twice; name each class once")

    def _check_classes(self, content: Mapping[str, Any]) -> None:
        # mmdet would drop unknown classes and silently renumber the others.
        classes = list(self.metainfo["classes"])
        names = [category["name"] for category in content["categories"]]
        absent = [name for name in classes if name not in names]
        if absent:
            new = 1 + max((category["id"] for category in content["categories"]), default=0)
            remedy = (
                f"add {json.dumps(dict(id=new, name=absent[0]), ensure_ascii=False)} and the like to its categories, "
                "in the order of the classes: a test set has all of them, also those without objects"
                if self.test_mode and len(absent) < len(classes)
                else "set metainfo=dict(classes=(...)) of all datasets, and num_classes of the heads, to the file's"
            )
            raise DatasetError(
                f"{self.ann_file} has no categories {listed(absent)}: the config has {listed(classes, 20)}, the file "
                f"has {listed(names, 20)}; {remedy}"
            )
        # mmdet numbers the labels as the file orders its categories, and names them as `classes` does.
        order = [name for name in names if name in classes]
        if order != classes:
            raise DatasetError(
                f"{self.ann_file} has its categories in the order {listed(order, 20)}, the classes are "
                f"{listed(classes, 20)}; set metainfo=dict(classes=(...)) in the file's order"
            )

    def _leave_out(self, content: dict[str, Any]) -> None:
        """Remove the annotations of the classes that are left out."""
        unknown = [name for name in self.left_out if name not in self.metainfo["classes"]]
        if unknown:
            classes = listed(self.metainfo["classes"], 20)
            raise ConfigError(f"left_out names {listed(unknown)}; the classes are {classes}")
        ids = {category["id"] for category in content["categories"] if category["name"] in self.left_out}
        content["annotations"] = [one for one in content["annotations"] if one["category_id"] not in ids]

    def _check_images(self, images: list[dict[str, Any]]) -> int:
        """Remove or report missing images; return their number."""
        folder = self.data_prefix.get("img", "")
        steps = [step for step in self.pipeline.transforms if isinstance(step, LoadCheckedImage | LoadImageFromFile)]
        backend_args = (steps and steps[0].backend_args) or self.backend_args
        if not isinstance(fileio.get_file_backend(folder, backend_args=backend_args), LocalBackend):
            return 0
        names: dict[str, set[str]] = {}  # listing each folder once is far cheaper than looking for each image

        def exists(file_name: str) -> bool:
            parent, name = os.path.split(os.path.normpath(os.path.join(folder, file_name)))
            if parent not in names:
                names[parent] = set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else set()
            return name in names[parent]

        for image in images:  # paths of Windows
            if "\\" in image["file_name"] and not exists(image["file_name"]):
                image["file_name"] = image["file_name"].replace("\\", "/")
        missing = [image for image in images if not exists(image["file_name"])]
        if missing and (self.test_mode or not self.skip_missing):
            files = listed([os.path.join(folder, image["file_name"]) for image in missing])
            remedy = "" if self.test_mode else ", or set skip_missing=True of the dataset to train without them"
            raise DatasetError(
                f"{len(missing)} of the {len(images)} images in {self.ann_file} are missing: {files}; "
                f"check data_root (--data-root) and data_prefix{remedy}"
            )
        ids = {image["id"] for image in missing}
        images[:] = [image for image in images if image["id"] not in ids]
        return len(missing)

    def _check_masks(self, content: Mapping[str, Any]) -> None:
        steps = self.pipeline.transforms
        polygons = [i for i, step in enumerate(steps) if getattr(step, "with_mask", False) and not step.poly2mask]
        runs = [a["id"] for a in content["annotations"] if not a["iscrowd"] and isinstance(a.get("segmentation"), dict)]
        if polygons and runs:
            loaders = ("val_dataloader", "test_dataloader") if self.test_mode else ("train_dataloader",)
            options = [f"{name}.dataset.pipeline.{i}.poly2mask=True" for name in loaders for i in polygons]
            raise DatasetError(
                f"{len(runs)} annotations of {self.ann_file} hold run-length masks, which LoadAnnotations("
                f"poly2mask=False) would drop; use --cfg-options {' '.join(options)}"
            )

    def _report(self, content: Mapping[str, Any], counts: Counter[str]) -> None:
        annotations = content["annotations"]
        empty = len(content["images"]) - len({a["image_id"] for a in annotations})
        ignored = _described(counts, IGNORED)
        MMLogger.get_current_instance().info(
            f"{self.ann_file}: {len(content['images'])} images ({empty} without boxes, {counts['missing']} missing), "
            f"{len(annotations)} boxes ({counts['clipped']} clipped); skipped boxes: "
            f"{_described(counts, SKIPPED) or 'none'}" + (f"; ignored: {ignored}" if ignored else "")
        )


def _described(counts: Mapping[str, int], kinds: Sequence[str]) -> str:
    return ", ".join(f"{counts[kind]} {kind}" for kind in kinds if counts[kind])


def use_checked_annotations(cfg: Config) -> None:
    """Let a config with MMDetection's CocoDataset and CocoMetric read cleaned annotations, inside wrappers too.

    The config then imports this package, so that it also runs with MMDetection's own tools. Sets that are meant to
    have no objects (`filter_empty_gt=False`: unlabeled images) stay as they are.
    """
    keys = [f"{split}_{part}" for split in ("train", "val", "test") for part in ("dataloader", "evaluator")]
    if cfg.get("default_scope") != "mmdet" or not any([_exchange(cfg.get(key)) for key in keys]):
        return
    add_imports(cfg, "pe_spatial.detection")


def _exchange(node: Any) -> bool:
    """Exchange the types in a part of a config, in place; return whether there were any."""
    if isinstance(node, list | tuple):
        return any([_exchange(item) for item in node])
    if not isinstance(node, dict):
        return False
    unlabeled = (node.get("filter_cfg") or {}).get("filter_empty_gt") is False
    if not unlabeled and use_checked(node):
        return True
    return any([_exchange(value) for value in node.values()])
