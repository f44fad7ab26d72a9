"""Test on the first images of a set only: what takes hours on all of them, tried in minutes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pe_spatial.atomic import atomic_write
from pe_spatial.detection.coco import read_coco
from pe_spatial.errors import ConfigError


def limit_test(cfg: Config, number: int) -> None:
    """Have the test of `cfg` read and evaluate the first `number` images of its annotation file.

    They are written as a COCO file of their own to the work folder, since a metric counts every image of its file.
    ConfigError if the dataset or a metric reads no such file.
    """
    dataset = cfg.test_dataloader.dataset
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if number < 1 or "ann_file" not in dataset:
        raise ConfigError(f"the first {number} images of {dataset.get('type')}: give 1 or more, of a COCO dataset")
    whole = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
    wanting = [metric for metric in evaluators if "ann_file" in metric]
    others = [metric.ann_file for metric in wanting if os.path.abspath(metric.ann_file or "") != os.path.abspath(whole)]
    if others or not wanting:
        raise ConfigError(
            f"the test reads {whole} and is evaluated with {', '.join(map(str, others)) or 'no annotation file'}; "
            "set ann_file of test_evaluator to the same file to limit both"
        )
    part = Path(cfg.work_dir).resolve() / f"first_{number}_{Path(whole).name}"
    write_first(read_coco(whole, annotated=False), number, part)
    dataset.ann_file = str(part)
    for metric in wanting:
        metric.ann_file = str(part)


def write_first(content: Mapping[str, Any], number: int, path: Path) -> None:
    """Write the first `number` images of COCO's `content`, with their annotations and all categories, to `path`."""
    images = content["images"][:number]
    ids = {image["id"] for image in images}
    annotations = [entry for entry in content.get("annotations", ()) if entry["image_id"] in ids]
    with atomic_write(path) as unfinished:  # every rank writes the file
        unfinished.write_text(json.dumps({**content, "images": images, "annotations": annotations}))
