"""Measure images per second of a predictor beside MMDetection's DetInferencer, and what its steps take.

python benchmarks/predict.py                 # 500 images of 480 x 640 px, the demo's detector with random heads

Both sides read the same files with the same config and weights, one image at a time, and must find the same boxes. They
take turns, in groups of images; ratios are medians over neighboring groups: below 1 we are faster. CPU time depends
less on what else the machine does.
"""

from __future__ import annotations

import argparse
import io
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.registry import MODELS, VISUALIZERS, init_default_scope
from PIL import Image

import pe_spatial
from pe_spatial.engine.configs import read_config
from pe_spatial.images import read_rgb

GROUP = 10  # images
CONFIG = "pe_spatial::pe_demo_cascade_synthetic.py"


def write_images(folder: Path, number: int) -> list[str]:
    """Write smooth noise as JPEG."""
    rng, files = np.random.default_rng(0), []
    for i in range(number):
        small = rng.integers(0, 255, (24, 32, 3), np.uint8)
        Image.fromarray(cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC)).save(folder / f"{i:03d}.jpg")
        files.append(str(folder / f"{i:03d}.jpg"))
    return files


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def build(folder: Path) -> tuple[Any, Any]:
    """Return our predictor and MMDetection's, of one checkpoint."""
    cfg = read_config(CONFIG)
    init_default_scope("mmdet")
    from mmdet.apis import DetInferencer

    torch.manual_seed(0)
    meta = dict(dataset_meta=dict(classes=cfg.classes), cfg=cfg.pretty_text)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta=meta), folder / "w.pth")
    cfg.dump(folder / "c.py")
    theirs = DetInferencer(str(folder / "c.py"), str(folder / "w.pth"), device="cpu", show_progress=False)
    return pe_spatial.load(folder / "w.pth"), theirs


def check(results: Any, others: Any) -> None:
    for result, other in zip(results, others, strict=True):
        np.testing.assert_allclose(result.boxes, np.array(other["bboxes"], np.float32).reshape(-1, 4), atol=1e-3)


def measure_steps(ours: Any, files: list[str]) -> dict[str, list[float]]:
    """Return the milliseconds of each step, for each image."""
    visualizer = VISUALIZERS.build(dict(type="mmdet.DetLocalVisualizer", name="benchmark"))
    visualizer.dataset_meta = dict(classes=ours.class_names, palette="random")
    steps: dict[str, list[float]] = {}
    for file in files:
        decoding, rgb = seconds(partial(read_rgb, file))
        preparing, item = seconds(partial(ours._prepare, rgb))
        network, (result,) = seconds(partial(ours._predict, [item]))
        shown = result.filter(score=float(np.sort(result.scores)[-10:][0]) if len(result) else 0)  # at most ten objects
        drawing, _ = seconds(partial(shown.draw, rgb))
        with torch.inference_mode():
            (sample,) = ours.model.test_step(dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]))
        sample.pred_instances = sample.pred_instances[: len(shown)]
        options: Any = dict(name="x", image=rgb, data_sample=sample, draw_gt=False, pred_score_thr=0)
        theirs, _ = seconds(partial(visualizer.add_datasample, **options))
        values = dict(decoding=decoding, preparing=preparing, network=network, drawing=drawing)
        for name, value in (values | {"drawing by MMDetection": theirs}).items():
            steps.setdefault(name, []).append(1000 * value)
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=500, help="number of images (default: 500)")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder), args.images)
        with redirect_stdout(io.StringIO()):
            ours, theirs = build(Path(folder))
        options: Any = dict(no_save_vis=True, no_save_pred=True, print_result=False)
        check(ours(files[:3]), theirs(files[:3], **options)["predictions"])
        sides = {"predictor": ours, "DetInferencer": partial(theirs, **options)}
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for start in range(0, len(files), GROUP):
            group = files[start : start + GROUP]
            for name in sorted(sides, reverse=bool(start // GROUP % 2)):
                cpu = time.process_time()
                wall, _ = seconds(partial(sides[name], group))
                taken[name].append((wall / len(group), (time.process_time() - cpu) / len(group)))
        steps = measure_steps(ours, files[:GROUP])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    peers = taken["DetInferencer"]
    print(f"\n{len(files)} images of 480 x 640 px, {len(peers)} groups in turns\n")
    print("| side | images/s | ratio of time | ratio of CPU time |\n|---|---|---|---|")
    for name, mine in taken.items():
        walls, cpus = ([a[k] / b[k] for a, b in zip(mine, peers, strict=True)] for k in (0, 1))
        speed = 1 / statistics.median(wall for wall, _ in mine)
        print(f"| {name} | {speed:.2f} | {statistics.median(walls):.2f} | {statistics.median(cpus):.2f} |")
    print("\n| step | ms |\n|---|---|")
    for name, values in steps.items():
        print(f"| {name} | {statistics.median(values):.1f} |")


if __name__ == "__main__":
    main()
