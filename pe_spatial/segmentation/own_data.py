"""Put an own dataset of objects with masks into a config for semantic segmentation: masks become label maps."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS, TRANSFORMS
from mmseg.datasets import BaseSegDataset

from pe_spatial.data.coco import decode_mask
from pe_spatial.data.colors import palette
from pe_spatial.data.dataset import OwnDataset
from pe_spatial.engine.classes import add_imports, set_classes
from pe_spatial.engine.nodes import EVALUATORS, LOADERS, leaves, pipelines, replace_dataset, steps, type_name
from pe_spatial.errors import ConfigError, DatasetError

BACKGROUND = "background"
NO_LABEL = 255

_DATASET_OPTIONS = ("pipeline", "test_mode", "serialize_data", "lazy_init", "max_refetch", "backend_args", "indices")


def apply_dataset(cfg: Config, dataset: OwnDataset, files: Mapping[str, Path]) -> list[str]:
    """Let a config of MMSegmentation train and evaluate on the masks of `dataset`; return sentences for the user.

    Label 0 is the background, the classes follow. Where masks overlap, the smaller object counts; crowds have no label.

    Args:
        cfg: merged config of mmseg or of this project; it is changed in place.
        dataset: as `open_dataset` returns it.
        files: COCO files of its splits, as `read_coco` cleans them.

    Raises:
        ConfigError: if the model does not learn label maps, or the data has no masks.
    """
    head = (cfg.get("model") or {}).get("decode_head")
    heads = head if isinstance(head, list | tuple) else [head or {}]
    if not any("num_classes" in one for one in heads):
        raise ConfigError(f"{cfg.filename} has no decode_head with num_classes, so it does not learn what --data has")
    if not dataset.has_masks:
        raise ConfigError(
            f"{cfg.filename} learns label maps, which are made of masks, but not every object of the data has one; "
            "take a config for detection"
        )
    classes = (BACKGROUND, *dataset.classes)
    notes = [f"masks become label maps of {len(classes)} classes, with {BACKGROUND} as the first"]
    for name in LOADERS:
        split = name.partition("_")[0] if name.startswith(tuple(files)) else "val"  # of a test part that is not there
        for leaf in leaves((cfg.get(name) or {}).get("dataset")):
            replace_dataset(
                leaf,
                keep=_DATASET_OPTIONS,
                type="ObjectSegDataset",
                ann_file=str(files[split]),
                data_prefix=dict(img_path=f"{dataset.splits[split].root}/"),
                metainfo=dict(classes=classes, palette=[(0, 0, 0), *palette(len(dataset.classes))]),
            )
    for pipeline in pipelines(cfg):
        for step in steps(pipeline):
            if type_name(step) == "LoadAnnotations":
                step.clear()
                step.update(type="LoadObjectLabels")
    for name in EVALUATORS:
        if cfg.get(name) and type_name(cfg[name]) != "IoUMetric":
            cfg[name] = ConfigDict(type="IoUMetric", iou_metrics=["mIoU"])
    set_classes(cfg, len(classes), notes)
    add_imports(cfg, "pe_spatial.engine", "pe_spatial.segmentation")
    return notes


@DATASETS.register_module()
class ObjectSegDataset(BaseSegDataset):
    """The images of a COCO file for MMSegmentation; `LoadObjectLabels` draws the masks of its objects as labels."""

    def load_data_list(self) -> list[dict[str, Any]]:
        content = json.loads(Path(self.ann_file).read_bytes())
        classes = self._metainfo["classes"]
        labels = {category["id"]: classes.index(category["name"]) for category in content["categories"]}
        objects: dict[Any, list[tuple[int, Any]]] = {image["id"]: [] for image in content["images"]}
        for one in sorted(content["annotations"], key=lambda one: -one["area"]):
            label = NO_LABEL if one["iscrowd"] else labels[one["category_id"]]
            objects[one["image_id"]].append((label, one.get("segmentation")))
        return [
            dict(
                img_path=f"{self.data_prefix['img_path']}{image['file_name']}",
                annotated_size=(image["height"], image["width"]),
                objects=objects[image["id"]],
                label_map=None,
                reduce_zero_label=False,
                seg_fields=[],
            )
            for image in content["images"]
        ]


@TRANSFORMS.register_module()
class LoadObjectLabels(BaseTransform):
    """Draw the masks of an `ObjectSegDataset` into a label map of the size of the image file: (H, W) uint8."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["annotated_size"]
        if results["ori_shape"][:2] != (height, width):
            raise DatasetError(
                f"{results['img_path']} is {results['ori_shape'][0]}x{results['ori_shape'][1]} (height x width), but "
                f"its annotations are for {height}x{width}; fix either"
            )
        labels = np.zeros((height, width), np.uint8)
        for label, segmentation in results["objects"]:
            if segmentation:
                labels[decode_mask(segmentation, (height, width))] = label
        results["gt_seg_map"] = labels
        results["seg_fields"].append("gt_seg_map")
        return results
