"""Tracking with a person in the loop: clicks on any frame in any order, masks up to a frame, corrections, undo."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zipfile import ZipFile

import cv2
import numpy as np
from torch import Tensor

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.tracking.sam2.online import Snapshot
from pe_spatial.tracking.sam2.prompts import Prompt
from pe_spatial.tracking.sam2.streaming import StreamingTracker
from pe_spatial.tracking.vos.clip import Clip, overlay
from pe_spatial.tracking.vos.masks import PALETTE, VOID, join_masks, read_mask, write_mask
from pe_spatial.video import mp4_writer

_EVERY = 8
"""Frames between two snapshots: a correction tracks at most as many frames again."""


class Click(NamedTuple):
    """A click on a frame, in pixels: on the object or beside it."""

    object_id: int
    x: float
    y: float
    on_object: bool = True

    @property
    def prompt(self) -> dict[int, Prompt]:
        return {self.object_id: Prompt(points=[(self.x, self.y)], labels=[int(self.on_object)])}


class Box(NamedTuple):
    """A box around an object, in pixels; it discards earlier clicks on its frame."""

    object_id: int
    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def prompt(self) -> dict[int, Prompt]:
        return {self.object_id: Prompt(box=self[1:])}


class Drawn(NamedTuple):
    """The mask of an object, (H, W) bool; it replaces what was on its frame."""

    object_id: int
    mask: np.ndarray

    @property
    def prompt(self) -> dict[int, Prompt]:
        return {self.object_id: Prompt(mask=self.mask)}


Mark = Click | Box | Drawn


@dataclass(frozen=True)
class StoredVideo:
    """The frames of a video as PNGs in a folder, so that any of them can be read at once."""

    name: str
    frames: tuple[Path, ...]
    fps: float

    @classmethod
    def store(cls, video: Path, folder: Path, *, max_frames: int) -> StoredVideo:
        """Read a video file or a folder of frames; DatasetError for more than `max_frames` and for one without any."""
        clip, paths = Clip.open(video), list[Path]()
        too_long = f"at most {max_frames} are tracked; cut it, or start with a larger --max-frames"
        if len(clip) > max_frames:
            raise DatasetError(f"{video.name} has {len(clip)} frames, and {too_long}")
        for name, rgb in clip.read():
            if len(paths) == max_frames:  # files may announce fewer
                raise DatasetError(f"{video.name} has more than {max_frames} frames, and {too_long}")
            paths.append(folder / f"{name}.png")
            cv2.imwrite(str(paths[-1]), rgb[..., ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 1])
        return cls(clip.name, tuple(paths), clip.fps)


class ClickSession:
    """A video, the clicks on its frames, and the masks of all frames up to `tracked`.

    Masks are as if all clicks had been there from the start, each a correction of its frame by
    `StreamingTracker.refine` in the order in which they were made. A click on an earlier frame discards the masks of
    later frames, not the clicks on them.

    Args:
        tracker: a new one with `non_overlapping` masks.
        video: a file or a folder of frames; frames and masks are kept in a temporary folder.
        max_frames: length of the video at most.

    Raises DatasetError for a video that cannot be used.
    """

    def __init__(self, tracker: StreamingTracker, video: Path, *, max_frames: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="pe_spatial_")
        root = Path(self._folder.name)
        (root / "frames").mkdir()
        self.video = StoredVideo.store(video, root / "frames", max_frames=max_frames)
        self._masks: Path = root / self.video.name
        self._tracker = tracker
        self._lock = threading.Lock()  # a page that stops a job does not wait for its last step
        self._clicks: dict[int, list[Mark]] = {}
        self._order: list[int] = []  # the frames of the clicks
        self._snapshots: dict[int, Snapshot] = {-1: tracker.snapshot()}
        self.tracked = 0
        """Number of frames that have a mask."""
        self.confidence: dict[int, dict[int, float]] = {}
        """Frame -> object -> how sure the tracker is, 0 to 1, of the frames that have a mask."""

    def close(self) -> None:
        """Remove the temporary folder; it also goes with the session."""
        self._folder.cleanup()

    def __len__(self) -> int:
        return len(self.video.frames)

    @property
    def objects(self) -> list[int]:
        """Ids of the objects that were clicked."""
        return sorted({click.object_id for clicks in self._clicks.values() for click in clicks})

    def clicks(self, frame: int) -> list[Mark]:
        """Return the clicks, boxes and masks on a frame, all of which count as clicks here."""
        return list(self._clicks.get(frame, ()))

    def track(self, last: int) -> Iterator[int]:
        """Track up to the frame `last` and yield the number of each frame when its mask is there."""
        while self.tracked <= last:
            with self._lock:
                frame = self.tracked
                masks = self._tracker.step(read_rgb(self.video.frames[frame]))
                for click in self._clicks.get(frame, ()):
                    masks = self._tracker.refine(click.prompt)
                self._keep(frame, masks)
                self.tracked = frame + 1
            yield frame

    def go_to(self, frame: int) -> Iterator[int]:
        """Make `frame` the last one with a mask, so that it can be clicked; yield as `track` does.

        DatasetError for a frame that does not exist.
        """
        if not 0 <= frame < len(self):
            raise DatasetError(f"{self.video.name} has {len(self)} frames, so there is no frame {frame}")
        if self.tracked > frame + 1:
            self._rewind(max(t for t in self._snapshots if t <= frame))
        yield from self.track(frame)

    def replay(self, marks: Iterable[tuple[int, Mark]]) -> None:
        """Begin anew with clicks (frame, click) in the order in which they were made; `track` gives their masks."""
        self._rewind(-1)
        self._clicks, self._order = {}, []
        for frame, mark in marks:
            self._clicks.setdefault(frame, []).append(mark)
            self._order.append(frame)

    def click(self, click: Mark) -> None:
        """Begin or correct an object on the last tracked frame; DatasetError for a click outside of it."""
        if not 0 < click.object_id < VOID:
            raise DatasetError(f"the object is {click.object_id}; its number must be 1 to {VOID - 1}")
        with self._lock:
            frame = self.tracked - 1
            self._keep(frame, self._tracker.refine(click.prompt))
            self._clicks.setdefault(frame, []).append(click)
            self._order.append(frame)

    def undo(self) -> Iterator[int]:
        """Take the last click back and track up to its frame again, as `track` does; DatasetError without clicks."""
        if not self._order:
            raise DatasetError("there is no click to take back")
        frame = self._order.pop()
        self._clicks[frame].pop()
        if self.tracked > frame:
            self._rewind(max(t for t in self._snapshots if t < frame))
        yield from self.track(frame)

    def mask(self, frame: int) -> np.ndarray | None:
        """Return the index mask of a frame, (H, W) uint8, None if it is not tracked yet."""
        return read_mask(self._mask_file(frame)) if frame < self.tracked else None

    def draw(self, frame: int) -> np.ndarray:
        """Return a frame with its masks and clicks, (H, W, 3) uint8 RGB: filled dots on objects, crosses beside."""
        rgb, mask = read_rgb(self.video.frames[frame]), self.mask(frame)
        image = rgb if mask is None else np.ascontiguousarray(overlay(rgb, mask))
        radius = max(3, min(rgb.shape[:2]) // 60)
        for click in self.clicks(frame):
            if isinstance(click, Box):
                corners = [round(value) for value in click[1:]]
                cv2.rectangle(image, corners[:2], corners[2:], PALETTE[click.object_id].tolist(), 2)
            if not isinstance(click, Click):
                continue
            center, color = (round(click.x), round(click.y)), PALETTE[click.object_id].tolist()
            if click.on_object:
                cv2.circle(image, center, radius + 1, (255, 255, 255), -1, cv2.LINE_AA)
                cv2.circle(image, center, radius - 1, color, -1, cv2.LINE_AA)
            else:
                for ground, width in (((255, 255, 255), 4), (color, 2)):
                    cv2.drawMarker(image, center, ground, cv2.MARKER_TILTED_CROSS, 3 * radius, width, cv2.LINE_AA)
        return image

    def write_masks(self, path: Path) -> None:
        """Write a zip of NAME/00000.png, ...: index masks with DAVIS' palette, of the tracked frames."""
        self._check_tracked()
        with atomic_write(path) as unfinished, ZipFile(unfinished, "w") as archive:
            for frame in range(self.tracked):
                file = self._mask_file(frame)
                archive.write(file, f"{self.video.name}/{file.name}")

    def write_video(self, path: Path) -> None:
        """Write the tracked frames with their masks as mp4."""
        self._check_tracked()
        with mp4_writer(path, self.video.fps) as write:
            for frame in range(self.tracked):
                write(overlay(read_rgb(self.video.frames[frame]), read_mask(self._mask_file(frame))))

    def _keep(self, frame: int, masks: Mapping[int, Tensor]) -> None:
        size = read_rgb(self.video.frames[frame]).shape[:2] if not masks else next(iter(masks.values())).shape
        write_mask(self._mask_file(frame), join_masks({i: m.cpu().numpy() for i, m in masks.items()}, tuple(size)))
        self.confidence[frame] = self._tracker.confidence
        if frame % _EVERY == _EVERY - 1:
            self._snapshots[frame] = self._tracker.snapshot()

    def _rewind(self, frame: int) -> None:
        with self._lock:
            self._tracker.restore(self._snapshots[frame])
            self._snapshots = {t: x for t, x in self._snapshots.items() if t <= frame}
            self.tracked = frame + 1

    def _check_tracked(self) -> None:
        if not self.tracked or not self.objects:
            raise DatasetError("there are no masks yet; click on an object and track it")

    def _mask_file(self, frame: int) -> Path:
        return self._masks / f"{self.video.frames[frame].stem}.png"
