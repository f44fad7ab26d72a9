r"""Label the objects of a video from a few prompts: a tracker carries them, and a dataset comes out.

pe-spatial label walk.mp4 --checkpoint TRACKER.pth --box 1:10,20,90,200 2:120,30,180,190 --classes 1:person 2:dog
pe-spatial label walk.mp4 --checkpoint TRACKER.pth --from DETECTOR.pth --score 0.5 --frames 0 100
pe-spatial label walk.mp4 --checkpoint TRACKER.pth --points 2@48:150,80,0     # a correction: labels/walk goes on
pe-spatial label walk.mp4 --checkpoint TRACKER.pth --every 5 --write coco yolo cvat davis
pe-spatial train pe_spatial_own_data.py --data labels/walk/coco

The prompts are those of track. Each is in the journal of --out at once, so nothing is lost in a crash: the next call
makes the same masks again and adds its own prompts. Frames that need a look are listed, worst first. To click and
correct in the browser: pe-spatial app --tracker TRACKER.pth, tab Label (docs/label.md).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.cli.arguments import add_device, choose_device, refuse, without_prints
from pe_spatial.cli.track import add_prompts, masks
from pe_spatial.errors import ConfigError, listed

if TYPE_CHECKING:
    from pe_spatial.labeling.project import LabelProject

FORMS = ("coco", "yolo", "cvat", "davis")
SCORE = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("video", type=Path, help="file or folder of frames")
    parser.add_argument("--checkpoint", required=True, help="tracker that `pe-spatial train` wrote")
    parser.add_argument("--out", type=Path, help="folder of the labels (default: labels/NAME)")
    add_prompts(parser)
    parser.add_argument("--from", dest="detector", metavar="DETECTOR", help="checkpoint whose boxes begin objects")
    frames = "on which it looks (default: 0)"
    parser.add_argument("--frames", type=int, nargs="+", metavar="FRAME", help=frames)
    parser.add_argument("--score", type=float, help=f"lowest score of its boxes (default: {SCORE})")
    kind = "classes of objects; others are called object, or as the detector says"
    parser.add_argument("--classes", nargs="+", default=[], type=named, metavar="ID:NAME", help=kind)
    parser.add_argument("--every", type=int, default=1, metavar="N", help="write every N-th frame (default: 1)")
    parser.add_argument("--write", nargs="+", choices=FORMS, default=["coco"], help="forms of the dataset")
    parser.add_argument("--polygons", action="store_true", help="COCO with polygons instead of run lengths")
    parser.add_argument("--max-frames", type=int, default=2000, metavar="FRAMES", help="longest video")
    add_device(parser)


def named(text: str) -> tuple[int, str]:
    """Split 'ID:NAME'."""
    match = re.fullmatch(r"(\d+):(.+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID:NAME, such as 1:cat")
    return int(match[1]), match[2]


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    check(args)
    marks = list(prompts(args))
    out = args.out or Path("labels", args.video.stem)
    if not marks and not args.detector and not out.exists():
        raise ConfigError("there is no object to label; give --points, --box, --mask or --from DETECTOR")
    if args.detector:
        with without_prints():
            detector = load_model(args.detector, "detection", args, score=SCORE if args.score is None else args.score)
    project = open_project(args, out)
    check_prompts(args, project, marks)
    for frame, mark in marks:
        for _ in project.prompt(frame, mark):
            pass
    for frame in (args.frames or [0]) if args.detector else ():
        begun = project.detect(detector, frame)
        print(f"frame {frame}: {len(begun)} new objects from {args.detector}")
    check_classes(args, project.session.objects)
    for i, name in args.classes:
        project.name(i, name)
    total = len(project) - project.session.tracked
    for _ in tqdm(project.track(), total=total, unit=" frames"):
        pass
    project.export(args.write, every=args.every, outlines=args.polygons)
    tell(project, args)


def check(args: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not go together, before anything is loaded or written."""
    if not args.detector:
        refuse(args, "frames", "score", because="without --from there is no use of")
    if "coco" not in args.write:
        refuse(args, "polygons", because="only --write coco has")
    if args.score is not None and not 0 <= args.score <= 1:
        raise ConfigError(f"--score is {args.score:g}; scores are from 0 to 1")
    if args.every < 1:
        raise ConfigError(f"--every is {args.every}; 1 writes every frame, 5 every fifth")


def check_prompts(args: argparse.Namespace, project: LabelProject, marks: Sequence[tuple[int, Any]]) -> None:
    """Raise an error for prompts that cannot be used, before the first of them is in the journal."""
    from pe_spatial.tracking.sam2.prompts import read_prompt

    for frame in (*(t for t, _ in marks), *(args.frames or ())):
        if not 0 <= frame < len(project):
            raise ConfigError(f"{args.video} has no frame {frame}; it has frames 0 to {len(project) - 1}")
    for frame, mark in marks:
        read_prompt(f"object {mark.object_id} on frame {frame}", mark.prompt[mark.object_id], project.size, 1)
    if not args.detector:  # which begins objects
        check_classes(args, sorted({*project.session.objects, *(mark.object_id for _, mark in marks)}))


def check_classes(args: argparse.Namespace, objects: Sequence[int]) -> None:
    """Raise ConfigError for a class of an object that does not exist."""
    unknown = sorted({i for i, _ in args.classes} - set(objects))
    if unknown:
        there = f"the objects are {listed(objects)}" if objects else "there are no objects"
        raise ConfigError(f"--classes names object {unknown[0]}, but {there}; give it a prompt too")


def open_project(args: argparse.Namespace, out: Path) -> LabelProject:
    """Open the project in the folder `out`, with the tracker of --checkpoint."""
    from pe_spatial.labeling.project import LabelProject

    with without_prints():
        tracker = load_model(args.checkpoint, "tracking", args)
    return LabelProject(out, args.video, tracker.start(), max_frames=args.max_frames)


def load_model(checkpoint: str, task: str, args: argparse.Namespace, **options: Any) -> Any:
    """Load a predictor; ConfigError for one of another task."""
    import pe_spatial
    from pe_spatial.predict.models import config_and_weights, task_of
    from pe_spatial.runtime.manifest import is_exported

    if is_exported(checkpoint):
        raise ConfigError(f"{checkpoint} is an exported model, and labels need the checkpoint it was exported from")
    found = task_of(config_and_weights(checkpoint)[0])
    if found != task:
        raise ConfigError(f"{checkpoint} is a model for {found}; give one for {task}")
    return pe_spatial.load(checkpoint, device=choose_device(args), **options)


def prompts(args: argparse.Namespace) -> Iterator[tuple[int, Any]]:
    """Yield the frame and the mark of each prompt, in the order of frames: boxes and masks before clicks."""
    from pe_spatial.tracking.sam2.session import Box, Click, Drawn

    marks: list[tuple[int, Any]] = [(t, Box(i, *box)) for t, i, box in args.box or ()]
    marks += [(t, Drawn(i, mask)) for t, i, mask in masks(args.mask or ())]
    for t, i, (x, y, *label) in args.points or ():
        if label not in ([], [0], [1]):
            raise ConfigError(f"a click of object {i} has label {label[0]:g}; 1 is on the object and 0 beside it")
        marks.append((t, Click(i, x, y, label != [0])))
    yield from sorted(marks, key=lambda one: one[0])


def tell(project: LabelProject, args: argparse.Namespace) -> None:
    """Print what was written, the frames to check, and the next command."""
    labels = project.labels(args.every)
    print(
        f"{len(labels.classes)} objects through {len(project)} frames, {len(labels.chosen)} of them in "
        f"{', '.join(args.write)}: {project.folder} (review.png shows them)"
    )
    for one in project.keyframes():
        print(f"check frame {one.frame}: object {one.object_id}, {one.reason}")
    if "coco" in args.write:
        print(f"train on it: pe-spatial train pe_spatial_own_data.py --data {project.folder / 'coco'}")
