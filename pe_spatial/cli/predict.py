"""Predict images, folders, videos and cameras with any trained model; draw the results and write them as files.

pe-spatial predict photos/ --checkpoint work_dirs/coco/iter_66375.pth --out predictions
pe-spatial predict 'shelf/*.jpg' --checkpoint CKPT --score 0.5 --classes person bicycle --write images masks csv
pe-spatial predict photos/ --checkpoint CKPT --keep "a red cone" --words PE-Core-B16-224    # filter by words
pe-spatial predict aerial.tif --checkpoint CKPT --tile --overlap 256     # a large image in overlapping windows
pe-spatial predict 0 --checkpoint CKPT                                   # a camera, or rtsp://...; Ctrl-C ends it
pe-spatial predict rooms/ --checkpoint DEPTH.pth                         # as infer_depth
pe-spatial predict cat.mp4 --checkpoint TRACKER.pth --box 1:10,20,200,300    # as track
pe-spatial predict walk.mp4 --checkpoint DET.pth DEPTH.pth TRACKER.pth --size 192    # one encode for all three

What the model does follows from the checkpoint. Writes into --out: drawn images and videos, predictions.json (COCO's
form) and predictions.csv; a second call continues where the first one ended. Depth estimators and trackers write what
infer_depth and track do, which have more options.

Several checkpoints on one frozen encoder run it once per frame, and each task gets its folder in --out. Without prompts
a tracker starts from the boxes of the detector (docs/multitask.md).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import (
    add_cfg_options,
    add_device,
    choose_device,
    given,
    refuse_for_exported,
    without_prints,
)
from pe_spatial.cli.own_data import images_of
from pe_spatial.cli.track import add_prompts
from pe_spatial.errors import ConfigError
from pe_spatial.runtime.manifest import is_exported, read_manifest

if TYPE_CHECKING:
    import numpy as np
    from mmengine.config import Config

SCORE = 0.3
AGAINST = ("an object", "the background")
OPTIONS = {
    "detection": (
        "write", "overwrite", "batch", "tta", "frames", "score", "classes", "tile", "overlap", "keep", "against",
        "words",
    ),
    "segmentation": ("write", "overwrite", "batch", "tta", "frames"),
    "depth": ("write", "overwrite", "batch", "size", "tile", "overlap"),
    "tracking": ("write", "points", "box", "mask"),
}
"""The options that a kind of model has; the others are for all."""
FORMATS = {
    "detection": ("images", "json", "csv", "masks"),
    "segmentation": ("images", "json", "csv", "masks"),
    "depth": ("png", "color", "ply"),
    "tracking": ("images", "masks"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    inputs = "images, folders (searched recursively), patterns, videos, the number of a camera, or rtsp://..."
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help=inputs)
    data = "also the images of an own dataset: of its test part, or of validation if it has none (docs/own_data.md)"
    parser.add_argument("--data", metavar="DATA", help=data)
    several = "checkpoint that `pe-spatial train` wrote, or other weights; several if they share one frozen encoder"
    parser.add_argument("--checkpoint", required=True, nargs="+", help=several)
    parser.add_argument("--config", help="config of other weights (default: the config inside the checkpoint)")
    add_cfg_options(parser)
    parser.add_argument("--out", type=Path, default=Path("predictions"), help="folder of the results")
    formats = sorted({name for names in FORMATS.values() for name in names})
    write = "what to write: images, json, csv, masks; depth: png, color, ply (default: images json csv)"
    parser.add_argument("--write", nargs="+", choices=formats, metavar="FORMAT", help=write)
    parser.add_argument("--overwrite", action="store_true", help="predict again what is finished")
    add_device(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="images of one size, or tiles, per forward pass")
    parser.add_argument("--frames", type=int, metavar="N", help="stop after N frames of a camera")
    size = "several checkpoints: side of the square that all get; depth: short side, as for infer_depth"
    parser.add_argument("--size", type=int, metavar="PIXELS", help=size)
    group = parser.add_argument_group("detectors")
    group.add_argument("--score", type=float, help=f"lowest score (default: {SCORE})")
    group.add_argument("--classes", nargs="+", metavar="NAME", help="only these classes")
    keep = "only objects that fit one of these phrases, which become their classes"
    group.add_argument("--keep", nargs="+", metavar="PHRASE", help=keep)
    against = "phrases that compete with --keep (default: an object, the background)"
    group.add_argument("--against", nargs="+", metavar="PHRASE", help=against)
    group.add_argument("--words", metavar="MODEL", help="PE-Core of --keep: a name such as PE-Core-B16-224, or a file")
    tile = "predict in square tiles (default: of the side that the model gets)"
    group.add_argument("--tile", type=int, nargs="?", const=0, metavar="PIXELS", help=tile)
    overlap = "overlap of neighboring tiles, at least the largest object (default: a quarter of the tile)"
    group.add_argument("--overlap", type=int, metavar="PIXELS", help=overlap)
    group.add_argument("--tta", action="store_true", help="test-time augmentation, as the config describes it")
    add_prompts(parser.add_argument_group("trackers"))


def run(args: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore", category=UserWarning)  # of torch and mmdet, about their own code
    # The encoder's advice on geometry is for training; here the checkpoint determines it.
    logging.getLogger("pe_spatial.encoder.vit").setLevel(logging.ERROR)
    if args.data is not None:
        args.inputs = [*args.inputs, *images_of(args.data)]
    if not args.inputs:
        raise ConfigError(
            "there is nothing to predict; give images, folders, videos, a camera (before --checkpoint), or --data DATA"
        )
    if len(args.checkpoint) > 1 or _is_together(args.checkpoint[0]):
        from pe_spatial.cli.multitask import run_tasks

        run_tasks(args)
        return
    (args.checkpoint,) = args.checkpoint
    if is_exported(args.checkpoint):
        run_exported(args)
        return
    with without_prints():
        from pe_spatial.engine.options import set_options
        from pe_spatial.predict.models import config_and_weights, task_of

        cfg, args.checkpoint = config_and_weights(args.checkpoint, args.config)
        set_options(cfg, args.cfg_options)
        task = task_of(cfg)
    check_options(args, task)
    if task == "depth":
        run_depth(args)
    elif task == "tracking":
        run_tracking(args)
    else:
        run_predictor(args, cfg)


def _is_together(checkpoint: str) -> bool:
    return is_exported(checkpoint) and read_manifest(checkpoint).task == "multitask"


def check_options(args: argparse.Namespace, task: str) -> None:
    """Raise ConfigError for an option that this kind of model does not have."""
    every = {name for names in OPTIONS.values() for name in names}
    wrong = [name for name in given(args, sorted(every)) if name not in OPTIONS[task]]
    if wrong:
        allowed = ", ".join(f"--{name}" for name in OPTIONS[task])
        raise ConfigError(f"{args.checkpoint} is a model for {task}, which has no --{wrong[0]}; it has {allowed}")
    wrong = [name for name in args.write or () if name not in FORMATS[task]]
    if wrong:
        raise ConfigError(f"a model for {task} does not write {wrong[0]!r} but {', '.join(FORMATS[task])}")


def run_exported(args: argparse.Namespace) -> None:
    """Predict with a folder that `pe-spatial export` wrote."""
    task = read_manifest(args.checkpoint).task
    if task not in OPTIONS:
        raise ConfigError(f"{args.checkpoint} is an exported {task}, which predicts nothing; give a trained model")
    check_options(args, task)
    refuse_for_exported(args, "config", "cfg_options", "device", "tile", "overlap", "tta", "keep", "words")
    runs = {"depth": run_depth, "tracking": run_tracking}
    if task in runs:
        runs[task](args)
    else:
        run_predictor(args, None)


def run_predictor(args: argparse.Namespace, cfg: Config | None) -> None:
    """Predict with a detector or a segmenter; `cfg` is None for an exported folder."""
    from functools import partial

    from tqdm import tqdm

    import pe_spatial
    from pe_spatial.engine.predictions import record_model
    from pe_spatial.engine.sources import Sources
    from pe_spatial.predict.folder import ResultFolder
    from pe_spatial.predict.live import LiveFrames, is_live
    from pe_spatial.predict.results import class_labels

    if args.score is not None and not 0 <= args.score <= 1:
        raise ConfigError(f"--score is {args.score:g}; scores are from 0 to 1")
    if args.batch is not None and args.batch < 1:
        raise ConfigError(f"the batch size is {args.batch}; it must be at least 1")
    check_words(args)
    live = [text for text in args.inputs if is_live(text) and not Path(text).exists()]
    if live and len(args.inputs) > 1:
        raise ConfigError(f"{live[0]} is a camera or a stream, which is predicted alone; give it without other inputs")
    if args.frames is not None and not live:
        raise ConfigError("--frames is for cameras and streams; omit it")
    sources = None if live else Sources(args.inputs, exclude=args.out)
    with without_prints():
        device = "cpu" if cfg is None else choose_device(args)
        predictor: Any = pe_spatial.load(args.checkpoint, config=cfg, device=device, tta=args.tta,
                                         score=score_of(args, cfg), words=args.words)  # fmt: skip
    class_labels(args.classes or (), predictor.class_names)
    if args.keep is not None:
        predictor = predictor.named(args.keep, background=args.against or AGAINST, proposals=False)
    if args.tile is not None:
        predictor.choose_tiles(args.tile or None, args.overlap)
    elif args.overlap is not None:
        raise ConfigError("--overlap is of tiles; give --tile too, or omit it")
    progress = partial(tqdm, unit="image" if sources else "frame")
    folder = ResultFolder(args.out, partial(predict, predictor, args), class_names=predictor.class_names,
                          formats=args.write or ("images", "json", "csv"), progress=progress)  # fmt: skip
    names = ("score", "classes", "tile", "overlap", "tta", "keep", "against", "words")
    options = {name: getattr(args, name) for name in names}
    options["write"] = sorted(folder.formats)
    options["cfg_options"] = {key: str(value) for key, value in args.cfg_options.items()}
    file = args.checkpoint if cfg is not None else Path(args.checkpoint, "manifest.json")
    record_model(args.out, file, overwrite=args.overwrite, **options)
    if sources:
        folder.run(sources, overwrite=args.overwrite)
    else:
        frames = LiveFrames(live[0])
        folder.run_live(frames, limit=args.frames)
        print(f"{frames.dropped} frames dropped, {frames.reconnected} times reconnected")
    objects = folder.finish()
    counts, unreadable = folder.counts, folder.unreadable
    limit = f" of score {predictor.score:g} or more" if predictor.task == "detection" else ""
    print(
        f"{counts['predicted']} predicted, {counts['kept']} kept, {len(unreadable)} unreadable; "
        f"{objects} objects{limit} in {args.out}"
    )
    print(*(f"unreadable: {message}" for message in unreadable), sep="\n", end="\n" * bool(unreadable), file=sys.stderr)
    if unreadable and not counts["predicted"] + counts["kept"]:
        sys.exit("error: no input could be read (listed above)")


def check_words(args: argparse.Namespace) -> None:
    """Raise ConfigError for options of words that do not go together."""
    if args.keep is None and (args.words is not None or args.against is not None):
        raise ConfigError("--words and --against are for --keep PHRASE; give it too, or omit them")
    if args.keep is not None and args.words is None:
        raise ConfigError("--keep needs --words, a PE-Core such as PE-Core-B16-224, or a file of one")
    if args.keep is not None and (args.classes is not None or args.tile is not None):
        raise ConfigError("--keep does not go with --classes and --tile; omit them")
    if args.keep is not None:
        from pe_spatial.language.protocol import check_names

        check_names(args.keep, "--keep")


def score_of(args: argparse.Namespace, cfg: Config | None) -> float:
    """Return the lowest score: the given one or `SCORE` for detectors, 0 for segmenters, which have none."""
    from pe_spatial.predict.models import task_of

    task = read_manifest(args.checkpoint).task if cfg is None else task_of(cfg)
    if task != "detection":
        return 0.0
    return SCORE if args.score is None else args.score


def predict(predictor: Any, args: argparse.Namespace, images: Iterable[np.ndarray]) -> Iterator[Any]:
    """Yield the result of each image, as the options want it."""
    batch = args.batch or 1
    if args.tile is None:
        results = predictor.stream(images, batch_size=batch)
    else:
        tiles = dict(tile=args.tile or None, overlap=args.overlap, batch_size=batch)
        results = (predictor.tiled(image, **tiles) for image in images)
    return (result.filter(classes=args.classes) for result in results) if args.classes else results


def run_depth(args: argparse.Namespace) -> None:
    """Predict depth as infer_depth does."""
    from pe_spatial.cli.main import run_command

    options = [*args.inputs, "--checkpoint", args.checkpoint, "--out", args.out]
    if args.tile == 0:
        raise ConfigError("give --tile a number of pixels; depth has no usual one")
    for name in ("config", "device", "batch", "size", "tile", "overlap"):
        if getattr(args, name) is not None:
            options += [f"--{name}", getattr(args, name)]
    options += ["--write", *args.write] if args.write else []
    options += ["--overwrite"] if args.overwrite else []
    if args.cfg_options:
        options += ["--cfg-options", *(f"{key}={value}" for key, value in args.cfg_options.items())]
    run_command("infer_depth", list(map(str, options)))


def run_tracking(args: argparse.Namespace) -> None:
    """Track as track does."""
    from pe_spatial.cli.main import run_command

    if len(args.inputs) > 1:
        raise ConfigError("prompts belong to one video; give one input")
    if args.cfg_options:
        raise ConfigError("a tracker takes no --cfg-options; give a changed --config")
    name = Path(args.inputs[0]).stem
    options = [args.inputs[0], "--checkpoint", args.checkpoint, "--out", args.out / f"{name}.mp4"]
    if "masks" in (args.write or ()):
        options += ["--masks", args.out / "masks" / name]
    for option in ("config", "device"):
        if getattr(args, option) is not None:
            options += [f"--{option}", getattr(args, option)]
    prompts = {option: getattr(args, option) for option in ("points", "box", "mask")}
    run_command("track", list(map(str, options)), **prompts)
