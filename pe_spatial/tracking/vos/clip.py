"""A video with the masks in which its objects begin, read one frame at a time; and masks drawn over frames."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.tracking.vos.masks import (
    PALETTE,
    is_binary,
    join_masks,
    read_mask,
    read_object_masks,
    read_prompt_mask,
    split_masks,
)
from pe_spatial.video import count_frames, decode_video, frame_rate, list_frames, mp4_writer

DEFAULT_FPS = 24.0
"""Frame rate of videos that do not say, such as folders; DAVIS has 24."""
_NAME = "{:05d}"  # of a frame of a video file


@dataclass(frozen=True)
class Clip:
    """A video and where its objects begin; nothing is read before it is needed.

    Args:
        name: name of the folder or file for the results.
        frames: images in order (see `list_frames`), or a video file.
        mask: index mask of the first frame, which shows all objects; or a folder of annotations, of some frames or of
            all, where each object begins on the first frame that shows it. None for frames without objects.
        overlapping: the folder holds <object>/<frame>.png, a binary mask for each object, instead of <frame>.png, and
            results have that form as well.
    """

    name: str
    frames: tuple[Path, ...] | Path
    mask: Path | None = None
    overlapping: bool = False

    @classmethod
    def open(cls, video: Path, mask: Path | None = None) -> Clip:
        """Take a folder of frames or a video file; DatasetError if it cannot be opened."""
        if video.is_dir():
            return cls(video.stem, list_frames(video), mask)
        count_frames(video)
        return cls(video.stem, video, mask)

    def __len__(self) -> int:
        """Count the frames; a video file may announce a wrong number."""
        return len(self.frames) if isinstance(self.frames, tuple) else count_frames(self.frames)

    @property
    def fps(self) -> float:
        return (not isinstance(self.frames, tuple) and frame_rate(self.frames)) or DEFAULT_FPS

    def prompts(self) -> dict[str, dict[int, np.ndarray]]:
        """Read where objects begin: frame name -> object id -> (H, W) bool mask, in the order of the frames.

        The id 255 in an index mask is void and becomes background; if the first mask with any id holds 0 and 255 alone,
        as in DAVIS 2016, it is object 1. Objects in folders have the folders' numbers, which may be 0. Raises
        DatasetError if no object begins, for smoothed masks, and for annotations of several sizes or without a frame.
        """
        prompts: dict[str, dict[int, np.ndarray]] = {}
        seen: set[int] = set()
        for frame, objects in self._annotations():
            new = {i: mask for i, mask in objects.items() if i not in seen}
            if new:
                prompts[frame] = new
                seen.update(new)
        if not prompts:
            raise DatasetError(f"{self.mask} shows no object to track; draw at least one into the first mask")
        sizes = {mask.shape for masks in prompts.values() for mask in masks.values()}
        if len(sizes) > 1:
            raise DatasetError(f"{self.mask} holds masks of the sizes {sorted(sizes)}; all need the size of the frames")
        return prompts

    def read(self) -> Iterator[tuple[str, np.ndarray]]:
        """Read the frames one by one: the name (of the file, or five digits) and (H, W, 3) uint8 RGB.

        Raises DatasetError for a frame that cannot be read or that differs in size from the first.
        """
        return self._frames(None, "the first frame")

    def load(self) -> tuple[np.ndarray, Iterator[tuple[str, np.ndarray]]]:
        """Return the index mask (H, W) uint8 of the first frame, and the frames as `read` does.

        Raises DatasetError also for objects that an index mask of the first frame cannot hold.
        """
        prompts = self.prompts()
        if self.overlapping or list(prompts) != [self._first]:
            raise DatasetError(
                f"the objects in {self.mask} may overlap or begin after the first frame, and label propagation needs "
                "one index mask of the first frame; use layout='davis' without late_objects, or a trained tracker"
            )
        objects = prompts[self._first]
        mask = join_masks(objects, next(iter(objects.values())).shape)
        return mask, self._frames(mask.shape, str(self.mask))

    def annotated(self) -> dict[str, Path]:
        """Return frame name -> mask file of a folder of annotations (the file of one object if there are several)."""
        paths = self.mask.glob("[!.]*/[!.]*.png" if self.overlapping else "[!.]*.png") if self.mask else ()
        return {path.stem: path for path in sorted(paths)}

    @property
    def _first(self) -> str:
        return self.frames[0].stem if isinstance(self.frames, tuple) else _NAME.format(0)

    def _annotations(self) -> Iterator[tuple[str, dict[int, np.ndarray]]]:
        """Read the annotated frames one after the other: the name, and object id -> (H, W) bool."""
        if self.mask is None:
            raise DatasetError(f"{self.name} has no mask, so there is no object to track")
        if not self.mask.is_dir():
            mask = read_prompt_mask(self.mask)
            yield self._first, split_masks(mask, binary=is_binary(mask))
            return
        annotated = self.annotated()
        if isinstance(self.frames, tuple):
            names = [path.stem for path in self.frames]
        else:  # a file that does not announce its length may be of any
            names = [_NAME.format(i) for i in range(len(self))] or list(annotated)
        binary = None  # until a mask shows anything
        for name in names:
            path = annotated.pop(name, None)
            if path and self.overlapping:
                yield name, {i: mask for i, mask in read_object_masks(self.mask, name).items() if mask.any()}
            elif path:
                mask = read_prompt_mask(path)
                if binary is None and mask.any():
                    binary = is_binary(mask)
                yield name, split_masks(mask, binary=bool(binary))
        for path in annotated.values():
            raise DatasetError(f"{path} matches no frame of {self.name}; give frames and masks the same names")

    def _frames(self, size: tuple[int, ...] | None, size_source: str) -> Iterator[tuple[str, np.ndarray]]:
        if isinstance(self.frames, tuple):
            frames = ((path.stem, str(path), read_rgb(path)) for path in self.frames)
        else:
            decoded = enumerate(decode_video(self.frames))
            frames = ((_NAME.format(i), f"frame {i} of {self.frames}", rgb) for i, rgb in decoded)
        for name, source, rgb in frames:
            h, w = size = size or rgb.shape[:2]
            if rgb.shape[:2] != size:
                found = f"{source} is {rgb.shape[0]}x{rgb.shape[1]} (height x width) but {size_source} is {h}x{w}"
                raise DatasetError(f"{found}; all frames and masks need one size")
            yield name, rgb


def overlay(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the object ids `mask` (H, W) over (H, W, 3) uint8 RGB: half transparent, with a solid outline."""
    colors = PALETTE[mask]
    outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
    mixed = np.where(mask[..., None] > 0, rgb // 2 + colors // 2, rgb)
    return np.where((outline & (mask > 0))[..., None], colors, mixed)


def write_overlay(clip: Clip, masks: Path, path: Path) -> None:
    """Write the frames of `clip` with their masks `masks`/<frame>.png into an mp4, complete or not at all."""
    with mp4_writer(path, clip.fps) as write:
        for name, rgb in clip.read():
            write(overlay(rgb, read_mask(masks / f"{name}.png")))
