"""Follow the objects of a first mask through videos, without training, by the features of any encoder and layer.

python tools/track_zero_shot.py --variant pe_spatial_b16_512 --checkpoint released --davis DAVIS --out last
python tools/track_zero_shot.py --variant pe_spatial_b16_512 --checkpoint released --davis DAVIS --out all --layers all
python tools/track_zero_shot.py --variant pe_spatial_s16_512 --checkpoint FILE --video cat.mp4 --mask first.png \
    --out results --overlay
python tools/track_zero_shot.py --variant timm:vit_base_patch14_dinov2.lvd142m --checkpoint released --davis DAVIS \
    --preset aligned --size 420 --out dinov2

Writes OUT/<sequence>/<frame>.png, palette masks as DAVIS wants results, and scores those sequences of which every frame
has a mask in --davis. With --layers it is OUT/layer_<n>/<sequence>/<frame>.png, and each layer's score goes to
OUT/layers.json and layers.png. A sequence is there as a whole or not at all; called again, the tool goes on with the
next one.
Objects that appear after the first frame are not followed. The id 255 of a first mask counts as background, or as
object 1 where the mask holds 0 and 255 alone.
"""

import argparse
import json
import os
import shutil
from contextlib import ExitStack
from pathlib import Path

import torch
from tqdm import tqdm

from pe_spatial.engine.report import draw_scores, write_json
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.openmmlab import build_encoder
from pe_spatial.tracking.propagation import SHAPES
from pe_spatial.tracking.vos.datasets import davis_clips
from pe_spatial.tracking.vos.evaluation import COUNTS, evaluate, read_sequences
from pe_spatial.tracking.vos.masks import write_mask
from pe_spatial.tracking.vos.video import Clip, list_frames, write_overlay
from pe_spatial.tracking.zero_shot import NORMALIZATIONS, PRESETS, ZeroShotTracker

PROPAGATION = ("context", "radius", "shape", "topk", "temperature")


def variant(text):
    """'pe_spatial_b16_512', 'timm:NAME', or the fields of a Perception Encoder: 'img_size=192,patch_size=8,...'."""
    if "=" not in text:
        return text
    return {name: json.loads(value) for name, value in (field.split("=") for field in text.split(","))}


def size(text):
    """'480' or '448x448'."""
    sides = [int(side) for side in text.split("x")]
    return sides[0] if len(sides) == 1 else sides


def layers(text):
    """'all' or '5,8,11'."""
    return text if text == "all" else [int(number) for number in text.split(",")]


def build(args):
    """Return the tracker with its weights."""
    torch.manual_seed(0)  # so that a run with random weights goes on with the same ones
    weights = None if args.checkpoint == "none" else dict(type="Pretrained", checkpoint=args.checkpoint)
    try:
        blocks = args.layers or [args.layer]
        if blocks == "all":
            with torch.device("meta"):
                blocks = range(build_encoder(args.variant).config.depth)
        tracker = ZeroShotTracker(
            dict(type="PerceptionEncoder", variant=args.variant, out_indices=list(blocks), init_cfg=weights),
            preset=args.preset,
            size=args.size,
            normalization=args.normalization,
            propagation={key: value for key, value in settings(args).items() if key in PROPAGATION},
        )
    except (TypeError, ValueError) as error:  # of the encoder, whose core knows no ConfigError
        raise ConfigError(" ".join(str(error).split())) from error
    tracker.backbone.init_weights()
    return tracker.to(args.device)


def settings(args):
    """Return everything that results depend on; which sequences of a set are tracked may change from call to call."""
    names = ("variant", "checkpoint", "layer", "layers", "preset", "size", "normalization", *PROPAGATION)
    sources = {name: getattr(args, name) and str(getattr(args, name).resolve()) for name in ("davis", "video", "mask")}
    return {name: getattr(args, name) for name in names} | {"radius": args.radius or None} | sources


def claim(out, wanted):
    """Refuse a folder that holds the results of other settings; otherwise note them down."""
    note = out / "settings.json"
    if note.is_file():
        there = json.loads(note.read_text())
        other = [key for key in wanted if there.get(key) != wanted[key]]
        if other:
            raise ConfigError(
                f"{out} holds results with another {', '.join(f'{key} ({there.get(key)})' for key in other)}; give "
                "another --out or remove it"
            )
    write_json(note, wanted)


def track(tracker, clip, folders, progress):
    """Write the masks of `clip`, of each layer into one of `folders`, which appear when all are complete."""
    unfinished = [folder.with_name(f".{folder.name}.unfinished") for folder in folders]
    first_mask, frames = clip.load()
    with ExitStack() as stack:
        for folder in unfinished:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for name, masks in tracker.track(frames, first_mask):
            for folder, mask in zip(unfinished, masks, strict=True):
                write_mask(folder / f"{name}.png", mask)
            progress.update()
        for new, folder in zip(unfinished, folders, strict=True):
            shutil.rmtree(folder, ignore_errors=True)  # of another layer that was killed between two of them
            os.replace(new, folder)


def annotated(clip):
    """Return whether every frame of a sequence has ground truth, of which the first and the last do not count."""
    return len(clip.frames) > 2 and all(clip.mask.with_name(f"{path.stem}.png").is_file() for path in clip.frames)


def score(args, clips, folders):
    """Evaluate what has ground truth; print one line for each layer, and what the rules of the metric left out."""
    names = [clip.name for clip in clips if annotated(clip)]
    print(f"{len(names)} of {len(clips)} sequences have ground truth of all frames and are scored")
    scores = {}
    for layer, folder in folders.items() if names else ():
        result = evaluate(args.davis, folder, sequences=names, workers=args.workers)
        scores[layer] = result.global_results
        values = "  ".join(f"{key} {100 * result.global_results[key]:.1f}" for key in ("J&F-Mean", "J-Mean", "F-Mean"))
        print(f"layer {layer:2d}  {values}")
    if names:
        counted = [f"{n} {COUNTS[rule]}" for rule, n in result.counts.items() if n and rule != "unpredicted_objects"]
        print(*counted, sep="\n")
    return scores


def sweep(scores, out):
    """Write the scores of all layers as layers.json and layers.png, the best and the last one marked."""
    means = {layer: 100 * values["J&F-Mean"] for layer, values in scores.items()}
    best, last = max(means, key=means.get), max(means)
    write_json(out / "layers.json", dict(layers=scores, best=best, last=last))
    draw_scores(out / "layers.png", means, name="J&F", best=best)
    print(f"best layer {best}: {means[best]:.1f}, last layer {last}: {means[last]:.1f}; {out / 'layers.png'}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", type=variant, required=True, help=variant.__doc__)
    parser.add_argument("--checkpoint", required=True, help="file or address of weights, 'released', or 'none': random")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--davis", type=Path, help="root of a set in DAVIS' layout")
    source.add_argument("--video", type=Path, help="one video: a file, or a folder of frames")
    parser.add_argument("--mask", type=Path, help="index mask of the first frame of --video")
    parser.add_argument("--sequences", type=Path, help="file with names of sequences (ImageSets/2017/val.txt, or all)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--overlay", action="store_true", help="draw the masks over the frames, as OUT/<sequence>.mp4")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", type=int, default=-1, help="block of the encoder, from 0, or from the end (-1)")
    which.add_argument("--layers", type=layers, metavar="all|5,8,11", help="several at once, by one forward pass")
    parser.add_argument("--preset", choices=PRESETS, default=PRESETS[0], help="the script's steps, or aligned patches")
    parser.add_argument("--size", type=size, default=480, help="short side of the frames in pixels, or 448x448")
    parser.add_argument("--normalization", choices=NORMALIZATIONS, default=NORMALIZATIONS[0])
    parser.add_argument("--context", type=int, default=7, help="frames remembered beside the first")
    parser.add_argument("--radius", type=int, default=12, help="of the neighbourhood in patches; 0 for no bound")
    parser.add_argument("--shape", choices=SHAPES, default=SHAPES[0], help="of the neighbourhood")
    parser.add_argument("--topk", type=int, default=5, help="patches that count")
    parser.add_argument("--temperature", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=1, help="processes that score")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def run(args: argparse.Namespace) -> None:
    if args.overlay and args.layers:
        raise ConfigError("--overlay draws the masks of one layer; give --layer instead of --layers")
    if (args.video is None) != (args.mask is None):
        raise ConfigError("--video and --mask belong together: the frames, and the mask of the first one")
    if args.video and args.sequences:
        raise ConfigError("--sequences chooses from --davis; --video is one sequence")
    if args.video:
        frames = list_frames(args.video) if args.video.is_dir() else args.video
        clips = [Clip(args.video.stem, frames, args.mask)]
    else:
        clips = davis_clips(args.davis, args.sequences and read_sequences(args.sequences))
    tracker = build(args)
    claim(args.out, settings(args))
    roots = {n: args.out / f"layer_{n:02d}" if args.layers else args.out for n in tracker.backbone.out_indices}
    todo = [clip for clip in clips if not all((root / clip.name).is_dir() for root in roots.values())]
    if len(todo) < len(clips):
        print(f"{len(clips) - len(todo)} of {len(clips)} sequences are there already")
    with tqdm(total=sum(map(len, todo)), unit="frame") as progress:
        for clip in todo:
            progress.set_description(clip.name)
            lost = tracker.lost_objects(clip.load()[0])
            if lost:
                progress.write(f"{clip.name}: too small for a patch, not followed: objects {', '.join(map(str, lost))}")
            track(tracker, clip, [root / clip.name for root in roots.values()], progress)
    if args.overlay:
        drawn = {clip: args.out / f"{clip.name}.mp4" for clip in clips}
        for clip in tqdm([clip for clip, path in drawn.items() if not path.exists()], unit="overlay"):
            write_overlay(clip, args.out / clip.name, drawn[clip])
    if args.davis:
        scores = score(args, clips, roots)
        if args.layers and scores:
            sweep(scores, args.out)
