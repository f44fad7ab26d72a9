"""Render the synthetic RGB-D world: images, COCO annotations with tracks, depth and instance maps.

For detection (the defaults), and for video:
    pe-spatial render_synthetic data/synthetic --workers 2
    pe-spatial render_synthetic data/synthetic_video --train 0 --val 16 --frames 16
"""

import argparse
import time

SPLITS = ("train", "val", "test", "pretrain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", help="folder to create; a dataset with the same options is reused")
    for split in SPLITS:
        default = {"train": 200, "val": 50}.get(split, 0)
        each = f"scenes of {split}, with --frames images each"
        parser.add_argument(f"--{split}", type=int, default=default, metavar="SCENES", help=each)
    parser.add_argument("--frames", type=int, default=2, help="images per scene")
    parser.add_argument("--size", type=int, nargs=2, default=(256, 256), metavar=("H", "W"), help="size in pixels")
    parser.add_argument("--duration", type=float, default=2.0, help="seconds per scene")
    parser.add_argument("--seed", type=int, default=0, help="random seed")
    parser.add_argument("--workers", type=int, default=1, help="number of processes")


def run(args: argparse.Namespace) -> None:
    from pe_spatial.synthetic import write_dataset

    start = time.monotonic()
    scenes = {split: getattr(args, split) for split in SPLITS if getattr(args, split)}
    options = {key: getattr(args, key) for key in ("duration", "seed", "workers")}
    root = write_dataset(args.root, scenes=scenes, frames_per_scene=args.frames, size=tuple(args.size), **options)
    images = ", ".join(f"{number * args.frames} {split}" for split, number in scenes.items())
    print(f"{root}: complete, images: {images} ({time.monotonic() - start:.1f} s)")
