"""Measure boxes, depth and tracks on one encode against three separate models, in the same run.

python benchmarks/multitask.py                                   # the encoder in the package, at 192 px
python benchmarks/multitask.py --variant pe_spatial_s16_512 --side 512 --frames 8

Heads are those of the small recipes (pe_demo_cascade_synthetic, synthetic_dpt, video_tracking/synthetic) with random
weights: time does not depend on them, but for the number of boxes, which is the most that the detector returns; or
--checkpoints. Frames are those of the synthetic world. Both sides take turns frame by frame; ratios are medians of the
ratios of frames. The bound is what heads and one encode take, over heads and an encode for each.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

import pe_spatial
from pe_spatial.encoder.variants import get_config
from pe_spatial.engine.configs import read_config
from pe_spatial.synthetic import render_frame, sample_scene
from pe_spatial.tracking.sam2.model import build_pe_sam2
from pe_spatial.tracking.sam2.prompts import Prompt


def write_models(folder: Path, variant: str, side: int) -> dict[str, Path]:
    """Write checkpoints with random heads on one random encoder: a detector, a depth model, a tracker."""
    detector = read_config("pe_spatial::pe_demo_cascade_synthetic.py")
    detector.model.data_preprocessor.pad_size_divisor = side
    detector.model.test_cfg.rcnn.score_thr = 0.0
    detector.test_dataloader.dataset.pipeline[1].scale = (side, side)
    depth = read_config("pe_spatial::pe_spatial_dpt_nyu.py")
    depth.model.decode_head.channels = 32
    depth.model.test_cfg = dict(mode="whole")
    encoder = pe_spatial.PerceptionEncoder(variant).state_dict()
    paths = {}
    for task, cfg in (("detection", detector), ("depth", depth)):
        cfg.model.backbone.variant = variant
        cfg.model.backbone.init_cfg = None
        paths[task] = folder / f"{task}.pth"
        save_model(paths[task], cfg, encoder)
    grid = side // get_config(variant).patch_size
    options = dict(variant=variant, grid=grid, true_stride=True, d_model=128, mem_dim=32, layers=2, feedforward=512)
    model = build_pe_sam2(**options)  # type: ignore[arg-type]
    model.image_encoder.trunk.encoder.load_state_dict(encoder)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)  # objects are always there
    state = {f"tracker.{name}": value for name, value in model.state_dict().items()}
    paths["tracking"] = folder / "tracking.pth"
    meta = dict(cfg=f"model = dict(type='PESAM2', tracker={options!r})\n")
    torch.save({"state_dict": state, "meta": meta}, paths["tracking"])
    return paths


def save_model(path: Path, cfg: Config, encoder: dict[str, Any]) -> None:
    """Write a config's model with random heads and the given encoder."""
    imports = cfg.get("custom_imports", {}).get("imports", ())
    import_modules_from_strings(["mmdet.models", "mmseg.models", *imports])
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(cfg.model)
    getattr(model.backbone, "encoder", model.backbone).load_state_dict(encoder)
    torch.save({"state_dict": model.state_dict(), "meta": dict(cfg=cfg.pretty_text)}, path)


def frames_of(count: int, side: int) -> list[np.ndarray]:
    """Render frames of one scene at 192 px, and resize them."""
    scene = sample_scene(0)
    small = [render_frame(scene, 2.0 * t / count, (192, 192)).rgb for t in range(count)]
    return [cv2.resize(rgb, (side, side)) for rgb in small]


def measure(paths: Sequence[Path], frames: Sequence[np.ndarray], objects: int) -> dict[str, Any]:
    """Return medians per frame in ms: one encode, separate models, and the median of the ratios of frames."""
    shared = pe_spatial.MultiTask(paths)
    alone = {task: pe_spatial.load(path) for task, path in zip(shared.tasks, paths, strict=True)}
    side = frames[0].shape[0]
    corners = np.random.default_rng(0).uniform(0, 0.6 * side, (objects, 2))
    prompts = {0: {i: Prompt(box=(*x, *(x + side / 4))) for i, x in enumerate(corners, 1)}}
    stream = shared.stream(frames, prompts)
    tracker = alone["tracking"].start() if "tracking" in alone else None
    times = []
    for t, rgb in enumerate(frames):
        start = time.perf_counter()
        next(stream)
        middle = time.perf_counter()
        for task, predictor in alone.items():
            if task == "tracking":
                with torch.inference_mode():
                    tracker.step(rgb, prompts.get(t))
            else:
                predictor(rgb)
        times.append((middle - start, time.perf_counter() - middle))
    times = times[2:]  # the first fill caches
    ours, theirs = (1000 * statistics.median(x) for x in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    report = shared.report()
    return dict(ours=ours, theirs=theirs, ratio=ratio, report=report, bound=report["ratio"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variant", default="pe_synthetic_xs8_192")
    given = "models to measure at --side: a detector, a depth model and a tracker, in this order"
    parser.add_argument("--checkpoints", type=Path, nargs=3, metavar="FILE", help=given)
    parser.add_argument("--side", type=int, nargs="+", default=[192], help="pixels; several show the growth")
    parser.add_argument("--frames", type=int, default=20)
    parser.add_argument("--objects", type=int, nargs="+", default=[3], help="tracked objects; several show the growth")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    print(f"{args.variant}, torch {torch.__version__}, {torch.get_num_threads()} thread, {platform.machine()}\n")
    print("| side | tasks | objects | encoder ms | heads ms | one encode ms | separate ms | ratio | bound |")
    print("|---" * 9 + "|")
    for side in args.side:
        frames = frames_of(args.frames, side)
        with tempfile.TemporaryDirectory() as folder:
            given = args.checkpoints and dict(zip(("detection", "depth", "tracking"), args.checkpoints, strict=True))
            paths = given or write_models(Path(folder), args.variant, side)
            rows = [(list(paths), n) for n in args.objects] + [(["detection", "depth"], 0)]
            for tasks, objects in rows:
                found = measure([paths[task] for task in tasks], frames, objects)
                heads = ", ".join(f"{task} {ms:.0f}" for task, ms in found["report"]["heads"].items())
                print(
                    f"| {side} | {len(tasks)} | {objects or ''} | {found['report']['encoder']:.0f} | {heads} | "
                    f"{found['ours']:.0f} | {found['theirs']:.0f} | {found['ratio']:.2f} | {found['bound']:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
