"""Videos in: folders of images or files, one frame at a time, checked. Videos out: masks drawn over the frames."""

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

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.tracking.vos.masks import PALETTE, VOID, read_mask, read_object_masks, split_ids

_PICTURES = (".jpg", ".jpeg", ".png")
FPS = 24.0  # of folders, which do not say; DAVIS has 24


@dataclass(frozen=True)
class Clip:
    """A video and where its objects begin; nothing is read before it is asked for.

    Args:
        name: of the folder or file that results go to.
        frames: images in order (see `list_frames`), or a video file.
        mask: index mask of the first frame, with all objects that there are; or a folder of annotations, of some frames
            or of all, where each object begins on the first frame that shows it. None for frames alone.
        overlapping: the folder holds <object>/<frame>.png, a binary mask for each object, instead of <frame>.png, and
            results are to be such masks as well.
    """

    name: str
    frames: tuple[Path, ...] | Path
    mask: Path | None = None
    overlapping: bool = False

    def __len__(self) -> int:
        """Count the frames; for a video file it is what the file says, which may be wrong."""
        if isinstance(self.frames, tuple):
            return len(self.frames)
        return max(int(_open(self.frames).get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    @property
    def fps(self) -> float:
        """Frames per second."""
        return FPS if isinstance(self.frames, tuple) else _open(self.frames).get(cv2.CAP_PROP_FPS) or FPS

    def prompts(self) -> dict[str, dict[int, np.ndarray]]:
        """Read where objects begin: by name of the frame, in order, and by id the (H, W) bool mask of each.

        The id 255 in an index mask is void and becomes background; with 0 alone beside it in the mask of a first frame,
        as in DAVIS 2016, it is object 1. Objects in folders have the folders' numbers, which may be 0. Raises
        DatasetError where no object begins, and for annotations of several sizes or without a frame.
        """
        prompts: dict[str, dict[int, np.ndarray]] = {}
        sizes, seen = set(), set()
        for frame, objects in self._annotations():
            new = {i: mask for i, mask in objects.items() if i not in seen}
            if new:
                prompts[frame] = new
                seen.update(new)
                sizes |= {mask.shape for mask in new.values()}
        if not prompts:
            raise DatasetError(f"{self.mask} holds no object to follow; draw at least one into the first mask")
        if len(sizes) > 1:
            raise DatasetError(f"{self.mask} holds masks of the sizes {sorted(sizes)}; all need the size of the frames")
        return prompts

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Read the frames one by one: the name (that of the file, or five digits) and (H, W, 3) uint8 RGB.

        Raises DatasetError for a frame that cannot be read or is of another size than the first.
        """
        return self._frames(None, "the first frame")

    def load(self) -> tuple[np.ndarray, Iterator[tuple[str, np.ndarray]]]:
        """Return the index mask (H, W) uint8 of the first frame, and the frames as `read` does.

        Raises DatasetError as `prompts` and `read` do, for objects that such a mask cannot hold, and for frames of
        another size.
        """
        prompts = self.prompts()
        if self.overlapping or list(prompts) != [self._first]:
            raise DatasetError(
                f"the objects in {self.mask} may overlap or begin after the first frame, and label propagation needs "
                "one index mask of the first frame; use layout='davis' without late_objects, or a trained tracker"
            )
        objects = prompts[self._first]
        mask = np.zeros(next(iter(objects.values())).shape, np.uint8)
        for i, one in objects.items():
            mask[one] = i
        return mask, self._frames(mask.shape, str(self.mask))

    def annotated(self) -> dict[str, Path]:
        """Return the masks of a folder of annotations by the names of their frames (of several objects, one)."""
        paths = self.mask.glob("*/*.png" if self.overlapping else "*.png") if self.mask else ()
        return {path.stem: path for path in sorted(paths) if not path.name.startswith(".")}

    @property
    def _first(self) -> str:
        return self.frames[0].stem if isinstance(self.frames, tuple) else _name(0)

    def _annotations(self) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
        """Read the masks of one annotated frame after the other: its name, and (H, W) bool by object."""
        if self.mask is None:
            raise DatasetError(f"{self.name} has no mask, so there is nothing to follow")
        if not self.mask.is_dir():
            mask = read_mask(self.mask)
            yield self._first, split_ids(mask) or ({1: mask == VOID} if mask.any() else {})
            return
        names = [path.stem for path in self.frames] if isinstance(self.frames, tuple) else map(_name, range(len(self)))
        annotated = self.annotated()
        for name in names:
            path = annotated.pop(name, None)
            if path and self.overlapping:
                masks = read_object_masks(self.mask, name)
                yield name, {object_id(self.mask / folder): mask for folder, mask in masks.items() if mask.any()}
            elif path:
                yield name, split_ids(read_mask(path))
        for path in annotated.values():
            raise DatasetError(f"{path} has the name of no frame of {self.name}; give frames and masks the same names")

    def _frames(self, size: tuple[int, ...] | None, of: str) -> Iterator[tuple[str, np.ndarray]]:
        if isinstance(self.frames, tuple):
            frames = ((path.stem, str(path), read_rgb(path)) for path in self.frames)
        else:
            decoded = enumerate(decode_video(self.frames))
            frames = ((_name(i), f"frame {i} of {self.frames}", rgb) for i, rgb in decoded)
        for name, source, rgb in frames:
            size = size or rgb.shape[:2]
            if rgb.shape[:2] != size:
                raise DatasetError(
                    f"{source} is {rgb.shape[0]}x{rgb.shape[1]} (height x width) but {of} is {size[0]}x{size[1]}; all "
                    "frames and masks need one size"
                )
            yield name, rgb


def object_id(folder: Path) -> int:
    """Return the number of an object in SA-V's layout from the name of its folder."""
    if not folder.name.isdecimal():
        raise DatasetError(f"{folder} is not named by a number; SA-V's layout is <video>/<number>/<frame>.png")
    return int(folder.name)


def _name(index: int) -> str:
    """Return the name of a frame of a video file."""
    return f"{index:05d}"


def list_frames(folder: str | Path) -> tuple[Path, ...]:
    """List the images (jpg, png) of a folder in the order of their numbers, or else of their names.

    Where names are numbers at equal distances, none may be missing. Raises DatasetError that names what is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"no folder of frames at {folder}")
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in _PICTURES and not p.name.startswith("."))
    if not paths:
        raise DatasetError(f"{folder} holds no frames, that is images that end in {', '.join(_PICTURES)}")
    twice = sorted(b.name for a, b in pairwise(paths) if a.stem == b.stem)
    if twice:
        raise DatasetError(f"{folder} holds a frame twice, for instance as {twice[0]}; keep one image of each frame")
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
        raise DatasetError(f"no video at {path}; give a file, or a folder of images")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise DatasetError(f"OpenCV cannot open the video {path}; give it as H.264 in mp4, or as a folder of images")
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
            f"{path} can be decoded up to frame {count} of {announced}; copy it again, or give a folder of images"
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
    with atomic_write(path) as unfinished:

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
    with mp4_writer(path, clip.fps) as write:
        for name, rgb in clip.read():
            write(overlay(rgb, read_mask(masks / f"{name}.png")))
