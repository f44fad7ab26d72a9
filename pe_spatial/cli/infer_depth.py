"""Depth of images, folders and videos: .npy in metres, 16-bit PNG, colours, point clouds, the error against truth.

python tools/infer_depth.py rooms/ walk.mp4 --checkpoint work_dirs/pe_spatial_dpt_nyu/iter_38400.pth
python tools/infer_depth.py IMAGES --checkpoint CKPT --write png colour ply --intrinsics 519 519 320 240
python tools/infer_depth.py IMAGES --checkpoint CKPT --gt pairs.csv     # rgb,depth,units_per_metre

Into --out go NAME.npy (float32) for every image, what --write names, and metadata.json, which says what is what. A
run that was stopped goes on where it was: images that have their .npy are not predicted again, unless --overwrite.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.device import get_device
from tqdm import tqdm

from pe_spatial.cli.arguments import add_cfg_options
from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.inference import DepthPredictor, InputImage, Sources
from pe_spatial.depth.outputs import (
    ERROR_COLOURS,
    ERROR_RANGE,
    add_bar,
    depth_range,
    draw_depth,
    draw_error,
    encode_png16,
    encode_rgb,
    is_valid,
)
from pe_spatial.depth.pointcloud import Intrinsics, encode_ply, exif_camera, given_camera, guessed_camera, without_edges
from pe_spatial.depth.transforms import read_depth
from pe_spatial.encoder.files import locate
from pe_spatial.engine.checkpoints import AtomicLocalBackend
from pe_spatial.engine.configs import config_in, read_config
from pe_spatial.errors import ConfigError, DatasetError

put = AtomicLocalBackend().put


def npy(depth: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, depth)
    return file.getvalue()


def start_metadata(args: argparse.Namespace) -> dict:
    """Return what identifies the predictions; refuse a folder that holds those of another model."""
    digest = hashlib.sha256(locate(args.checkpoint).read_bytes()).hexdigest()
    model = {
        "config": Path(args.config).name if args.config else None,
        "cfg_options": {key: str(value) for key, value in args.cfg_options.items()},
        "checkpoint": Path(args.checkpoint).name,
        "sha256": digest,
        "tile": args.tile,
    }
    path = args.out / "metadata.json"
    if path.is_file() and not args.overwrite:
        before = json.loads(path.read_text())["model"]
        if before != model:
            names = ", ".join(key for key in model if before.get(key) != model[key])
            raise ConfigError(f"{args.out} holds predictions of another {names}; give another --out, or --overwrite")
    return model


def predict(sources: Sources, predictor: DepthPredictor, args: argparse.Namespace) -> Counter:
    """Write NAME.npy for every image; count what was done, and name what cannot be read."""
    done: Counter = Counter()
    waiting: list[tuple[str, np.ndarray]] = []

    def flush() -> None:
        if waiting:
            for (name, _), depth in zip(waiting, predictor([image for _, image in waiting]), strict=True):
                put(npy(depth), args.out / f"{name}.npy")
        waiting.clear()

    for source in tqdm(sources, desc="depth", unit="image"):
        if not args.overwrite and (args.out / f"{source.name}.npy").is_file():
            done["found"] += 1
            continue
        try:
            image = source.read()
        except DatasetError as error:
            tqdm.write(f"unreadable: {error}", file=sys.stderr)
            done["unreadable"] += 1
            continue
        done["predicted"] += 1
        if args.tile and max(image.shape[:2]) > args.tile:
            depth = predictor.tiled(image, tile=args.tile, overlap=args.overlap, batch=args.batch)
            put(npy(depth), args.out / f"{source.name}.npy")
            continue
        if waiting and (len(waiting) == args.batch or waiting[0][1].shape != image.shape):
            flush()
        waiting.append((source.name, image))
    flush()
    return done


class Truth:
    """Ground truth by image: from a table of pairs, or from a folder with a map of the same name."""

    def __init__(self, given: str, scale: float) -> None:
        self.folder, self.scale = Path(given), scale
        self.pairs = None
        if given.endswith(".csv"):
            root = str(self.folder.parent)
            pairs = DepthPairDataset(ann_file=self.folder.name, data_root=root, serialize_data=False, pipeline=[])
            self.pairs = {Path(pair["img_path"]).resolve(): pair for pair in pairs.data_list}
        elif not self.folder.is_dir():
            raise DatasetError(f"--gt {given} is neither a folder nor a .csv file")

    def __call__(self, source: InputImage, size: tuple[int, ...]) -> np.ndarray | None:
        if self.pairs is not None:
            pair = self.pairs.get(source.path.resolve())
            path, scale = (pair["depth_path"], pair["depth_scale"]) if pair else (None, 1)
        else:
            found = [self.folder / f"{source.name}{suffix}" for suffix in (".png", ".npy", ".tiff", ".pgm", ".exr")]
            path = next((str(path) for path in found if path.is_file()), None)
            scale = 1 if path and path.endswith((".npy", ".exr")) else self.scale
        if path is None:
            return None
        depth = read_depth(path, scale=scale)
        if depth.shape != size:
            raise DatasetError(f"{path} is {depth.shape[0]}x{depth.shape[1]} and its prediction {size[0]}x{size[1]}")
        return depth


def predictions(sources: Sources, args: argparse.Namespace, what: str) -> Iterator[tuple[InputImage, np.ndarray]]:
    for source in tqdm(sources, desc=what, unit="image"):
        path = args.out / f"{source.name}.npy"
        if path.is_file():
            yield source, np.load(path)


def shared_range(sources: Sources, truth: Truth | None, args: argparse.Namespace) -> tuple[float, float]:
    """Return the widest of the images' ranges, those of the ground truth included."""
    if args.range:
        return args.range
    ranges = []
    for source, depth in predictions(sources, args, "range"):
        target = truth(source, depth.shape) if truth else None
        ranges += [depth_range(x, args.percentiles) for x in (depth, target) if x is not None]
    known = [limits for limits in ranges if limits]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else (0.0, 1.0)


def camera(source: InputImage, size: tuple[int, ...], args: argparse.Namespace) -> Intrinsics:
    if args.intrinsics:
        return given_camera(args.intrinsics, size)
    return exif_camera(source.path, size) or guessed_camera(size, args.fov)


def write_outputs(sources: Sources, args: argparse.Namespace, quantity: str) -> dict:
    """Write what --write and --gt ask for; return what metadata.json says about it."""
    truth = Truth(args.gt, args.gt_scale) if args.gt else None
    limits = shared_range(sources, truth, args) if "colour" in args.write else None
    images = {}

    def coloured(depth: np.ndarray) -> bytes:
        label = "depth [m]" if quantity == "metre" else quantity
        return encode_rgb(add_bar(draw_depth(depth, limits, args.colours), limits, args.colours, label))

    for source, depth in predictions(sources, args, "files"):
        known = depth[is_valid(depth)]
        about = {
            "source": str(source.path),
            "height": depth.shape[0],
            "width": depth.shape[1],
            "missing": int(depth.size - known.size),
        }
        if known.size:
            about |= {"min": float(known.min()), "median": float(np.median(known)), "max": float(known.max())}
        base = args.out / source.name
        if "png" in args.write:
            data, about["saturated"] = encode_png16(depth, args.scale, {"depth_unit": quantity})
            put(data, f"{base}_depth.png")
        if limits:
            put(coloured(depth), f"{base}_colour.png")
        if "ply" in args.write:
            cut = without_edges(depth, args.drop_edges) if args.drop_edges else depth
            view = camera(source, depth.shape, args)
            data, about["points"] = encode_ply(cut, source.read(), view, [f"unit {quantity}"])
            about["intrinsics"] = {"fx": view.fx, "fy": view.fy, "cx": view.cx, "cy": view.cy, "source": view.source}
            put(data, f"{base}.ply")
        target = truth(source, depth.shape) if truth else None
        if target is not None:
            both = is_valid(depth) & is_valid(target)
            about["abs_rel"] = float((np.abs(depth - target)[both] / target[both]).mean()) if both.any() else None
            drawn = add_bar(draw_error(depth, target), ERROR_RANGE, ERROR_COLOURS, "|depth - truth| / truth")
            put(encode_rgb(drawn), f"{base}_error.png")
            if limits:
                put(coloured(target), f"{base}_truth.png")
        images[source.name] = about
    if truth and images and not any("abs_rel" in about for about in images.values()):
        raise DatasetError(f"--gt {args.gt} has no depth map of any of the {len(images)} images; check the names")
    return {
        "unit": quantity,
        "metric": quantity == "metre",
        "missing": 0,
        "png_scale": args.scale,
        "colours": {"name": args.colours, "range": limits} if limits else None,
        "images": images,
    }


def report(about: dict, done: Counter, args: argparse.Namespace) -> None:
    images = about["images"].values()
    print(
        f"{done['predicted']} predicted, {done['found']} found, {done['unreadable']} unreadable; unit {about['unit']}, "
        f"0 is missing; {args.out}/metadata.json"
    )
    saturated = [entry["saturated"] for entry in images if entry.get("saturated")]
    if saturated:
        print(
            f"{sum(saturated)} pixels in {len(saturated)} images are beyond {65535 / args.scale:g} at --scale "
            f"{args.scale:g} and were cut to it in the PNG; the .npy has them"
        )
    cameras = Counter(entry["intrinsics"]["source"].partition(":")[0] for entry in images if "intrinsics" in entry)
    if cameras:
        print(f"cameras of the clouds: {', '.join(f'{number} {source}' for source, number in cameras.items())}")
    if cameras["GUESS"]:
        print(f"shapes of clouds with a guessed camera ({args.fov:g} degrees) are no measure; give --intrinsics")
    errors = [entry["abs_rel"] for entry in images if entry.get("abs_rel") is not None]
    if errors:
        print(f"abs_rel {np.mean(errors):.4f} on {len(errors)} images with ground truth (all of its pixels)")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="images, folders (and those in them), videos")
    parser.add_argument("--checkpoint", required=True, help="file that tools/train.py wrote")
    parser.add_argument("--config", help="configuration (the one that the checkpoint holds)")
    add_cfg_options(parser)
    parser.add_argument("--out", type=Path, default=Path("depth"), help="folder of the results (depth)")
    parser.add_argument("--write", nargs="*", choices=["png", "colour", "ply"], default=["png", "colour"])
    parser.add_argument("--overwrite", action="store_true", help="predict again what is there")
    parser.add_argument("--device", default=get_device(), help=f"({get_device()})")
    parser.add_argument("--batch", type=int, default=1, help="images of one size, or tiles, at a time (1)")
    parser.add_argument("--tile", type=int, metavar="PIXELS", help="predict larger images in square tiles, blended")
    parser.add_argument("--overlap", type=int, default=64, metavar="PIXELS", help="of neighbouring tiles (64)")
    group = parser.add_argument_group("files")
    group.add_argument("--scale", type=float, choices=[1000, 256, 5000], default=1000, help="PNG units a metre (1000)")
    group.add_argument("--colours", default="Spectral", help="a colour map of matplotlib (Spectral: near is red)")
    group.add_argument("--range", nargs=2, type=float, metavar=("NEAR", "FAR"), help="of the colours (of all images)")
    group.add_argument(
        "--percentiles", nargs=2, type=float, default=(2, 98), help="of each image that the range holds (2 98)"
    )
    group.add_argument("--gt", metavar="FOLDER|CSV", help="ground truth, for maps of the error")
    group.add_argument("--gt-scale", type=float, default=1000, help="units a metre of the maps in a folder (1000)")
    group.add_argument("--intrinsics", nargs=4, type=float, metavar=("FX", "FY", "CX", "CY"), help="in pixels")
    group.add_argument("--fov", type=float, default=60, help="degrees, a guess where EXIF gives no focal length (60)")
    group.add_argument("--drop-edges", type=float, metavar="RATIO", help="no points at jumps in depth, such as 1.05")


def run(args: argparse.Namespace) -> None:
    if args.batch < 1:
        raise ConfigError(f"--batch {args.batch} must be at least 1")
    if args.range and not args.range[0] < args.range[1]:
        raise ConfigError(f"--range {args.range[0]:g} {args.range[1]:g} must rise")
    if not 0 <= args.percentiles[0] < args.percentiles[1] <= 100:
        raise ConfigError(f"--percentiles {args.percentiles[0]:g} {args.percentiles[1]:g} must rise, from 0 to 100")
    cfg = read_config(args.config) if args.config else config_in(args.checkpoint)
    cfg.merge_from_dict(args.cfg_options)
    sources = Sources(args.images, without=args.out)
    predictor = DepthPredictor(cfg, args.checkpoint, device=args.device)
    about = {"model": start_metadata(args)}
    if predictor.quantity != "metre" and (args.gt or "ply" in args.write):
        raise ConfigError(f"this model predicts {predictor.quantity}, which has no points and no error; leave them out")
    put(json.dumps(about).encode(), args.out / "metadata.json")  # first, to tell whose the files of a stopped run are
    done = predict(sources, predictor, args)
    about |= write_outputs(sources, args, predictor.quantity)
    put(json.dumps(about, indent=1).encode(), args.out / "metadata.json")
    report(about, done, args)
    if done["unreadable"]:
        sys.exit(f"error: {done['unreadable']} images could not be read (named above); the others are done")
