"""What predict does with several checkpoints: one encode for all, a folder for each task, and what it cost."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from pe_spatial.cli.arguments import choose_device, given, refuse, without_prints
from pe_spatial.cli.track import read_prompts
from pe_spatial.errors import ConfigError
from pe_spatial.predict.together import Together
from pe_spatial.runtime.loading import load_exported
from pe_spatial.runtime.manifest import is_exported

_NOT_SHARED = (
    "config", "tile", "overlap", "tta", "classes", "batch", "frames", "keep", "against", "words", "cfg_options",
)  # fmt: skip
_FORMATS = ("images", "json", "csv", "masks")


def run_tasks(args: argparse.Namespace) -> None:
    """Predict with all checkpoints of --checkpoint."""
    from tqdm import tqdm

    from pe_spatial.engine.predictions import record_model, recorded
    from pe_spatial.engine.sources import Sources, is_video
    from pe_spatial.multitask.folder import TaskFolders
    from pe_spatial.video import count_frames

    check(args)
    if (args.out / "metadata.json").is_file():
        recorded(args.out / "metadata.json", "models")
    sources = Sources(args.inputs, exclude=args.out)
    score = 0.3 if args.score is None else args.score
    with without_prints():
        model = _load(args, score)
    prompts = None
    if args.points or args.box or args.mask:
        if "tracking" not in model.tasks:
            raise ConfigError("prompts are for a tracker, and there is none among the checkpoints; omit them")
        prompts = read_prompts(args)
    images = [path for path in sources.files.values() if not is_video(path)]
    if "tracking" in model.tasks and images:
        raise ConfigError(
            f"a tracker follows objects through videos, and {images[0].name} is an image; give video files, because "
            "the frames of a folder are images here"
        )
    last = max(prompts or [0])
    for path in sources.files.values() if prompts else ():
        if last >= count_frames(path) > 0:
            raise ConfigError(f"{path} has {count_frames(path)} frames, so there is no frame {last} to prompt on")
    folder = TaskFolders(args.out, model, prompts=prompts, formats=args.write or ("images", "json", "csv"),
                         progress=partial(tqdm, unit="image"))  # fmt: skip
    options = dict(score=score, size=model.size, write=sorted(folder.formats), prompts=_written(args))
    for task, source in zip(model.tasks, model.sources, strict=True):
        record_model(args.out / task, source, overwrite=args.overwrite, **options)
    print(*model.groups(), sep="\n")
    folder.run(sources, overwrite=args.overwrite)
    objects = folder.finish_tasks()
    _tell(folder, objects, args.out)
    _write_costs(args.out, model)
    if folder.unreadable and not folder.counts["predicted"] + folder.counts["kept"]:
        sys.exit("error: no input could be read (listed above)")


def _load(args: argparse.Namespace, score: float) -> Together:
    """Load the checkpoints, or the folder that `export` wrote for several."""
    import pe_spatial

    if len(args.checkpoint) > 1:
        return pe_spatial.MultiTask(args.checkpoint, device=choose_device(args), score=score, size=args.size)
    model = load_exported(args.checkpoint[0], score=score)
    if args.size not in (None, model.size):
        raise ConfigError(
            f"{args.checkpoint[0]} is for frames of --size {model.size}, not {args.size}; omit the option"
        )
    return model


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that several checkpoints do not have."""
    if wrong := given(args, _NOT_SHARED):
        option = f"--{wrong[0].replace('_', '-')}"
        raise ConfigError(f"several checkpoints have no {option}; omit it, or predict with each alone")
    exported = [checkpoint for checkpoint in args.checkpoint if is_exported(checkpoint)]
    if exported and len(args.checkpoint) > 1:
        raise ConfigError(f"{exported[0]} is an exported model, which shares no encoder; predict with it alone")
    if exported:
        refuse(args, "device", because=f"{exported[0]} is exported for a CPU, without")
    wrong = [name for name in args.write or () if name not in _FORMATS]
    if wrong:
        raise ConfigError(f"several checkpoints do not write {wrong[0]!r} but {', '.join(_FORMATS)}")
    if args.score is not None and not 0 <= args.score <= 1:
        raise ConfigError(f"--score is {args.score:g}; scores are from 0 to 1")


def _written(args: argparse.Namespace) -> list[str]:
    return [f"{name} {value}" for name in ("points", "box", "mask") for value in getattr(args, name) or ()]


def _tell(folder: Any, objects: dict[str, int], out: Path) -> None:
    found = ", ".join(f"{count} objects of {task}" for task, count in objects.items() if count)
    counts, unreadable = folder.counts, folder.unreadable
    print(
        f"{counts['predicted']} predicted, {counts['kept']} kept, {len(unreadable)} unreadable; "
        f"{found or 'no objects'} in {out}"
    )
    print(*(f"unreadable: {message}" for message in unreadable), sep="\n", end="\n" * bool(unreadable), file=sys.stderr)


def _write_costs(out: Path, model: Any) -> None:
    """Print the cost of a frame, and put it into metadata.json."""
    from pe_spatial.atomic import write_json

    costs = model.report()
    if not costs:  # everything was kept
        return
    heads = ", ".join(f"{task} {ms:.1f}" for task, ms in costs["heads"].items())
    print(
        f"per frame: {costs['encodes']:g} encodes of {costs['encoder']:.1f} ms in all, {heads}, together "
        f"{costs['total']:.1f} ms; separate models about {costs['separate']:.1f} ms (ratio {costs['ratio']:.2f})"
    )
    write_json(out / "metadata.json", {"models": dict(zip(model.tasks, model.sources, strict=True)), "costs": costs})
