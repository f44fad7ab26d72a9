"""What a detector will see: contact sheets of own datasets, and of a config's images after augmentation."""

import io
import random
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.structures.bbox import get_box_tensor
from mmdet.structures.mask import PolygonMasks
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from pe_spatial.data import OwnDataset, write_splits
from pe_spatial.data.coco import decode_mask
from pe_spatial.data.sheet import Example, Statistics, draw_sheet
from pe_spatial.detection.annotations import IGNORED, SKIPPED, read_coco
from pe_spatial.engine.configs import as_config_error
from pe_spatial.errors import ConfigError
from pe_spatial.images import decode_rgb, read_bytes


def browse_dataset(dataset: OwnDataset, path: str | Path, *, split: str, count: int, seed: int) -> list[str]:
    """Draw `count` images of a split as they are, with the objects that remain after cleaning.

    Returns:
        The lines of text on the sheet: the summary, the notes, what was cleaned.
    """
    if split not in dataset.splits:
        raise ConfigError(f"the dataset has no {split} part; it has {', '.join(dataset.splits)}")
    lines = [dataset.summary(), *dataset.notes]
    contents = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, file in write_splits(dataset, folder).items():
            contents[name], counts = read_coco(str(file), annotated=False, masks=dataset.has_masks)
            lines.append(f"{name}: {describe_counts(counts)}")
    labels = {category["id"]: i for i, category in enumerate(contents[split]["categories"])}
    own: dict[Any, list[dict[str, Any]]] = {}
    for annotation in contents[split]["annotations"]:
        own.setdefault(annotation["image_id"], []).append(annotation)
    examples = []
    for image in _choose(contents[split]["images"], count, seed):
        objects = own.get(image["id"], [])
        file = dataset.splits[split].root / image["file_name"]
        boxes = np.array([a["bbox"] for a in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        examples.append(Example(
            image=decode_rgb(read_bytes(file), str(file), size=(image["height"], image["width"])),
            boxes=boxes,
            labels=[labels[a["category_id"]] for a in objects],
            masks=[
                decode_mask(mask, (image["height"], image["width"])) if isinstance(mask, dict) else mask
                for mask in (a.get("segmentation") for a in objects)
            ],
            title=f"{image['file_name']} ({image['width']}x{image['height']})",
        ))  # fmt: skip
    draw_sheet(path, examples, dataset.classes, _statistics(contents, len(dataset.classes)), lines)
    return lines


def browse_config(cfg: Config, path: str | Path, *, split: str, count: int, seed: int) -> list[str]:
    """Draw `count` images of a config's dataset as its pipeline hands them to the model: resized, flipped, cropped.

    Returns:
        The lines of text on the sheet.
    """
    loader = cfg.get(f"{split}_dataloader")
    if cfg.get("default_scope", "mmdet") != "mmdet":
        raise ConfigError(f"{cfg.filename} is for {cfg.default_scope}; browse draws the boxes of detection configs")
    if not loader:
        raise ConfigError(f"{cfg.filename} has no {split}_dataloader; choose another --split")
    init_default_scope(cfg.get("default_scope", "mmdet"))
    random.seed(seed)
    np.random.seed(seed)  # of augmentations
    with as_config_error(cfg.filename), redirect_stdout(io.StringIO()):  # pycocotools prints
        dataset = DATASETS.build(loader.dataset)
        dataset.full_init()
    classes = dataset.metainfo.get("classes")
    if not classes:
        raise ConfigError(f"{cfg.filename}: {loader.dataset.type} has no classes; browse draws detection datasets")
    infos = [dataset.get_data_info(i).get("instances", []) for i in range(len(dataset))]
    learned = [[i for i in instances if not i.get("ignore_flag")] for instances in infos]
    counts = Counter(i["bbox_label"] for instances in learned for i in instances)
    boxes = [i["bbox"] for instances in learned for i in instances]
    statistics = Statistics(
        {split: [counts[i] for i in range(len(classes))]},
        [max(0, (right - x) * (bottom - y)) ** 0.5 for x, y, right, bottom in boxes],
        [len(instances) for instances in learned],
    )
    examples = [_as_trained(dataset[i]) for i in _choose(range(len(dataset)), count, seed)]
    numbers = f"{len(dataset)} images, {len(boxes)} objects"
    lines = [f"{Path(cfg.filename).name}: {numbers} in the {split} set; images as its pipeline hands them to the model"]
    inner = dataset
    while hasattr(inner, "dataset"):
        inner = inner.dataset
    if hasattr(inner, "read_annotations"):
        lines.append(f"{Path(inner.ann_file).name}: {describe_counts(inner.read_annotations()[1])}")
    draw_sheet(path, examples, classes, statistics, lines)
    return lines


def describe_counts(counts: Mapping[str, int]) -> str:
    """Say what cleaning did to the boxes of an annotation file."""
    kinds = [(f"{counts[kind]} {kind}", kind in IGNORED) for kind in (*SKIPPED, *IGNORED) if counts[kind]]
    skipped = ", ".join(text for text, ignored in kinds if not ignored) or "none"
    ignored = ", ".join(text for text, ignored in kinds if ignored) or "none"
    return f"boxes clipped: {counts['clipped']}; skipped: {skipped}; ignored: {ignored}"


def _choose(values: Sequence[Any], count: int, seed: int) -> list[Any]:
    return random.Random(seed).sample(list(values), min(count, len(values)))


def _statistics(contents: Mapping[str, dict[str, Any]], classes: int) -> Statistics:
    per_class, sides, per_image = {}, [], []
    for split, content in contents.items():
        labels = {category["id"]: i for i, category in enumerate(content["categories"])}
        objects = [a for a in content["annotations"] if not a["iscrowd"]]
        counts = Counter(labels[a["category_id"]] for a in objects)
        per_class[split] = [counts[i] for i in range(classes)]
        sides += [(a["bbox"][2] * a["bbox"][3]) ** 0.5 for a in objects]
        own = Counter(a["image_id"] for a in objects)
        per_image += [own[image["id"]] for image in content["images"]]
    return Statistics(per_class, sides, per_image)


def _as_trained(item: Mapping[str, Any]) -> Example:
    sample = item["data_samples"]
    objects = sample.gt_instances
    pixels = item["inputs"].numpy().transpose(1, 2, 0)
    masks = objects.get("masks")
    if isinstance(masks, PolygonMasks):
        masks = masks.masks
    elif masks is not None:
        masks = list(masks.to_ndarray())
    return Example(
        image=pixels[..., ::-1].clip(0, 255).astype(np.uint8),  # pipelines have BGR
        boxes=get_box_tensor(objects.bboxes).numpy().astype(np.float64),
        labels=objects.labels.tolist(),
        masks=masks or [],
        title=f"{Path(sample.get('img_path', '')).name} ({pixels.shape[1]}x{pixels.shape[0]})",
    )
