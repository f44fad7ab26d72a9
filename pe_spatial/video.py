"""Videos: frames from a file or a folder one by one, and frames into an mp4."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import mode

import cv2
import numpy as np

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def list_frames(folder: str | Path) -> tuple[Path, ...]:
    """List the images (jpg, png) of a folder, ordered by number if all names end in one, else by name.

    Raises DatasetError for an empty folder and for frames missing from evenly spaced numbers; it names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"no folder of frames at {folder}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in FRAME_SUFFIXES and not p.name.startswith("."))
    if not paths:
        raise DatasetError(f"{folder} holds no frames, that is, images that end in {', '.join(FRAME_SUFFIXES)}")
    duplicates = sorted(b.name for a, b in pairwise(paths) if a.stem == b.stem)
    if duplicates:
        raise DatasetError(f"{folder} holds a frame twice, for example {duplicates[0]}; keep one image of each frame")
    matches = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in paths]
    if len(paths) < 2 or not all(matches) or len({match[1] for match in matches if match}) > 1:
        return tuple(paths)
    numbers = {int(match[2]): path for match, path in zip(matches, paths, strict=True) if match}
    order = sorted(numbers)
    gaps = [b - a for a, b in pairwise(order)]
    step = mode(gaps)
    if not any(gap % step for gap in gaps):
        missing = sorted(set(range(order[0], order[-1], step)) - set(order))
        if missing:
            width = len(paths[0].stem) - len(matches[0][1])  # type: ignore[index]
            names = ", ".join(f"{number:0{width}d}" for number in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DatasetError(f"{folder} lacks the frames {names}{more}; restore them or renumber the frames")
    return tuple(numbers[number] for number in order)


def count_frames(path: Path) -> int:
    """Return the number of frames that a video file announces, which may be wrong."""
    return max(int(_open(path).get(cv2.CAP_PROP_FRAME_COUNT)), 0)


def frame_rate(path: Path) -> float | None:
    """Return the frames per second of a video file, None if it does not say."""
    return _open(path).get(cv2.CAP_PROP_FPS) or None


def decode_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of a video file; DatasetError if it ends before its announced end."""
    capture = _open(path)
    announced, count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
    while (bgr := capture.read()[1]) is not None:
        count += 1
        yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    if count < announced - 2 or not count:  # some containers only estimate the number
        raise DatasetError(f"{path} ends after {count} of {announced} frames; copy it again or give a folder of images")


@contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a frame (H, W, 3) uint8 RGB to an mp4, written with `atomic_write`.

    Raises DatasetError if OpenCV cannot encode mp4.
    """
    writer = cv2.VideoWriter()
    with atomic_write(path) as unfinished:

        def write(rgb: np.ndarray) -> None:
            codec = cv2.VideoWriter_fourcc(*"mp4v")  # type: ignore[attr-defined]
            if not writer.isOpened() and not writer.open(str(unfinished), codec, fps, rgb.shape[1::-1]):
                raise DatasetError(f"OpenCV cannot write {path} as mp4; install an opencv-python with video codecs")
            writer.write(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            writer.release()


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise DatasetError(f"no video at {path}; give a file or a folder of images")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DatasetError(f"OpenCV cannot open the video {path}; convert it to H.264 in mp4, or to a folder of images")
    return capture
