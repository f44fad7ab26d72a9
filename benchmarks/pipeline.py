"""Measure the training pipeline of the detection configs beside MMDetection's stock one, in the same run.

Both read the same images with masks, resize them by large-scale jitter and crop 1024 px. Ours decodes and resizes with
Pillow as Detectron2 does; the stock pipeline uses OpenCV, without antialiasing. They take turns, image by image, with
the same random numbers; times are CPU times of this process.

    python benchmarks/pipeline.py FOLDER_OF_COCO_TINY
"""

import argparse
import copy
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import mmdet
import numpy as np
import PIL
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope

import pe_spatial.detection  # noqa: F401  (registers)

CONFIG = Path(__file__).parents[1] / "configs" / "_base_" / "datasets" / "coco_instance_lsj_1024.py"


def stock(pipeline: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return MMDetection's pipeline of large-scale jitter, for ours."""
    size, filters = (1024, 1024), [step for step in pipeline if step["type"] == "FilterAnnotations"]
    return [
        dict(type="LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=False),
        dict(type="RandomResize", scale=size, ratio_range=(0.1, 2.0), resize_type="Resize", keep_ratio=True),
        dict(type="RandomCrop", crop_type="absolute", crop_size=size, recompute_bbox=True, allow_negative_crop=True),
        *filters,
        dict(type="RandomFlip", prob=0.5),
        dict(type="PackDetInputs"),
    ]


def run(steps: list[Any], sample: dict[str, Any], seed: int, spent: dict[str, list[float]]) -> float:
    """Run a pipeline on a sample; return its CPU seconds and note those of each step in `spent`."""
    np.random.seed(seed)
    total = 0.0
    for step in steps:
        start = time.process_time()
        sample = step(sample)
        seconds = time.process_time() - start
        spent[type(step).__name__].append(seconds)
        total += seconds
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="COCO folder with train2017/ and annotations/")
    parser.add_argument("--samples", type=int, default=300, help="draws of each side (default: 300)")
    args = parser.parse_args()
    cv2.setNumThreads(1)
    init_default_scope("mmdet")
    config = Config.fromfile(str(CONFIG))
    dataset = DATASETS.build({**config.train_dataloader.dataset, "data_root": str(args.folder)})
    pipelines = [config.train_pipeline, stock(config.train_pipeline)]
    sides = [[TRANSFORMS.build(step) for step in pipeline] for pipeline in pipelines]
    times: list[tuple[float, float]] = []
    spent: list[dict[str, list[float]]] = [defaultdict(list), defaultdict(list)]
    for i in range(args.samples):
        sample = dataset.get_data_info(i % len(dataset))
        pair = [0.0, 0.0]
        for side in (0, 1) if i % 2 else (1, 0):
            pair[side] = run(sides[side], copy.deepcopy(sample), i, spent[side])
        times.append((pair[0], pair[1]))
    print(f"mmdet {mmdet.__version__}, Pillow {PIL.__version__}, OpenCV {cv2.__version__}, {len(times)} draws\n")
    print("| CPU ms an image | ours | stock |\n|---|---|---|")
    means = [1e3 * statistics.mean(column) for column in zip(*times, strict=True)]
    print(f"| all | {means[0]:.2f} | {means[1]:.2f}: ratio {means[0] / means[1]:.2f} |")
    for name in dict.fromkeys([*spent[0], *spent[1]]):
        cells = (f"{1e3 * sum(side[name]) / len(times):.2f}" if name in side else "-" for side in spent)
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
