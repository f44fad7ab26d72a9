"""Show the features of images or a video as colors: principal components, similarity to a patch, attention.

pe-spatial show_features IMAGES --variant pe_synthetic_xs8_192 --out features.png
pe-spatial show_features IMAGE.jpg --variant pe_spatial_b16_512 --layers 2,5,8,11 --show pca similarity --point 320,200
pe-spatial show_features IMAGES --checkpoint work_dirs/NAME/iter_100.pth --show attention --point 320,200
pe-spatial show_features IMAGES --phrase "a red cone" "the floor" --variant PE-Core-L14-336 --size 672
pe-spatial show_features VIDEO.mp4 --variant timm:vit_small_patch14_dinov2.lvd142m --out features.mp4

PCA is the PE paper's: half of the features and half of their Gaussian blur, three components as lightness, chroma and
hue. --point is in pixels of the image: similarity needs it, and attention is that of the patch there, or else of the
class token. --phrase shows where an image is like a text, by a PE-Core (--variant, or --checkpoint FILE). Images are
resized to whole patches, the longer side to --size. A video gives a video.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import VARIANT_HELP, add_device, choose_device, layers, variant
from pe_spatial.errors import ConfigError, DatasetError, listed, one_of

if TYPE_CHECKING:
    from pe_spatial.features.extract import FeatureExtractor
    from pe_spatial.features.show import Look, Named

MOST = 64
FITTED = 12  # frames of a video that its basis is fitted to


def point(text: str) -> tuple[float, float]:
    try:
        x, y = map(float, text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not x,y in pixels, such as 320,200") from None
    return x, y


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGES", help="images, folders, or one video")
    parser.add_argument("--variant", type=variant, help=f"{VARIANT_HELP} (default: that of the checkpoint)")
    weights = "weights: 'released', 'none' (random), or a file, a detector's too (default: released)"
    parser.add_argument("--checkpoint", default="released", help=weights)
    parser.add_argument("--layers", type=layers, default="all", metavar="all|5,8,11", help="encoder layers (blocks)")
    kinds = ["pca", "similarity", "attention"]
    parser.add_argument("--show", nargs="+", choices=kinds, default=["pca"], help="what to show (default: pca)")
    parser.add_argument("--point", type=point, metavar="X,Y", help="pixel of the patch to compare with")
    phrase = "show the similarity of the patches to texts instead, by a PE-Core"
    parser.add_argument("--phrase", nargs="+", metavar="TEXT", help=phrase)
    shared = "who shares a PCA basis: all images, for each layer; all layers and images; none (default: images)"
    parser.add_argument("--basis", choices=["images", "layers", "none"], help=shared)
    parser.add_argument("--geometry", metavar="release|timm|vitdet", help="geometry of the encoder (default: release)")
    size = "longer side that the encoder gets (default: side of its pretraining images)"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=size)
    parser.add_argument("--columns", type=int, default=8, help="images in a row of the sheet")
    parser.add_argument("--width", type=int, default=240, metavar="PIXELS", help="width of an image in the sheet")
    out = "file to write: .png or .jpg, for a video .mp4 (default: features.png, features.mp4)"
    parser.add_argument("--out", type=Path, help=out)
    add_device(parser)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.features.extract import FeatureExtractor, load_encoder
    from pe_spatial.features.show import Look
    from pe_spatial.video import VIDEOS

    check(args)
    videos = [path for path in args.images if path.suffix.lower() in VIDEOS]
    if videos and len(args.images) > 1:
        raise ConfigError(f"{videos[0]} is a video; give it alone")
    out = args.out or Path("features.mp4" if videos else "features.png")
    one_of("the suffix of --out", out.suffix.lower(), [".mp4"] if videos else [".png", ".jpg"])
    if args.phrase is not None and videos:
        raise ConfigError("--phrase is for images; extract frames of the video")
    images = [] if videos else read_images(args.images)
    if args.phrase is not None:
        write_phrases(args, images, out)
        return
    options = {} if args.geometry is None else dict(geometry=args.geometry)
    variant = args.variant or trained_variant(args.checkpoint)
    encoder = load_encoder(variant, args.checkpoint, layers=args.layers, **options)
    extractor = FeatureExtractor(encoder, long_side=args.size, device=choose_device(args))
    look = Look(tuple(dict.fromkeys(args.show)), args.point, args.basis or "images", args.columns, args.width)
    if videos:
        write_video(extractor, videos[0], out, look)
    else:
        write_sheet(extractor, images, out, look)
    print(f"wrote {out}")


def trained_variant(checkpoint: str) -> dict[str, Any] | None:
    """Return the encoder, as far as it was built, of a checkpoint that `train` wrote; None for any other file."""
    if not Path(checkpoint).is_file() or find_spec("mmengine") is None:
        return None
    from pe_spatial.encoder.checkpoint import to_timm_names
    from pe_spatial.encoder.files import CheckpointError, read_state_dict
    from pe_spatial.encoder.variants import get_config
    from pe_spatial.engine.configs import config_in
    from pe_spatial.engine.summary import encoders

    try:
        variant = next((options["variant"] for _, options in encoders(config_in(checkpoint).get("model"))), None)
    except CheckpointError:
        return None
    if variant is None or str(variant).startswith("timm:"):
        return None
    names = to_timm_names(read_state_dict(checkpoint))[0]
    blocks = {name.split(".")[1] for name in names if name.startswith("blocks.")}
    return asdict(get_config(variant)) | dict(depth=len(blocks))  # without those after the last layer that was read


def check(args: argparse.Namespace) -> None:
    """Refuse options that do not go together."""
    if args.basis is not None and (args.phrase is not None or "pca" not in args.show):
        raise ConfigError("--basis is for --show pca; omit it")
    if args.phrase is not None:
        given = [name for name in ("point", "geometry") if getattr(args, name) is not None]
        if given or args.show != ["pca"] or args.layers != "all":
            raise ConfigError("--phrase has no --show, --layers, --point and --geometry; omit them")
        if args.checkpoint == "none" or (args.checkpoint == "released" and not isinstance(args.variant, str)):
            raise ConfigError("--phrase needs a PE-Core; give --variant PE-Core-B16-224, or --checkpoint FILE")
        if args.variant is not None and args.checkpoint != "released":
            raise ConfigError("--phrase takes the PE-Core from --checkpoint FILE; omit --variant")
    if "similarity" in args.show and args.point is None:
        raise ConfigError("--show similarity needs --point x,y, the patch to compare with")
    if args.point is not None and set(args.show) == {"pca"}:
        raise ConfigError("--point is for --show similarity and attention; name one of them, or omit it")
    if args.columns < 2 or args.width < 16 or (args.size is not None and args.size < 1):
        raise ConfigError("--columns must be at least 2, --width at least 16 and --size at least 1")
    if args.geometry and isinstance(args.variant, str) and args.variant.startswith("timm:"):
        raise ConfigError(f"--geometry is for Perception Encoders; omit it for {args.variant}")


def read_images(paths: list[Path]) -> list[Named]:
    """Read images and the images of folders."""
    from pe_spatial.images import image_suffixes, read_rgb

    files: list[Path] = []
    for path in paths:
        inside = sorted(p for p in path.iterdir() if p.suffix.lower() in image_suffixes()) if path.is_dir() else [path]
        if not inside:
            raise DatasetError(f"{path} has no images; give another folder")
        files += inside
    if len(files) > MOST:
        raise DatasetError(f"{len(files)} images are given, and a sheet has room for {MOST}; name some of them")
    images, unreadable = [], []
    for file in files:
        try:
            images.append((file.name, read_rgb(file)))
        except DatasetError as error:
            unreadable.append(str(error))
    if not images:
        raise DatasetError(unreadable[0])
    if unreadable:
        print(f"omitted {len(unreadable)} of {len(files)} images: {listed(unreadable, 3)}")
    return images


def write_phrases(args: argparse.Namespace, images: list[Named], out: Path) -> None:
    """Write a sheet of the similarities of images to phrases."""
    from PIL import Image

    from pe_spatial.atomic import atomic_write
    from pe_spatial.features.phrases import PhraseMaps, draw_phrases
    from pe_spatial.language.model import PECore

    model = PECore.from_pretrained(args.variant if args.checkpoint == "released" else args.checkpoint)
    maps = PhraseMaps(model.to(choose_device(args)), args.phrase, long_side=args.size)
    with atomic_write(out) as unfinished:
        Image.fromarray(draw_phrases(maps, images, columns=args.columns, width=args.width)).save(unfinished, quality=88)
    print(f"wrote {out}")


def describe(extractor: FeatureExtractor, name: str, shape: tuple[int, ...]) -> str:
    """Say how an image of `shape` (H, W, 3) is resized."""
    height, width = extractor.input_size(shape[:2], name)
    patch = extractor.encoder.patch_size
    grid = f"{width // patch}x{height // patch} patches"
    return f"{name}: {shape[1]}x{shape[0]} is resized to {width}x{height} pixels, {grid}"


def write_sheet(extractor: FeatureExtractor, images: list[Named], out: Path, look: Look) -> None:
    from PIL import Image

    from pe_spatial.atomic import atomic_write
    from pe_spatial.features.show import draw_images

    print(*(describe(extractor, name, rgb.shape) for name, rgb in images), sep="\n")
    sheet = draw_images(extractor, images, look)
    with atomic_write(out) as unfinished:
        Image.fromarray(sheet).save(unfinished, quality=88, optimize=True)


def write_video(extractor: FeatureExtractor, path: Path, out: Path, look: Look) -> None:
    """Write the video `path` beside its features, with colors that are fitted to some of its frames."""
    from tqdm import tqdm

    from pe_spatial.features.show import Colors, draw_frames
    from pe_spatial.video import count_frames, decode_video, frame_rate, mp4_writer

    step = max(1, count_frames(path) // FITTED)
    chosen = [rgb for i, rgb in enumerate(decode_video(path)) if i % step == 0][: 2 * FITTED]
    print(describe(extractor, path.name, chosen[0].shape))
    colors = Colors([extractor.maps(rgb, path.name) for rgb in chosen], look.shared)
    frames = tqdm(((path.name, rgb) for rgb in decode_video(path)), total=count_frames(path) or None, unit="frame")
    with mp4_writer(out, frame_rate(path) or 25) as write:
        for sheet in draw_frames(extractor, frames, look, colors):
            write(sheet)
