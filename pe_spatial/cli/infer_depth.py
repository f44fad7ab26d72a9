"""Predict the depth of images, folders and videos: .npy, 16-bit PNG, color images, point clouds, errors.

pe-spatial infer_depth rooms/ walk.mp4 --checkpoint work_dirs/pe_spatial_dpt_nyu/iter_38400.pth
pe-spatial infer_depth IMAGES --checkpoint CKPT --write png color ply --intrinsics 519 519 320 240
pe-spatial infer_depth IMAGES --checkpoint CKPT --gt pairs.csv          # rgb,depth,units_per_meter

Writes into --out: NAME.npy (float32, meters) for every image, the files that --write names, and metadata.json, which
describes them. All files of an image are written at once; without --range, colors are drawn again at the end, with one
range for all images. A second call skips images that have their .npy, unless --overwrite is given.

The model gets images with the short side of its training images, and its depth is resized back; see --size and --tile.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import (
    add_cfg_options,
    add_device,
    choose_device,
    import_quietly,
    refuse_for_exported,
    without_prints,
)

if TYPE_CHECKING:
    from pe_spatial.depth.inference import DepthPredictor
    from pe_spatial.engine.sources import Sources
    from pe_spatial.runtime.dense import ExportedEstimator


def side(text: str) -> int:
    """Parse a side in pixels; 'full' is 0."""
    if text == "full":
        return 0
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of pixels nor 'full'")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="images, folders (searched recursively), videos")
    parser.add_argument("--checkpoint", required=True, help="checkpoint that `pe-spatial train` or export wrote")
    parser.add_argument("--config", help="config file (default: the config inside the checkpoint)")
    add_cfg_options(parser)
    parser.add_argument("--out", type=Path, default=Path("depth"), help="folder of the results")
    formats = "16-bit depth, color images, point clouds"
    parser.add_argument("--write", nargs="*", choices=["png", "color", "ply"], default=["png", "color"], help=formats)
    parser.add_argument("--overwrite", action="store_true", help="predict images again that have their .npy")
    add_device(parser)
    parser.add_argument("--batch", type=int, default=1, help="images of one size, or tiles, per forward pass")
    size_help = "short side in pixels that the model gets; 'full': unchanged (default: that of the training images)"
    parser.add_argument("--size", type=side, metavar="PIXELS", help=size_help)
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="predict larger images in square tiles, unchanged")
    parser.add_argument("--overlap", type=int, default=64, metavar="PIXELS", help="overlap of neighboring tiles")
    group = parser.add_argument_group("files")
    group.add_argument("--scale", type=float, choices=[1000, 256, 5000], default=1000, help="PNG units per meter")
    group.add_argument("--colors", default="Spectral", help="a matplotlib colormap ; in Spectral near is red")
    group.add_argument("--range", nargs=2, type=float, metavar=("NEAR", "FAR"), help="range of the colors, in meters")
    span = "without --range: the colors span these percentiles of each image"
    group.add_argument("--percentiles", nargs=2, type=float, default=(2, 98), metavar=("LOW", "HIGH"), help=span)
    group.add_argument("--gt", metavar="FOLDER|CSV", help="ground truth, for maps of the error")
    group.add_argument("--gt-scale", type=float, help="units per meter of the maps in a folder (default: 1000)")
    group.add_argument("--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="camera, in pixels")
    group.add_argument("--fov", type=float, default=60, help="field of view in degrees, if EXIF has none")
    group.add_argument("--drop-edges", type=float, metavar="RATIO", help="omit points at edges in depth, such as 1.05")


def run(args: argparse.Namespace) -> None:
    from functools import partial

    from tqdm import tqdm

    import_quietly("mmseg.datasets")
    # The encoder's advice on geometry is for training; here the checkpoint determines it.
    logging.getLogger("pe_spatial.encoder.vit").setLevel(logging.ERROR)
    from pe_spatial.depth.batch import DepthFolder, GroundTruth, OutputOptions, summarize
    from pe_spatial.engine.predictions import record_model
    from pe_spatial.engine.sources import Sources
    from pe_spatial.errors import ConfigError
    from pe_spatial.runtime.manifest import is_exported

    files = dict(formats=args.write, png_scale=args.scale, intrinsics=args.intrinsics, fov=args.fov)
    limits: dict[str, Any] = dict(color_range=args.range and tuple(args.range), percentiles=tuple(args.percentiles))
    options = OutputOptions(**files, **limits, colors=args.colors, edge_ratio=args.drop_edges)
    if args.tile and args.size:
        raise ConfigError("--tile predicts in full resolution, so --size cannot be given with it; omit one of them")
    sources = Sources(args.images, exclude=args.out)
    truth = GroundTruth(args.gt, scale=args.gt_scale) if args.gt else None
    exported = is_exported(args.checkpoint)
    predictor: Any = exported_estimator(args) if exported else trained_estimator(args)
    if predictor.quantity != "meter" and (truth or "ply" in args.write):
        raise ConfigError(f"this model predicts {predictor.quantity}; omit --gt and --write ply, which need meters")
    size = None if args.tile else predictor.training_size
    if args.size is not None:
        size = args.size or None
    print(*introduction(sources, size, args), sep="\n")
    progress = partial(tqdm, unit="image")
    folder = DepthFolder(args.out, sources, options, quantity=predictor.quantity, truth=truth, progress=progress)
    model: dict[str, Any] = dict(config=Path(args.config).name if args.config else None, tile=args.tile, size=size)
    model["cfg_options"] = {key: str(value) for key, value in args.cfg_options.items()}
    file = Path(args.checkpoint, "manifest.json") if exported else args.checkpoint
    record_model(args.out, file, overwrite=args.overwrite, **model)
    counts, unreadable = folder.predict(
        predictor, batch_size=args.batch, size=size, tile=args.tile, overlap=args.overlap, overwrite=args.overwrite
    )
    metadata = folder.finish()
    print(
        f"{counts['predicted']} predicted, {counts['kept']} kept, {len(unreadable)} unreadable; "
        f"unit: {predictor.quantity}, missing pixels are 0; see {args.out}/metadata.json"
    )
    print(*summarize(metadata), sep="\n")
    if unreadable:
        print(*(f"unreadable: {message}" for message in unreadable), sep="\n", file=sys.stderr)
        sys.exit(f"error: {len(unreadable)} images could not be read (listed above); the others are finished")


def trained_estimator(args: argparse.Namespace) -> DepthPredictor:
    """Return an estimator in torch."""
    from pe_spatial.depth.inference import DepthPredictor
    from pe_spatial.engine.configs import config_in, read_config
    from pe_spatial.engine.options import set_options

    with without_prints():
        cfg = read_config(args.config) if args.config else config_in(args.checkpoint)
        set_options(cfg, args.cfg_options)
        return DepthPredictor(cfg, args.checkpoint, device=choose_device(args))


def exported_estimator(args: argparse.Namespace) -> ExportedEstimator:
    """Return an estimator in another runtime."""
    from pe_spatial.runtime.dense import ExportedEstimator

    refuse_for_exported(args, "config", "cfg_options", "device", "tile")
    return ExportedEstimator(args.checkpoint)


def introduction(sources: Sources, size: int | None, args: argparse.Namespace) -> Iterator[str]:
    """Say what is omitted, and which size the model gets."""
    if sources.omitted:
        counts = ", ".join(f"{count} {suffix}" for suffix, count in sources.omitted.items())
        yield f"omitted, because they are not images that can be read: {counts}"
    if size and args.size is None:
        yield f"the model gets images with a short side of {size} px, as in its training; --size changes it"
    elif args.size is None and not args.tile:
        yield "the model gets images in full resolution, because the checkpoint names no size; --size changes it"
