"""A labeling project: a video, the journal of its prompts, and the masks that a tracker makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as run_lengths

from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.labeling.export import Labels, export
from pe_spatial.labeling.journal import Journal
from pe_spatial.labeling.keyframes import Keyframe, choose_keyframes
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.tracking.sam2.session import Box, Click, ClickSession, Drawn, Mark
from pe_spatial.tracking.sam2.streaming import StreamingTracker
from pe_spatial.tracking.vos.masks import VOID

DEFAULT_CLASS = "object"
OVERLAP = 0.5
"""IoU from which a box of a detector belongs to an object that is already there."""


class LabelProject:
    """The labels of one video in one folder; every prompt is in the journal when the call returns.

    Opening the folder again replays the journal: with the same tracker the masks are the same.

    Args:
        folder: of the project. DatasetError if it holds another project or other files.
        video: a file or a folder of frames.
        tracker: a new one with `non_overlapping` masks.
        max_frames: length of the video at most.

    Attributes:
        session: the masks and prompts.
        journal: the file behind them.
    """

    def __init__(self, folder: Path, video: Path, tracker: StreamingTracker, *, max_frames: int) -> None:
        self.folder = folder
        self.session = ClickSession(tracker, video, max_frames=max_frames)
        height, width = read_rgb(self.session.video.frames[0]).shape[:2]
        self.size = (height, width)
        facts = dict(video=video.name, frames=len(self.session), size=[height, width])
        self.journal = Journal(folder, facts)
        self.session.replay((entry["frame"], _mark(entry)) for entry in self.journal.prompts)

    def __len__(self) -> int:
        return len(self.session)

    def prompt(self, frame: int, mark: Mark) -> Iterator[int]:
        """Begin or correct an object on a frame; yield the frames whose masks are new.

        DatasetError for a frame that does not exist and a prompt outside of it; nothing has changed then.
        """
        yield from self.session.go_to(frame)
        self.session.click(mark)
        self.journal.append(_entry(frame, mark))
        yield frame

    def undo(self) -> Iterator[int]:
        """Take the last prompt back; yield as `prompt` does."""
        if not self.journal.prompts:
            raise DatasetError("there is no prompt to take back")
        self.journal.append({"op": "undo"})
        yield from self.session.undo()

    def name(self, object_id: int, name: str) -> None:
        """Give an object a class; DatasetError for an empty name."""
        if not name.strip():
            raise DatasetError(f"the class of object {object_id} has no name; write one, such as {DEFAULT_CLASS}")
        if self.journal.classes.get(object_id) != name.strip():
            self.journal.append({"op": "class", "object": object_id, "name": name.strip()})

    def accept(self, frame: int) -> None:
        """Note that the masks of a frame are right; DatasetError if it has none yet."""
        if frame >= self.session.tracked:
            raise DatasetError(f"frame {frame} is not tracked yet; track to it, look at it, then accept it")
        self.journal.append({"op": "accept", "frame": frame})

    def track(self) -> Iterator[int]:
        """Track to the end; yield the frames whose masks are new. DatasetError without a prompt."""
        if not self.session.objects:
            raise DatasetError("there is no object to track; prompt one: a click, a box, a mask, or a detector's boxes")
        yield from self.session.track(len(self) - 1)

    def detect(self, predictor: Any, frame: int) -> list[int]:
        """Begin an object for each box of a detector on a frame that no object covers yet; return their ids."""
        for _ in self.session.go_to(frame):
            pass
        found = predictor(read_rgb(self.session.video.frames[frame]))
        height, width = self.size
        begun = []
        for box, name in zip(found.boxes.clip(0, (width, height, width, height)), found.names, strict=True):
            if (box[2:] - box[:2] < 1).any() or self._covered(frame, box):
                continue
            i = max(self.session.objects, default=0) + 1
            if i >= VOID:
                break
            for _ in self.prompt(frame, Box(i, *map(float, box))):
                pass
            self.name(i, name)
            begun.append(i)
        return begun

    def _covered(self, frame: int, box: np.ndarray) -> bool:
        index = self.session.mask(frame)
        assert index is not None  # `detect` has tracked to the frame
        for i in self.session.objects:
            other = np.array(MaskCrop.cut(index == i).box)
            low, high = np.maximum(box[:2], other[:2]), np.minimum(box[2:], other[2:])
            common = (high - low).clip(min=0).prod()
            union = (box[2:] - box[:2]).prod() + (other[2:] - other[:2]).prod() - common
            if common >= OVERLAP * union:
                return True
        return False

    def keyframes(self, count: int = 5) -> list[Keyframe]:
        """Return the tracked frames that are most worth a look, worst first."""
        done = {entry["frame"] for entry in self.journal.prompts} | self.journal.accepted
        tracked = self.session.tracked
        return choose_keyframes(self._index, self.session.confidence, tracked, done=done, count=count)

    def _index(self, frame: int) -> np.ndarray:
        index = self.session.mask(frame)
        assert index is not None  # only asked for tracked frames
        return index

    def labels(self, every: int = 1) -> Labels:
        """Return the labels of every `every`-th tracked frame, and of those that were accepted or prompted.

        Frames before the first prompt do not count: nobody has said what is in them.
        """
        if every < 1:
            raise DatasetError(f"every is {every}; 1 takes every frame, 5 every fifth")
        tracked, classes = self.session.tracked, self.journal.classes
        prompted = {entry["frame"] for entry in self.journal.prompts}
        seen = prompted | self.journal.accepted
        return Labels(
            name=self.session.video.name,
            frames=self.session.video.frames,
            size=self.size,
            mask=self._index,
            classes={i: classes.get(i, DEFAULT_CLASS) for i in self.session.objects},
            chosen=[t for t in range(min(prompted, default=0), tracked) if t % every == 0 or t in seen],
            accepted=frozenset(seen),
        )

    def export(self, forms: Sequence[str], *, every: int = 1, outlines: bool = False) -> None:
        """Write the labels into the folder, as `labeling.export.export` does."""
        export(self.labels(every), self.folder, forms, outlines=outlines)


def _entry(frame: int, mark: Mark) -> dict[str, Any]:
    """Return the line of the journal of a prompt."""
    entry: dict[str, Any] = {"op": "prompt", "frame": frame, "object": mark.object_id}
    if isinstance(mark, Click):
        return entry | {"point": [mark.x, mark.y], "on": mark.on_object}
    if isinstance(mark, Box):
        return entry | {"box": list(mark[1:])}
    return entry | {"mask": MaskCrop.cut(np.asarray(mark.mask) > 0).rle(mark.mask.shape)}


def _mark(entry: dict[str, Any]) -> Mark:
    """Return the prompt of a line of the journal."""
    if "point" in entry:
        x, y = entry["point"]
        return Click(entry["object"], x, y, entry["on"])
    if "box" in entry:
        return Box(entry["object"], *entry["box"])
    return Drawn(entry["object"], run_lengths.decode(entry["mask"]) > 0)
