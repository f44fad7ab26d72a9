"""Videos in: folders of pictures or files, one frame at a time, checked. Videos out: masks drawn over the frames."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mode

import cv2
import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.pictures import read_rgb
from pe_spatial.writing import replacing

from .masks import PALETTE, read_mask

_VOID = 255
_PICTURES = (".jpg", ".jpeg", ".png")
FPS = 24.0  # of folders, which do not say; DAVIS has 24


@dataclass(frozen=True)
class Clip:
    """A video and the mask of its first frame; nothing is read before `load`.

    Args:
        name: of the folder or file that results go to.
        frames: pictures in order (see `list_frames`), or a video file.
        mask: index mask of the first frame.
    """

    name: str
    frames: tuple[Path, ...] | Path
    mask: Path

    def __len__(self) -> int:
        """Count the frames; for a video file it is what the file says, which may be wrong."""
        if isinstance(self.frames, tuple):
            return len(self.frames)
        return max(int(_open(self.frames).get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return FPS if isinstance(self.frames, tuple) else _open(self.frames).get(cv2.CAP_PROP_FPS) or FPS

    def load(self) -> tuple[np.ndarray, Iterator[tuple[str, np.ndarray]]]:
        """Return the first mask (H, W) uint8 and an iterator of the frames, which reads them one by one.

        The id 255 in the mask is void and becomes background; with 0 alone beside it, as in DAVIS 2016, it is object 1.
        A frame is its name (that of the file, or five digits) and (H, W, 3) uint8 RGB. Raises DatasetError for a mask
        without objects, and while iterating for a frame that cannot be read or is of another size than the mask.
        """
        mask = read_mask(self.mask)
        binary = not np.any((mask > 0) & (mask < _VOID))
        mask[mask == _VOID] = int(binary)
        if not mask.any():
            raise DatasetError(f"{self.mask} holds no object to follow; draw at least one into the first mask")
        return mask, self._frames(mask.shape)

    def _frames(self, size: tuple[int, ...]) -> Iterator[tuple[str, np.ndarray]]:
        if isinstance(self.frames, tuple):
            frames = ((path.stem, str(path), read_rgb(path)) for path in self.frames)
        else:
            decoded = enumerate(decode_video(self.frames))
            frames = ((f"{i:05d}", f"frame {i} of {self.frames}", rgb) for i, rgb in decoded)
        for name, source, rgb in frames:
            if rgb.shape[:2] != size:
                raise DatasetError(
                    f"{source} is {rgb.shape[0]}x{rgb.shape[1]} (height x width) but {self.mask} is "
                    f"{size[0]}x{size[1]}; all frames and the first mask need one size"
                )
            yield name, rgb


def list_frames(folder: str | Path) -> tuple[Path, ...]:
    """List the pictures (jpg, png) of a folder in the order of their numbers, or else of their names.

    Where names are numbers at equal distances, none may be missing. Raises DatasetError that names what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"no folder of frames at {folder}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith("."))
    if not paths:
        raise DatasetError(f"{folder} holds no frames, that is pictures that end in {', '.join(_PICTURES)}")
    twice = sorted(b.name for a, b in pairwise(paths) if a.stem == b.stem)
    if twice:
        raise DatasetError(f"{folder} holds a frame twice, for instance as {twice[0]}; keep one picture of each frame")
    counters = [re.fullmatch(r"(.*?)(\d+)", path.stem) for path in paths]
    if len(paths) < 2 or not all(counters) or len({counter[1] for counter in counters if counter}) > 1:
        return tuple(paths)
    numbers = {int(counter[2]): path for counter, path in zip(counters, paths, strict=True) if counter}
    order = sorted(numbers)
    gaps = [b - a for a, b in pairwise(order)]
    step = mode(gaps)
    if not any(gap % step for gap in gaps):
        missing = sorted(set(range(order[0], order[-1], step)) - set(order))
        if missing:
            width = len(paths[0].stem) - len(counters[0][1])  # type: ignore[index]
            names = ", ".join(f"{number:0{width}d}" for number in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise DatasetError(f"{folder} lacks the frames {names}{more}; restore them, or number the frames anew")
    return tuple(numbers[number] for number in order)


def _open(path: Path) -> cv2.VideoCapture:
    if not path.is_file():
        raise DatasetError(f"no video at {path}; give a file, or a folder of pictures")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DatasetError(f"OpenCV cannot open the video {path}; give it as H.264 in mp4, or as a folder of pictures")
    return capture


def decode_video(path: Path) -> Iterator[np.ndarray]:
    """Yield the frames (H, W, 3) uint8 RGB of a video file; DatasetError if it ends before its announced end."""
    capture = _open(path)
    announced = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    count = 0
    while True:
        there, bgr = capture.read()
        if not there:
            break
        count += 1
        yield bgr[..., ::-1]
    if count < announced - 2 or not count:  # some containers only estimate the number
        raise DatasetError(
            f"{path} can be decoded up to frame {count} of {announced}; copy it again, or give a folder of pictures"
        )


def overlay(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the object ids `mask` (H, W) over (H, W, 3) uint8 RGB: half transparent, with a solid rim."""
    colours = PALETTE[mask]
    rim = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    mixed = np.where(mask[..., None] > 0, rgb // 2 + colours // 2, rgb)
    return np.where((rim & (mask > 0))[..., None], colours, mixed)


@contextmanager
def mp4_writer(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Give a function that appends a frame (H, W, 3) uint8 RGB to an mp4, which appears complete or not at all.

    Raises DatasetError if OpenCV cannot encode here.
    """
    writer = cv2.VideoWriter()
    with replacing(path) as unfinished:

        def write(rgb: np.ndarray) -> None:
            codec = cv2.VideoWriter_fourcc(*"mp4v")  # type: ignore[attr-defined]
            if not writer.isOpened() and not writer.open(str(unfinished), codec, fps, rgb.shape[1::-1]):
                raise DatasetError(f"OpenCV cannot write {path} as mp4 here; install opencv-python with its own codecs")
            writer.write(np.ascontiguousarray(rgb[..., ::-1]))

        try:
            yield write
        finally:
            writer.release()


def write_overlay(clip: Clip, masks: Path, path: Path) -> None:
    """Write the frames of `clip` with their masks, `masks`/<frame>.png, as `mp4_writer` does."""
    _, frames = clip.load()
    with mp4_writer(path, clip.fps) as write:
        for name, rgb in frames:
            write(overlay(rgb, read_mask(masks / f"{name}.png")))
