"""A few labeled images or videos, in any form that the project reads, to measure frozen features on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from pe_spatial.data.coco import decode_mask
from pe_spatial.data.dataset import Split, open_dataset
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import image_suffixes, is_hidden, read_rgb
from pe_spatial.synthetic import CATEGORIES
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.datasets import davis_clips

NO_CLASS = 255
"""Value of pixels that do not count in a map of classes."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image and what is known of it; nothing is read before it is needed.

    Args:
        name: for messages.
        rgb: returns (H, W, 3) uint8.
        classes: returns (H, W) uint8, `NO_CLASS` where nothing is known; None without classes.
        depth: returns (H, W) float32 in meters, 0 where nothing is known; None without depth.
    """

    name: str
    rgb: Callable[[], np.ndarray]
    classes: Callable[[], np.ndarray] | None = None
    depth: Callable[[], np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Material:
    """What features are measured on.

    Args:
        train, val: images for the probes, and to score them.
        classes: number of classes, background included; 0 without classes.
        clips: videos whose first frame has a mask; frames with a mask beside it are scored.
    """

    train: Sequence[Example] = ()
    val: Sequence[Example] = ()
    classes: int = 0
    clips: Sequence[Clip] = field(default=())

    @property
    def tasks(self) -> tuple[str, ...]:
        """What can be measured: 'segmentation', 'depth', 'tracking', or without labels 'correspondence'."""
        found = ["segmentation"] if self.classes else []
        found += ["depth"] if self.val and self.val[0].depth else []
        found += ["tracking"] if self.clips else []
        return tuple(found or ["correspondence"])

    def at_most(self, images: int, clips: int, frames: int) -> Material:
        """Return evenly spaced images of each part and clips, and of these the first frames."""
        shortened = [_shortened(clip, frames) for clip in evenly(self.clips, clips)]
        return replace(self, train=evenly(self.train, images), val=evenly(self.val, images), clips=shortened)


def evenly(values: Sequence[Any], number: int) -> list[Any]:
    """Return at most `number` values, evenly spaced."""
    count = min(number, len(values))
    return [values[i] for i in np.linspace(0, len(values) - 1, count).round().astype(int)] if count else []


def _shortened(clip: Clip, frames: int) -> Clip:
    return replace(clip, frames=clip.frames[:frames]) if isinstance(clip.frames, tuple) else clip


def open_material(path: str | Path) -> Material:
    """Read data in any form, or that of a config.

    Args:
        path: a config (.py) of detection, segmentation, depth or tracking; a folder of the synthetic world; of videos
            in DAVIS' layout; of images with labels in a form of docs/own_data.md, or without labels; or a table (.csv)
            of pairs of image and depth.

    Raises DatasetError for what is none of these, and for fewer than two images.
    """
    named, path = str(path), Path(path)
    if not path.exists() and "::" not in named:
        raise DatasetError(f"{path} does not exist; give a config, a folder, a COCO JSON or a table of depth pairs")
    if path.suffix == ".py":
        material = read_config_data(read_config(named))
    elif (path / "world.json").is_file():
        material = read_world(path)
    elif (path / "JPEGImages").is_dir() and (path / "Annotations").is_dir() and not _has_xml(path):
        material = Material(clips=_with_objects(path))
    elif path.suffix == ".csv":
        material = _depth_pairs(dict(type="DepthPairDataset", ann_file=path.name, data_root=str(path.parent)))
    elif path.is_dir() and not _labeled(path):
        material = _split([Example(name=str(p), rgb=partial(read_rgb, p)) for p in _images(path)], str(path))
    else:
        material = read_objects(path)
    if not material.clips and min(len(material.train), len(material.val)) < 1:
        raise DatasetError(f"{path} has fewer than two images; one part is for the probes, the other scores them")
    return material


def _has_xml(path: Path) -> bool:
    return any((path / "Annotations").glob("*.xml"))


def _with_objects(path: Path) -> list[Clip]:
    lists = sorted((path / "ImageSets").glob("*.txt")) if (path / "ImageSets").is_dir() else []
    full = next((file for file in lists if file.stem == "full_gt"), None)
    return davis_clips(path, full.read_text().split() if full else None)


def _images(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in image_suffixes())
    return [path for path in found if not is_hidden(path, folder)]


def _labeled(folder: Path) -> bool:
    return any(path.suffix in (".json", ".xml", ".yaml", ".yml") for path in folder.rglob("*"))


def _split(examples: Sequence[Example], source: str, **about: Any) -> Material:
    """Take every second image for the probes."""
    if len(examples) < 2:
        raise DatasetError(f"{source} has {len(examples)} of the two images needed: one for the probes, one to score")
    return Material(train=examples[::2], val=examples[1::2], **about)


def read_world(root: Path) -> Material:
    """Return images of the synthetic world with classes and depth, and its scenes of three frames or more as clips."""
    world = json.loads((root / "world.json").read_text())
    held_out = next((split for split in ("val", "test") if split in world["scenes"]), None)
    if held_out is None:
        raise DatasetError(f"{root} has no split val to score on; render one: --val 50")
    clips = davis_clips(root, folders=(held_out, f"instances/{held_out}")) if world["frames_per_scene"] > 2 else []
    if "train" not in world["scenes"]:
        return Material(clips=clips)
    train, val = (_world_examples(root, split) for split in ("train", held_out))
    return Material(train=train, val=val, classes=len(CATEGORIES) + 1, clips=clips)


def _world_examples(root: Path, split: str) -> list[Example]:
    coco = json.loads((root / f"annotations/instances_{split}.json").read_text())
    objects: dict[int, dict[int, int]] = {image["id"]: {} for image in coco["images"]}
    for one in coco["annotations"]:
        objects[one["image_id"]][one["object_id"]] = one["category_id"]
    examples = []
    for image in coco["images"]:
        name = Path(image["file_name"])
        ids, depth = (root / kind / split / name.with_suffix(".png") for kind in ("instances", "depth"))
        examples.append(
            Example(
                name=str(name),
                rgb=partial(read_rgb, root / split / name),
                classes=partial(_object_classes, ids, objects[image["id"]]),
                depth=partial(_millimeters, depth),
            )
        )
    return examples


def _object_classes(path: Path, categories: Mapping[int, int]) -> np.ndarray:
    """Return the category of each pixel; objects that are too small to be annotated do not count."""
    table = np.full(256, NO_CLASS, np.uint8)
    table[0] = 0
    for number, category in categories.items():
        table[number] = category
    return table[np.asarray(Image.open(path))]


def _millimeters(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(np.float32) / 1000


def read_objects(path: Path) -> Material:
    """Return the images of an own dataset; masks, or boxes where there are none, become maps of classes."""
    dataset = open_dataset(path)
    train, val = (_objects(split) for split in (dataset.train, dataset.val))
    return Material(train=train, val=val, classes=len(dataset.classes) + 1)


def _objects(split: Split) -> list[Example]:
    numbers = {category["id"]: i + 1 for i, category in enumerate(split.content["categories"])}
    objects: dict[Any, list[Any]] = {image["id"]: [] for image in split.content["images"]}
    for one in split.content["annotations"]:
        objects[one["image_id"]].append((NO_CLASS if one.get("iscrowd") else numbers[one["category_id"]], one))
    return [
        Example(
            name=image["file_name"],
            rgb=partial(read_rgb, split.root / image["file_name"]),
            classes=partial(_draw, objects[image["id"]], (image["height"], image["width"])),
        )
        for image in split.content["images"]
    ]


def _draw(objects: Sequence[tuple[int, Mapping[str, Any]]], size: tuple[int, int]) -> np.ndarray:
    """Draw objects, the largest first."""
    classes = np.zeros(size, np.uint8)
    for number, one in sorted(objects, key=lambda pair: -pair[1]["bbox"][2] * pair[1]["bbox"][3]):
        shape = one.get("segmentation")
        if not shape:
            x, y, w, h = (max(0, round(value)) for value in one["bbox"])
            classes[y : y + h, x : x + w] = number
            continue
        classes[decode_mask(shape, size)] = number
    return classes


def read_config_data(cfg: Config) -> Material:
    """Return what a config trains and evaluates on; its images are read as files, without its transforms."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    test = (cfg.get("test_dataloader") or {}).get("dataset") or {}
    if test.get("type") == "VideoDataset":
        return Material(clips=DATASETS.build(test).clips)
    if not cfg.get("train_dataloader") or not cfg.get("val_dataloader"):
        raise ConfigError(
            f"{cfg.filename} has no train_dataloader and val_dataloader to take images from; give the data"
        )
    parts: dict[str, list[Example]] = {}
    for split in ("train", "val"):
        dataset = cfg[f"{split}_dataloader"].dataset
        load = [
            step
            for step in cfg.val_dataloader.dataset.get("pipeline", ())
            if str(step.type).rpartition(".")[2].startswith("Load")
        ]
        parts[split] = _config_examples(DATASETS.build({**dataset, "pipeline": load, "test_mode": True}), cfg)
    head = cfg.model.get("decode_head") or {}
    classes = head.get("num_classes", 0) if parts["val"][0].classes else 0
    return Material(train=parts["train"], val=parts["val"], classes=classes)


def _config_examples(dataset: Any, cfg: Config) -> list[Example]:
    first = dataset[0]
    found = {"classes": "gt_seg_map", "depth": "gt_depth_map"}
    present = {name: key for name, key in found.items() if key in first}
    if not present:
        raise ConfigError(
            f"{cfg.filename} has neither maps of classes nor depth; give the data itself, such as its COCO file"
        )
    examples = []
    for i in range(len(dataset)):
        labels: dict[str, Any] = {name: partial(_from_dataset, dataset, i, key) for name, key in present.items()}
        examples.append(Example(name=f"image {i}", rgb=partial(_bgr_to_rgb, dataset, i), **labels))
    return examples


def _from_dataset(dataset: Any, index: int, key: str) -> np.ndarray:
    return np.asarray(dataset[index][key])


def _bgr_to_rgb(dataset: Any, index: int) -> np.ndarray:
    return np.ascontiguousarray(dataset[index]["img"][..., ::-1])


def _depth_pairs(dataset: Mapping[str, Any]) -> Material:
    import pe_spatial.depth  # noqa: F401  (registers)

    load = [dict(type=LoadCheckedImage), dict(type="LoadDepth")]
    built = DATASETS.build({**dataset, "pipeline": load, "test_mode": True})
    examples = _config_examples(built, Config(filename=None))
    return _split(examples, str(dataset["ann_file"]))
