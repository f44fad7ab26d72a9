"""An exported detector: images in, `Detections` out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.images import short_side_size
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

    def _prepare(self, rgb: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """Return the pixels for the graph, and (H, W) of the image."""
        size = rgb.shape[0], rgb.shape[1]
        resize, largest = self.manifest.options.get("resize"), self.manifest.options.get("largest")
        if resize:
            height, width = short_side_size(*size, **resize)
            if not min(height, width):
                raise DatasetError(f"an image of {size[1]}x{size[0]} px is too thin for this model; crop it")
            rgb = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
        if largest and max(rgb.shape[:2]) > largest:
            raise DatasetError(
                f"an image is {rgb.shape[1]}x{rgb.shape[0]} px when it reaches the model, whose canvas has {largest}; "
                "resize it"
            )
        return rgb, size

    def _shape(self, item: tuple[np.ndarray, tuple[int, int]]) -> Any:
        return item[0].shape

    def _predict(self, items: Sequence[tuple[np.ndarray, tuple[int, int]]]) -> list[Detections]:
        values = self.session.run({"pixels": np.stack([pixels for pixels, _ in items])})
        results = []
        for i, (pixels, size) in enumerate(items):
            own = {name: value[i] for name, value in values.items()}
            own["boxes"] = own["boxes"] * np.array([size[1] / pixels.shape[1], size[0] / pixels.shape[0]] * 2)
            results.append(detections(own, self.class_names, size, self.score))
        return results


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
