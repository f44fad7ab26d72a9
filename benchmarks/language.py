"""Measure images per second of embedding files with PE-Core beside open_clip, on the same weights.

python benchmarks/language.py                # PE-Core-T16-384 with random weights, 48 images of 480 x 640 px
python benchmarks/language.py --images 10000 --side 112

Both sides read the same JPEG files, squash them to --side pixels, and give features that must agree. They take turns,
in groups of images, on one core; the ratio is the median over neighboring groups: below 1 we are faster.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from pe_spatial import PECore
from pe_spatial.images import read_rgb
from pe_spatial.language.checkpoint import load_core_state
from pe_spatial.language.embedding import embed
from pe_spatial.language.variants import CORES

GROUP = 8  # images
FILES = 500  # different images; more are these again


def write_images(folder: Path, number: int) -> list[Path]:
    """Write smooth noise as JPEG."""
    rng, files = np.random.default_rng(0), []
    for i in range(number):
        small = rng.integers(0, 255, (24, 32, 3), np.uint8)
        files.append(folder / f"{i:03d}.jpg")
        Image.fromarray(cv2.resize(small, (640, 480), interpolation=cv2.INTER_CUBIC)).save(files[-1])
    return files


@torch.inference_mode()
def theirs(model: torch.nn.Module, transform: object, files: list[Path]) -> Tensor:
    images = torch.stack([transform(Image.open(file)) for file in files])  # type: ignore[operator]
    return F.normalize(model.encode_image(images), dim=-1)  # type: ignore[operator]


def build_models(side: int) -> tuple[PECore, torch.nn.Module, object]:
    """Return PE-Core-T16-384 for images of `side` pixels, ours and open_clip's with its transform: the same weights."""
    half = (0.5, 0.5, 0.5)
    pixels = dict(image_mean=half, image_std=half, image_interpolation="bilinear", image_resize_mode="squash")
    peer, _, transform = open_clip.create_model_and_transforms(
        "PE-Core-T-16-384", pretrained=None, force_image_size=side, **pixels
    )
    trunk = peer.visual.trunk
    trunk.rope.ref_feat_shape = None  # `side` is the side of the pretraining, and no rotary position is scaled
    trunk.set_input_size(side)
    core = CORES["pe_core_t16_384"]
    ours = PECore(replace(core, vision=replace(core.vision, img_size=side)))
    load_core_state(ours, peer.state_dict())
    return ours.eval(), peer.eval(), transform


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--side", type=int, default=384, help="side of the images that the models get, in pixels")
    args = parser.parse_args()
    logging.disable()  # open_clip warns that the weights are random
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # our threads that read ahead get no core of their own
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, peer, transform = build_models(args.side)
    times: dict[str, list[float]] = {"ours": [], "open_clip": []}
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder), min(args.images, FILES))
        for start in range(-GROUP, args.images, GROUP):  # the first group warms up
            group = [files[i % len(files)] for i in range(max(start, 0), max(start, 0) + GROUP)]
            sides = {
                "ours": partial(embed, ours, [partial(read_rgb, file) for file in group], batch_size=GROUP),
                "open_clip": partial(theirs, peer, transform, group),
            }
            features = {}
            for name, work in sides.items():
                before = time.perf_counter()
                features[name] = work()
                if start >= 0:
                    times[name].append(time.perf_counter() - before)
            assert_close(features["ours"], features["open_clip"], rtol=1e-3, atol=1e-3)
    ratio = statistics.median(a / b for a, b in zip(times["ours"], times["open_clip"], strict=True))
    print("| | images per second | all images, seconds |\n|---|---|---|")
    for name, values in times.items():
        print(f"| {name} | {GROUP / statistics.median(values):.1f} | {sum(values):.0f} |")
    print(f"| ratio of times, ours to open_clip | {ratio:.2f} | {sum(times['ours']) / sum(times['open_clip']):.2f} |")
    print(f"\ntorch {torch.__version__}, open_clip {open_clip.__version__}, {platform.machine()}, one core")


if __name__ == "__main__":
    main()
