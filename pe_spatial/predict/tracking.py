"""The predictor of promptable trackers: a video and prompts in, masks out."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.config import Config

from pe_spatial.encoder.files import locate, read_checkpoint
from pe_spatial.predict.predictor import Predictor
from pe_spatial.predict.videos import VideoTracker
from pe_spatial.tracking.sam2.model import build_pe_sam2, load_tracker_weights
from pe_spatial.tracking.sam2.streaming import StreamingTracker


class TrackingPredictor(VideoTracker, Predictor):  # type: ignore[misc]
    """Masks of objects through a video, by a model in torch."""

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

    @contextmanager
    def _computing(self) -> Iterator[None]:
        with torch.inference_mode(), self._precision():
            yield
