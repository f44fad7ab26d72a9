"""The main job on the embedded world: render, train, evaluate, draw. At most ten minutes on two CPU cores.

    make demo        or        pe-spatial demo
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from mmengine.registry import VISUALIZERS
from mmengine.runner import Runner
from PIL import Image

from pe_spatial.engine.configs import move_data_root, read_config
from pe_spatial.engine.runner import build_runner
from pe_spatial.errors import DatasetError
from pe_spatial.synthetic import write_dataset

CONFIG = "pe_spatial::pe_demo_cascade_synthetic.py"
SCENES = {"train": 400, "val": 60}  # two images each, from disjoint seeds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--work-dir", type=Path, default=Path("work_dirs/demo"), help="folder of the results (work_dirs/demo)"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes that render")


def draw(runner: Runner, out: Path, count: int) -> None:
    """Write an image of `count` test images in two columns: ground truth beside predictions, each."""
    dataset = runner.val_dataloader.dataset
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="demo"))
    visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    pairs = []
    for i in np.linspace(0, len(dataset) - 1, count).astype(int):
        item = dataset[i]
        with torch.no_grad():
            (result,) = runner.model.test_step(dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]))
        rgb = np.asarray(Image.open(item["data_samples"].img_path).convert("RGB"))
        visualizer.add_datasample("demo", rgb, result.cpu(), draw_gt=True, draw_pred=True, pred_score_thr=0.4)
        pairs.append(visualizer.get_image())
    rows = [np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, count, 2)]
    Image.fromarray(np.concatenate(rows)).save(out)


def run(args: argparse.Namespace) -> None:
    clock = time.time()
    try:
        world = write_dataset(args.work_dir / "world", scenes=SCENES, size=(192, 192), workers=args.workers)
    except FileExistsError as error:
        raise DatasetError(str(error)) from error
    rendered = time.time() - clock

    cfg = read_config(CONFIG)
    cfg.work_dir = str(args.work_dir)
    move_data_root(cfg, str(world))
    runner = build_runner(cfg)
    runner.train()
    trained = time.time() - clock - rendered
    image = args.work_dir / "predictions.png"
    draw(runner, image, count=8)

    scalars = runner.message_hub.log_scalars
    ap = {kind: scalars[f"val/coco/{kind}_mAP"].current() for kind in ("bbox", "segm")}
    train, val = len(runner.train_dataloader.dataset), len(runner.val_dataloader.dataset)
    made = [
        (f"{train} + {val} images of a synthetic world, in {rendered:.0f} s", world),
        (f"Cascade Mask R-CNN, {runner.max_iters} iterations and evaluation in {trained:.0f} s", runner.work_dir),
        ("log", runner.log_dir),
        ("predictions beside ground truth", image),
    ]
    print(f"\nbox AP {ap['bbox']:.3f}, mask AP {ap['segm']:.3f} on {val} images of unseen scenes (COCO metrics)")
    print(f"{time.time() - clock:.0f} s in all\n\n| made | where |\n|---|---|")
    print("\n".join(f"| {what} | {where} |" for what, where in made))
