"""An exported detector: images in, `Detections` out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.images import short_side_size
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import Detections
from pe_spatial.runtime.images import ExportedModel


class ExportedDetector(ExportedModel):
    """A detector; `score` is the lowest score of a detection."""

    task = "detection"

    def __init__(self, folder: str | Path, *, score: float = 0.0, **options: Any) -> None:
        super().__init__(folder, **options)
        self.score = score

    def _prepare(self, rgb: np.ndarray) -> np.ndarray:
        canvas: int | None = self.manifest.options.get("canvas")
        if canvas is not None:
            check_canvas(rgb.shape[:2], canvas, self.manifest.options["resizing"])
        return rgb

    def _predict(self, items: Sequence[np.ndarray]) -> list[Detections]:
        values = self.session.run({"pixels": np.stack(items)})
        return [
            detections({name: value[i] for name, value in values.items()}, self.class_names, item.shape[:2], self.score)
            for i, item in enumerate(items)
        ]


def check_canvas(size: tuple[int, ...], canvas: int, resizing: Mapping[str, Any]) -> None:
    """Raise DatasetError for an image (H, W) that does not fit the canvas of a graph when it is resized there."""
    height, width = size
    if resizing:
        limit = resizing["max_long_side"] or math.inf
        height, width = short_side_size(height, width, short_side=resizing["short_side"], max_long_side=limit)
    if not 0 < min(height, width) <= max(height, width) <= canvas:
        raise DatasetError(
            f"an image of {size[1]}x{size[0]} px is {width}x{height} px when it reaches the model, whose canvas has "
            f"{canvas}; crop or resize it"
        )


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
