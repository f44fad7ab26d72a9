"""The predictor of promptable trackers: a video and prompts in, masks out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from pe_spatial.encoder.files import locate, read_checkpoint
from pe_spatial.errors import DatasetError
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.predictor import Predictor
from pe_spatial.predict.results import Tracks
from pe_spatial.tracking.sam2.model import build_pe_sam2, load_tracker_weights
from pe_spatial.tracking.sam2.online import track_clip
from pe_spatial.tracking.sam2.prompts import Prompt
from pe_spatial.tracking.sam2.streaming import StreamingTracker
from pe_spatial.tracking.vos.clip import Clip

Prompts = Mapping[int, Mapping[int, Prompt]]
"""Frame number -> object id -> `Prompt`."""


class TrackingPredictor(Predictor):
    """Masks of objects through a video, each from a prompt (clicks, a box or a mask)."""

    task = "tracking"

    def __init__(
        self, cfg: Config, weights: str, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        read_checkpoint(locate(weights))  # so that its errors come before the model is built
        model = build_pe_sam2(**cfg.model.tracker.to_dict())
        model.image_encoder.trunk.encoder.base_source = cfg.model.get("encoder_weights")
        load_tracker_weights(model, weights)
        super().__init__(model.eval().to(device), device=device, dtype=dtype)
        if compile:
            model.image_encoder.compile()

    def start(self, **options: Any) -> StreamingTracker:
        """Return a tracker for frames that come one by one; `options` are those of `StreamingTracker`."""
        return StreamingTracker(self.model, **{"non_overlapping": True, **options})

    def __call__(self, video: str | Path, prompts: Prompts | None = None) -> Tracks:  # type: ignore[override]
        """Return the masks of a video, a file or a folder of frames; DatasetError without prompts."""
        names, objects, size = [], [], (0, 0)
        for name, rgb, index in self.track(video, prompts or {}):
            names.append(name)
            objects.append({int(i): MaskCrop.cut(index == i) for i in np.unique(index[index > 0])})
            size = rgb.shape[:2]
        return Tracks(frames=tuple(names), objects=tuple(objects), image_size=size)

    def track(self, video: str | Path, prompts: Prompts) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Yield the name, the image (H, W, 3) uint8 RGB and the index mask (H, W) uint8 of each frame."""
        if not any(prompts.values()):
            raise DatasetError("there is no object to track; give prompts: {frame: {object id: Prompt(box=...)}}")
        clip, tracker = Clip.open(Path(video)), self.start()
        frames = track_clip(tracker, clip, prompts)
        while True:
            with torch.inference_mode(), self._precision():
                frame = next(frames, None)
            if frame is None:
                return
            yield frame
