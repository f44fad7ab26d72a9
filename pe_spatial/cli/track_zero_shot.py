r"""Track the objects of a first mask through videos without training, by the features of any encoder and layer.

pe-spatial track_zero_shot --variant pe_synthetic_xs8_192 --checkpoint released --video cat.mp4 --mask first.png \
    --protocol aligned --size 192 --out results --overlay
pe-spatial track_zero_shot --variant pe_spatial_b16_512 --checkpoint released --davis DAVIS --out last
pe-spatial track_zero_shot --variant pe_spatial_b16_512 --checkpoint released --davis DAVIS --out all --layers all
pe-spatial track_zero_shot --variant timm:vit_base_patch14_dinov2.lvd142m --checkpoint released --davis DAVIS \
    --protocol aligned --size 420 --out dinov2

Writes OUT/<sequence>/<frame>.png, palette masks in DAVIS' format, and scores the sequences of --davis that have a mask
for every frame. With --layers it writes OUT/layer_<n>/<sequence>/<frame>.png, and the score of each layer to
OUT/layers.json (0 to 1) and layers.png (percent, as printed). The folder of a sequence appears when it is complete; a
second call continues there. Objects that appear after the first frame are not tracked. The id 255 of a first mask is
background, or object 1 if the mask contains only 0 and 255.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import VARIANT_HELP, add_device, choose_device, layers, variant
from pe_spatial.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pe_spatial.tracking.vos.clip import Clip
    from pe_spatial.tracking.zero_shot import ZeroShotTracker
    from pe_spatial.tracking.zero_shot_run import ZeroShotRun

PROPAGATION = ("context", "radius", "shape", "topk", "temperature")
MEANS = ("J&F-Mean", "J-Mean", "F-Mean")


def size(text: str) -> int | list[int]:
    return [int(side) for side in text.split("x")] if "x" in text else int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--variant", type=variant, required=True, help=VARIANT_HELP)
    parser.add_argument("--geometry", metavar="release|timm|vitdet", help="geometry of the encoder (default: release)")
    parser.add_argument("--checkpoint", required=True, help="weights: a file or URL, 'released', or 'none' (random)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--davis", type=Path, help="root of a dataset in DAVIS' layout")
    source.add_argument("--video", type=Path, help="one video: a file or a folder of frames")
    parser.add_argument("--mask", type=Path, help="index mask of the first frame of --video")
    parser.add_argument("--sequences", nargs="+", metavar="NAME", help="sequences of --davis, or a .txt file of names")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--overlay", action="store_true", help="also write the masks over the frames as mp4")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--layer", type=int, default=-1, help="encoder layer (block), 0-based or from the end")
    which.add_argument("--layers", type=layers, metavar="all|5,8,11", help="several layers in one forward pass")
    parser.add_argument("--protocol", default="dino", metavar="dino|aligned", help="DINO's steps, or aligned")
    parser.add_argument("--size", type=size, default=480, help="short side of frames in pixels, or 448x448")
    parser.add_argument("--normalization", default="encoder", metavar="encoder|dino", help="mean and std")
    parser.add_argument("--context", type=int, default=7, help="frames remembered beside the first")
    parser.add_argument("--radius", type=int, default=12, help="radius of the neighborhood in patches, 0 for all")
    parser.add_argument("--shape", default="square", metavar="square|circle", help="shape of the neighborhood")
    parser.add_argument("--topk", type=int, default=5, help="number of patches that vote")
    parser.add_argument("--temperature", type=float, default=0.1, help="temperature of the softmax")
    parser.add_argument("--workers", type=int, default=1, help="processes for scoring")
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pe_spatial.tracking.vos.clip import Clip, write_overlay
    from pe_spatial.tracking.vos.datasets import davis_clips
    from pe_spatial.tracking.vos.evaluation import read_sequences
    from pe_spatial.tracking.zero_shot_run import ZeroShotRun

    if args.overlay and args.layers:
        raise ConfigError("--overlay draws the masks of one layer; give --layer instead of --layers")
    if (args.video is None) != (args.mask is None):
        raise ConfigError("--video needs --mask, the mask of its first frame, and --mask needs --video")
    if args.video and args.sequences:
        raise ConfigError("--sequences selects from --davis; --video is one sequence")
    if args.video:
        clips = [Clip.open(args.video, args.mask)]
    else:
        clips = davis_clips(args.davis, args.sequences and read_sequences(args.sequences))
    results = ZeroShotRun(build_tracker(args), args.out, settings(args), by_layer=args.layers is not None)
    pending = results.pending(clips)
    if len(pending) < len(clips):
        print(f"{len(clips) - len(pending)} of {len(clips)} sequences are complete already")
    with tqdm(total=sum(map(len, pending)), unit="frame") as progress:
        for clip in pending:
            progress.set_description(clip.name)
            lost = results.tracker.lost_objects(clip.load()[0])
            if lost:
                progress.write(f"{clip.name}: objects {', '.join(map(str, lost))} are too small for a patch")
            results.track(clip, progress.update)
    if args.overlay:
        for clip in tqdm([clip for clip in clips if not (args.out / f"{clip.name}.mp4").exists()], unit="overlay"):
            write_overlay(clip, args.out / clip.name, args.out / f"{clip.name}.mp4")
    if args.davis:
        score(results, args, clips)
    folders = [str(folder / clips[0].name if args.video else folder) for folder in results.folders.values()]
    print(f"masks: {', '.join(folders)}" + (f"; overlays: {args.out}/*.mp4" if args.overlay else ""))


def build_tracker(args: argparse.Namespace) -> ZeroShotTracker:
    import torch

    from pe_spatial.integrations.openmmlab import build_encoder
    from pe_spatial.tracking.zero_shot import ZeroShotTracker

    device = choose_device(args)
    torch.manual_seed(0)  # a run with random weights continues with the same ones
    weights = None if args.checkpoint == "none" else dict(type="Pretrained", checkpoint=args.checkpoint)
    geometry = dict(geometry=args.geometry) if args.geometry else {}
    encoder = dict(type="PerceptionEncoder", variant=args.variant, init_cfg=weights, **geometry)
    try:
        blocks = args.layers or [args.layer]
        if blocks == "all":
            with torch.device("meta"):
                blocks = range(build_encoder(args.variant).config.depth)
        tracker = ZeroShotTracker(
            dict(encoder, out_indices=list(blocks)),
            protocol=args.protocol,
            size=args.size,
            normalization=args.normalization,
            propagation={key: value for key, value in settings(args).items() if key in PROPAGATION},
        )
    except (TypeError, ValueError) as error:  # the encoder raises no ConfigError
        raise ConfigError(" ".join(str(error).split())) from error
    tracker.backbone.init_weights()
    return tracker.to(device)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return everything that the masks of a sequence depend on."""
    names = ("variant", "geometry", "checkpoint", "layer", "layers", "protocol", "size", "normalization", *PROPAGATION)
    sources = {name: getattr(args, name) and str(getattr(args, name).resolve()) for name in ("davis", "video", "mask")}
    return {name: getattr(args, name) for name in names} | {"radius": args.radius or None} | sources


def score(results: ZeroShotRun, args: argparse.Namespace, clips: Sequence[Clip]) -> None:
    evaluations = results.score(args.davis, clips, workers=args.workers)
    scored = len(next(iter(evaluations.values())).per_sequence) if evaluations else 0
    print(f"{scored} of {len(clips)} sequences have masks of all frames and are scored")
    for layer, evaluation in evaluations.items():
        means = evaluation.global_results
        print(f"layer {layer:2d}", *(f"{key} {100 * means[key]:.1f}" for key in MEANS), sep="  ")
    if evaluations:
        print(*evaluation.rules(), sep="\n")
    if evaluations and args.layers:
        best, last = results.report(evaluations)
        values = [100 * evaluations[layer].global_results[MEANS[0]] for layer in (best, last)]
        print(f"best layer {best}: {values[0]:.1f}, deepest here {last}: {values[1]:.1f}; {args.out}/layers.png")
