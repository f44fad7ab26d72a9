"""An exported detector: images in, `Detections` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import Detections
from pe_spatial.predict.streaming import Streamed
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import open_session


class ExportedDetector(Streamed):
    """A detector in another runtime, with the calls and results of `pe_spatial.load`'s.

    Args:
        folder: what `pe-spatial export` wrote.
        score: lowest score of a detection.
        options: `backend` and `threads`, see `open_session`.
    """

    task = "detection"

    def __init__(self, folder: str | Path, *, score: float = 0.0, **options: Any) -> None:
        self.folder, self.score = Path(folder), score
        self.manifest = read_manifest(folder)
        self.class_names = tuple(self.manifest.class_names)
        self.session = open_session(self.folder, self.manifest, **options)

    def _prepare(self, rgb: np.ndarray) -> np.ndarray:
        return rgb

    def _shape(self, item: np.ndarray) -> Any:
        return item.shape

    def _predict(self, items: Sequence[np.ndarray]) -> list[Detections]:
        values = self.session.run({"pixels": np.stack(items)})
        return [
            detections({name: value[i] for name, value in values.items()}, self.class_names, item.shape[:2], self.score)
            for i, item in enumerate(items)
        ]


def detections(
    values: dict[str, np.ndarray], class_names: Sequence[str], size: tuple[int, ...], score: float = 0.0
) -> Detections:
    """Return the detections of one image from the outputs of the graph."""
    keep = values["valid"] & (values["scores"] >= score)
    masks = values.get("masks")
    return Detections(
        boxes=values["boxes"][keep].astype(np.float32),
        scores=values["scores"][keep].astype(np.float32),
        labels=values["labels"][keep].astype(np.int64),
        class_names=tuple(class_names),
        image_size=(size[0], size[1]),
        crops=None if masks is None else tuple(MaskCrop.cut(mask) for mask in masks[keep]),
    )
