"""Videos: frames from a file or a folder one by one, and frames into an mp4."""

import logging
import math
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
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")
MAX_FPS = 250
"""Above it a frame rate is not believed; phones film slow motion at 240."""

_log = logging.getLogger(__name__)


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
    """Return the number of frames that a video file announces, which may be wrong; 0 if it does not say."""
    return int(_property(_open(path), cv2.CAP_PROP_FRAME_COUNT))


def frame_rate(path: Path) -> float | None:
    """Return the frames per second of a video file, None if it does not say.

    Recordings of browsers give the 1000 ticks of their clock instead.
    """
    fps = _property(_open(path), cv2.CAP_PROP_FPS)
    return fps if 0 < fps <= MAX_FPS else None


def decode_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of a video file, upright; DatasetError if there are none.

    A file with fewer frames than announced gives a warning: containers count longer audio tracks, a constant rate that
    the camera did not keep, and frames that were trimmed (even MP4).
    """
    capture = _open(path)
    announced, count = int(_property(capture, cv2.CAP_PROP_FRAME_COUNT)), 0
    while (bgr := capture.read()[1]) is not None:
        count += 1
        yield cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    if not count:
        raise DatasetError(f"no frame of {path} can be decoded; copy it again or give a folder of images")
    if count < announced - 2:  # some containers round
        _log.warning(
            "%s has %d frames, and its container announces %d; if it breaks off, copy it again", path, count, announced
        )


@contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Yield a function that appends a frame (H, W, 3) uint8 RGB to an mp4, written with `atomic_write`.

    The frame rate is rounded to 0.01, and from 655 on to an integer; the last row or column is doubled if
    their number is odd. Raises DatasetError if OpenCV cannot encode mp4 or loses frames.
    """
    writer, count = cv2.VideoWriter(), 0
    fps = round(fps, 2 if fps < 655 else 0)  # the time base of MPEG-4 has 16 bits
    with atomic_write(path) as unfinished:

        def write(rgb: np.ndarray) -> None:
            nonlocal count
            h, w = rgb.shape[:2]
            bgr = cv2.copyMakeBorder(rgb[..., ::-1], 0, h % 2, 0, w % 2, cv2.BORDER_REPLICATE)
            codec = cv2.VideoWriter_fourcc(*"mp4v")  # type: ignore[attr-defined]
            if not writer.isOpened() and not writer.open(str(unfinished), codec, fps, bgr.shape[1::-1]):
                raise DatasetError(
                    f"OpenCV cannot write {path} as mp4 with {w}x{h} pixels at {fps:g} frames per second; install an "
                    "opencv-python with video codecs, and give at most 8190 pixels per side"
                )
            writer.write(bgr)
            count += 1

        try:
            yield write
        finally:
            writer.release()
        if count and count_frames(unfinished) < count:  # OpenCV is silent about that
            raise DatasetError(
                f"{path} got {count_frames(unfinished)} of {count} frames; give frames of one size, and check the disk"
            )


def _property(capture: cv2.VideoCapture, name: int) -> float:
    """Return a property that is finite and not negative, or 0."""
    value = capture.get(name)
    return value if 0 <= value < math.inf else 0.0


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise DatasetError(f"no video at {path}; give a file or a folder of images")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DatasetError(f"OpenCV cannot open the video {path}; convert it to H.264 in mp4, or to a folder of images")
    return capture
