r"""Track objects through a video from clicks, boxes and masks, and write the video with their masks drawn in.

pe-spatial track cat.mp4 --checkpoint tracker.pth --out tracked.mp4 \
    --points 1:210,350 1:250,220,0 --box 2:10,20,200,300
pe-spatial track frames/ --checkpoint FILE --out tracked.mp4 --mask first.png --box 7@40:9,20,90,80

pe-spatial track cat.mp4 --checkpoint EXPORTED/ --out tracked.mp4 --box 2:10,20,200,300    # without torch

Each prompt begins with the id of its object; @40 gives it on frame 40 instead of 0. Frames are read one by one, so the
video may be of any length. The model must be a PESAM2, or a folder that `pe-spatial export` wrote of one.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import add_device, choose_device, refuse_for_exported
from pe_spatial.errors import ConfigError, DatasetError

if TYPE_CHECKING:
    import numpy as np
    from mmengine.config import Config

    from pe_spatial.tracking.sam2.online import OnlineTracker
    from pe_spatial.tracking.sam2.prompts import Prompt

MAX_ID = 254  # 255 is void in index masks


def numbered(text: str, counts: Sequence[int]) -> tuple[int, int, list[float]]:
    """Split 'ID[@FRAME]:n,n,...' into (frame, id, numbers), as many numbers as `counts` allows."""
    number = r"-?\d+\.?\d*|-?\.\d+"
    match = re.fullmatch(rf"(\d+)(?:@(\d+))?:((?:{number})(?:,(?:{number}))*)", text)
    values = [float(value) for value in match[3].split(",")] if match else []
    if not match or len(values) not in counts or not 0 < int(match[1]) <= MAX_ID:
        shape = " or ".join(map(str, counts))
        raise argparse.ArgumentTypeError(f"{text!r} is not ID[@FRAME]: and {shape} numbers; ids are 1 to {MAX_ID}")
    return int(match[2] or 0), int(match[1]), values


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, help="file or folder of images")
    parser.add_argument("--checkpoint", required=True, help="tracker that `pe-spatial train` or export wrote")
    parser.add_argument("--config", help="config file (default: the config inside the checkpoint)")
    parser.add_argument("--out", type=Path, required=True, help="mp4 to write")
    parser.add_argument("--masks", type=Path, help="also write the masks into this folder, as palette PNGs")
    add_prompts(parser)
    add_device(parser)


def add_prompts(parser: Any) -> None:
    """Add --points, --box and --mask; `read_prompts` reads them."""
    point, box = "ID[@FRAME]:X,Y[,LABEL]", "ID[@FRAME]:X0,Y0,X1,Y1"
    clicks = "clicks in pixels; label 1 (on the object, default) or 0 (beside it)"
    parser.add_argument("--points", nargs="+", type=lambda text: numbered(text, (2, 3)), metavar=point, help=clicks)
    parser.add_argument("--box", nargs="+", type=lambda text: numbered(text, (4,)), metavar=box, help="boxes in pixels")
    parser.add_argument("--mask", nargs="+", metavar="[FRAME:]PNG", help="index masks: each id in them is an object")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pe_spatial.runtime.manifest import is_exported
    from pe_spatial.tracking.sam2.online import track_clip
    from pe_spatial.tracking.vos.clip import Clip, overlay
    from pe_spatial.tracking.vos.masks import write_mask
    from pe_spatial.video import mp4_writer

    prompts = read_prompts(args)
    cfg = None if is_exported(args.checkpoint) else tracker_config(args)
    clip = Clip.open(args.video)
    tracker = exported_tracker(args) if cfg is None else trained_tracker(args, cfg)

    start, frames = time.time(), 0
    with mp4_writer(args.out, clip.fps) as write:
        for name, rgb, mask in tqdm(track_clip(tracker, clip, prompts), unit=" frames"):
            write(overlay(rgb, mask))
            if args.masks:
                write_mask(args.masks / f"{name}.png", mask)
            frames += 1
    milliseconds = (time.time() - start) / frames * 1000
    print(f"{len(tracker.objects)} objects through {frames} frames, {milliseconds:.0f} ms per frame: {args.out}")


def tracker_config(args: argparse.Namespace) -> Config:
    """Return the config, or that of the checkpoint; ConfigError if it has no tracker."""
    from pe_spatial.engine.configs import config_in, read_config

    cfg = read_config(args.config) if args.config else config_in(args.checkpoint)
    if "tracker" not in cfg.get("model", {}):
        source = args.config or f"the config in {args.checkpoint}"
        raise ConfigError(f"{source} has no model.tracker; give a checkpoint or config of a PESAM2")
    return cfg


def trained_tracker(args: argparse.Namespace, cfg: Config) -> OnlineTracker:
    """Return a tracker in torch."""
    from pe_spatial.encoder.files import locate, read_checkpoint
    from pe_spatial.tracking.sam2.model import build_pe_sam2, load_tracker_weights
    from pe_spatial.tracking.sam2.streaming import StreamingTracker

    device = choose_device(args)
    read_checkpoint(locate(args.checkpoint))  # so that its errors come before the model is built
    model = build_pe_sam2(**cfg.model.tracker.to_dict())
    model.image_encoder.trunk.encoder.base_source = cfg.model.get("encoder_weights")
    load_tracker_weights(model, args.checkpoint)
    return StreamingTracker(model.to(device), non_overlapping=True)


def exported_tracker(args: argparse.Namespace) -> OnlineTracker:
    """Return a tracker in another runtime."""
    from pe_spatial.runtime.tracker import ExportedTracker

    refuse_for_exported(args, "config", "device")
    return ExportedTracker(args.checkpoint).start()


def read_prompts(args: argparse.Namespace) -> dict[int, dict[int, Prompt]]:
    """Return frame -> object id -> `Prompt`."""
    from pe_spatial.tracking.sam2.prompts import Prompt

    fields: dict[tuple[int, int], dict[str, Any]] = {}
    for frame, i, (x, y, *label) in args.points or ():
        clicks = fields.setdefault((frame, i), {})
        clicks.setdefault("points", []).append((x, y))
        clicks.setdefault("labels", []).append(*label or [1])
    for kind, items in (("box", args.box or ()), ("mask", masks(args.mask or ()))):
        for frame, i, value in items:
            if kind in fields.setdefault((frame, i), {}):
                raise ConfigError(f"object {i} has two prompts --{kind} on frame {frame}; give one")
            fields[frame, i][kind] = value
    if not fields:
        raise ConfigError("there is no object to track; give --points, --box or --mask")
    prompts: dict[int, dict[int, Prompt]] = {}
    for (frame, i), values in fields.items():
        prompts.setdefault(frame, {})[i] = Prompt(**values)
    return prompts


def masks(paths: Iterable[str]) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield (frame, id, mask) of every object in index masks '[FRAME:]PNG'."""
    from pe_spatial.tracking.vos.masks import is_binary, read_prompt_mask, split_masks

    for text in paths:
        frame, _, path = text.partition(":") if re.match(r"\d+:", text) else ("0", "", text)
        mask = read_prompt_mask(path)
        objects = split_masks(mask, binary=is_binary(mask))
        if not objects:
            raise DatasetError(f"{path} shows no object; its pixels must be object ids (1 to {MAX_ID}), or 0 and 255")
        yield from ((int(frame), i, mask) for i, mask in objects.items())
