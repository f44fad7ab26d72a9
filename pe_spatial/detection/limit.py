"""Test on the first images of a dataset only, in minutes instead of hours."""

import json
import os
from pathlib import Path

from mmengine.config import Config

from pe_spatial.atomic import atomic_write
from pe_spatial.detection.coco import read_coco
from pe_spatial.errors import ConfigError


def limit_test(cfg: Config, number: int) -> None:
    """Limit the test of `cfg` to the first `number` images of its annotation file.

    They are written to the work folder as a COCO file, since a metric counts every image of its file. Raises
    ConfigError if the dataset or a metric does not read a COCO file.
    """
    dataset = cfg.test_dataloader.dataset
    evaluators = cfg.test_evaluator if isinstance(cfg.test_evaluator, list) else [cfg.test_evaluator]
    if number < 1 or "ann_file" not in dataset:
        raise ConfigError(f"first {number} images of {dataset.get('type')}: give at least 1, and a COCO dataset")
    full = os.path.join(dataset.get("data_root") or "", dataset.ann_file)
    metrics = [metric for metric in evaluators if "ann_file" in metric]
    others = [metric.ann_file for metric in metrics if os.path.abspath(metric.ann_file or "") != os.path.abspath(full)]
    if others or not metrics:
        raise ConfigError(
            f"the test reads {full} and is evaluated with {', '.join(map(str, others)) or 'no annotation file'}; "
            "set ann_file of test_evaluator to the same file to limit both"
        )
    part = Path(cfg.work_dir).resolve() / f"first_{number}_{Path(full).name}"
    content = read_coco(full, annotated=False)
    content["images"] = content["images"][:number]
    ids = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content.get("annotations", ()) if entry["image_id"] in ids]
    with atomic_write(part) as unfinished:  # every rank writes the file
        unfinished.write_text(json.dumps(content))
    dataset.ann_file = str(part)
    for metric in metrics:
        metric.ann_file = str(part)
