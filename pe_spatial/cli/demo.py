"""Render a synthetic dataset, then train, evaluate and draw a small detector on it.

pe-spatial demo              # about ten minutes on two CPU cores

The encoder's weights are part of the package: nothing is downloaded.
"""

import argparse
import time
from pathlib import Path

from pe_spatial.cli.arguments import add_verbose, quiet_start

CONFIG = "pe_spatial::pe_demo_cascade_synthetic.py"
SCENES = {"train": 400, "val": 60}  # two images each, from disjoint seeds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    folder = Path("work_dirs/demo")
    parser.add_argument("--work-dir", type=Path, default=folder, help="folder of the results")
    parser.add_argument("--workers", type=int, default=2, help="processes that render")
    add_verbose(parser)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.synthetic import write_dataset

    start = time.time()
    world = write_dataset(args.work_dir / "world", scenes=SCENES, size=(192, 192), workers=args.workers)
    rendered = time.time() - start
    image = args.work_dir / "predictions.png"
    with quiet_start(args):
        from pe_spatial.detection.drawing import draw_sheet
        from pe_spatial.engine.configs import move_data_root, read_config
        from pe_spatial.engine.training import prepare_training, train

        cfg = read_config(CONFIG)
        cfg.work_dir = str(args.work_dir)
        move_data_root(cfg, str(world))
        prepare_training(cfg)
        runner = train(cfg)
        trained = time.time() - start - rendered
        draw_sheet(runner, image, count=8)

    scalars = runner.message_hub.log_scalars
    ap = {kind: scalars[f"val/coco/{kind}_mAP"].current() for kind in ("bbox", "segm")}
    train_size, val_size = len(runner.train_dataloader.dataset), len(runner.val_dataloader.dataset)
    results = [
        (f"{train_size} + {val_size} images of a synthetic world, in {rendered:.0f} s", world),
        (f"Cascade Mask R-CNN, {runner.max_iters} iterations and evaluation in {trained:.0f} s", runner.work_dir),
        ("log", runner.log_dir),
        ("predictions beside ground truth", image),
    ]
    print(f"\nbox AP {ap['bbox']:.3f}, mask AP {ap['segm']:.3f} on {val_size} images of unseen scenes (COCO metrics)")
    print(f"{time.time() - start:.0f} s in total\n\n| result | where |\n|---|---|")
    print("\n".join(f"| {what} | {where} |" for what, where in results))
