"""How trackers of any runtime take videos: a video and prompts in, masks out. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import Tracks
from pe_spatial.tracking.sam2.online import OnlineTracker, track_clip
from pe_spatial.tracking.sam2.prompts import Prompt

Prompts = Mapping[int, Mapping[int, Prompt]]
"""Frame number -> object id -> `Prompt`."""


class VideoTracker:
    """Masks of objects through a video, each from a prompt (clicks, a box or a mask)."""

    task = "tracking"
    class_names: tuple[str, ...] = ()

    def start(self, **options: Any) -> OnlineTracker:
        """Return a tracker for frames that come one by one; `options` are those of `OnlineTracker`."""
        raise NotImplementedError

    def __call__(self, video: str | Path, prompts: Prompts | None = None) -> Tracks:
        """Return the masks of a video, a file or a folder of frames; DatasetError without prompts."""
        names, objects, size = [], [], (0, 0)
        for name, rgb, index in self.track(video, prompts or {}):
            names.append(name)
            objects.append({int(i): MaskCrop.cut(index == i) for i in np.unique(index[index > 0])})
            size = rgb.shape[:2]
        return Tracks(frames=tuple(names), objects=tuple(objects), image_size=size)

    def track(self, video: str | Path, prompts: Prompts) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the name, the image (H, W, 3) uint8 RGB and the index mask (H, W) uint8 of each frame."""
        from pe_spatial.tracking.vos.clip import Clip  # it needs OpenCV

        if not any(prompts.values()):
            raise DatasetError("there is no object to track; give prompts: {frame: {object id: Prompt(box=...)}}")
        frames = track_clip(self.start(), Clip.open(Path(video)), prompts)
        while True:
            with self._computing():
                frame = next(frames, None)
            if frame is None:
                return
            yield frame

    def _computing(self) -> AbstractContextManager[Any]:
        """Return the context in which a frame is computed."""
        return nullcontext()
