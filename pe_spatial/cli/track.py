"""Follow objects through a video from clicks, boxes and masks, and write it with their masks drawn in.

python tools/track.py cat.mp4 --config configs/pe_spatial_sam2_davis.py --checkpoint tracker.pth --out tracked.mp4 \
    --points 1:210,350 1:250,220,0 --box 2:10,20,200,300
python tools/track.py frames/ --config CONFIG --checkpoint FILE --out tracked.mp4 --mask first.png --box 7@40:9,20,90,80

Each prompt begins with the number of its object; @40 gives it on frame 40 instead of 0. Frames are read one by one, so
that a video may be of any length. The config is one whose model is a PESAM2.
"""

import argparse
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.model import build_pe_sam2, load_tracker_weights
from pe_spatial.tracking.sam2.streaming import Prompt, StreamingTracker
from pe_spatial.tracking.vos.masks import VOID, read_mask, split_ids, write_mask
from pe_spatial.tracking.vos.video import Clip, list_frames, mp4_writer, overlay


def numbered(text, counts):
    """Split 'ID[@FRAME]:n,n,...' into (frame, id, numbers)."""
    match = re.fullmatch(r"(\d+)(?:@(\d+))?:([\d.,-]+)", text)
    values = [float(number) for number in match[3].split(",")] if match else []
    if len(values) not in counts or not 0 < int(match[1]) < VOID:
        shape = " or ".join(map(str, counts))
        raise argparse.ArgumentTypeError(f"{text!r} is not ID[@FRAME]: and {shape} numbers; ids are 1 to {VOID - 1}")
    return int(match[2] or 0), int(match[1]), values


def read_prompts(args):
    """Return frame -> object id -> `Prompt`."""
    given = {}
    for frame, i, (x, y, *label) in args.points or ():
        fields = given.setdefault((frame, i), {})
        fields.setdefault("points", []).append((x, y))
        fields.setdefault("labels", []).append(*label or [1])
    for kind, items in (("box", args.box or ()), ("mask", masks(args.mask or ()))):
        for frame, i, value in items:
            if kind in given.setdefault((frame, i), {}):
                raise ConfigError(f"object {i} has two prompts --{kind} on frame {frame}; give one")
            given[frame, i][kind] = value
    if not given:
        raise ConfigError("there is no object to follow; give --points, --box or --mask")
    prompts = {}
    for (frame, i), fields in given.items():
        prompts.setdefault(frame, {})[i] = Prompt(**fields)
    return prompts


def masks(paths):
    """Yield (frame, id, mask) of every object in index masks, '[FRAME:]PNG'."""
    for text in paths:
        frame, path = re.fullmatch(r"(?:(\d+):)?(.+)", text).groups()
        objects = split_ids(read_mask(path))
        if not objects:
            raise DatasetError(f"{path} holds no object; its pixels should be object ids from 1 to {VOID - 1}")
        yield from ((int(frame or 0), i, mask) for i, mask in objects.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, help="file, or folder of images")
    parser.add_argument("--config", required=True)
    parser.add_argument("--checkpoint", required=True, help="of the whole tracker, as tools/train.py writes it")
    parser.add_argument("--out", type=Path, required=True, help="mp4")
    parser.add_argument("--masks", type=Path, help="folder for the masks as palette PNGs, too")
    parser.add_argument(
        "--points", nargs="+", type=lambda text: numbered(text, (2, 3)), metavar="ID[@FRAME]:X,Y[,LABEL]",
        help="clicks in pixels; label 1 (on the object) or 0 (beside it)",
    )  # fmt: skip
    parser.add_argument(
        "--box", nargs="+", type=lambda text: numbered(text, (4,)), metavar="ID[@FRAME]:X0,Y0,X1,Y1"
    )  # fmt: skip
    parser.add_argument("--mask", nargs="+", metavar="[FRAME:]PNG", help="index masks: every id in them is an object")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    prompts = read_prompts(args)
    cfg = read_config(args.config)
    if "tracker" not in cfg.get("model", {}):
        raise ConfigError(f"{args.config} has no model.tracker: it describes no PESAM2")
    model = build_pe_sam2(**cfg.model.tracker.to_dict())
    load_tracker_weights(model, args.checkpoint)
    tracker = StreamingTracker(model.to(args.device), non_overlapping=True)

    clock, count = time.time(), 0
    clip = Clip(args.video.name, list_frames(args.video) if args.video.is_dir() else args.video)
    with mp4_writer(args.out, clip.fps) as write:
        for t, (name, frame) in enumerate(tqdm(clip.read(), unit=" frames")):
            found = tracker.step(frame, prompts.pop(t, None))
            ids = np.zeros(frame.shape[:2], np.uint8)
            for i, mask in found.items():
                ids[mask.cpu().numpy()] = i
            write(overlay(frame, ids))
            if args.masks:
                write_mask(args.masks / f"{name}.png", ids)
            count += 1
        if prompts:
            raise DatasetError(f"{args.video} has {count} frames, so there is no frame {min(prompts)} to prompt on")
    milliseconds = (time.time() - clock) / count * 1000
    print(f"{len(tracker.objects)} objects through {count} frames, {milliseconds:.0f} ms a frame: {args.out}")
