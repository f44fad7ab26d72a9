"""Exported depth estimators and segmenters: images in, `DepthMap` and `SegmentationMap` out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.results import DepthMap, SegmentationMap
from pe_spatial.runtime.images import ExportedModel
from pe_spatial.runtime.resize import resize_area, resize_bilinear, resize_pixels


class ExportedDense(ExportedModel):
    """A model whose graph returns a map of the size of its image."""

    def maps(self, pixels: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) -> (B, ..., H, W), the average of windows if the model was made for them."""
        (name,) = self.manifest.outputs
        windows = self.manifest.options["windows"]
        if windows is None:
            return self.session.run({"pixels": pixels})[name]
        total, count = np.zeros(1, np.float32), np.zeros(pixels.shape[1:3], np.float32)
        for rows, columns in product(*(_spans(*sides) for sides in zip(pixels.shape[1:], *windows.values()))):  # noqa: B905
            part = self.session.run({"pixels": np.ascontiguousarray(pixels[:, rows, columns])})[name]
            if total.ndim == 1:
                total = np.zeros((*part.shape[:-2], *pixels.shape[1:3]), np.float32)
            total[..., rows, columns] += part
            count[rows, columns] += 1
        return total / count


class ExportedDepth(ExportedDense):
    """Depth in meters; `size` is the short side in pixels that the model gets, at first that of its training images."""

    task = "depth"

    def __init__(self, folder: str | Path, **options: Any) -> None:
        super().__init__(folder, **options)
        self.quantity: str = self.manifest.options["quantity"]
        self.size: int | None = self.manifest.options["size"]

    def estimate(self, images: Sequence[np.ndarray], *, size: int | None = None) -> list[np.ndarray]:
        """Images (H, W, 3) uint8 RGB of one size -> depth (H, W) float32 of each.

        With a `size` the model gets them with a short side of so many pixels, and its depth is resized back.
        """
        before, short = images[0].shape[:2], min(images[0].shape[:2])
        pixels = np.stack(images)
        if size not in (None, short):
            height, width = (max(1, round(side * size / short)) for side in before)
            resize = resize_area if size < short else resize_pixels
            pixels = np.stack([resize(image, (height, width)) for image in images])
        return [resize_bilinear(depth, before) for depth in self.maps(pixels)]

    def _predict(self, items: Sequence[np.ndarray]) -> list[DepthMap]:
        return [DepthMap(depth=depth, quantity=self.quantity) for depth in self.estimate(items, size=self.size)]


class ExportedEstimator:
    """An exported depth estimator with the calls of `DepthPredictor`, but for its tiles."""

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.model = ExportedDepth(folder, **options)
        self.quantity, self.training_size = self.model.quantity, self.model.size

    def __call__(self, images: Sequence[np.ndarray], *, size: int | None = None) -> list[np.ndarray]:
        """Return the depth of each image, as `ExportedDepth.estimate` does."""
        return self.model.estimate(images, size=size)


class ExportedSegmenter(ExportedDense):
    """The class of each pixel."""

    task = "segmentation"

    def _predict(self, items: Sequence[np.ndarray]) -> list[SegmentationMap]:
        options, size = self.manifest.options, items[0].shape[:2]
        pixels = np.stack(items)
        if options["scale"] is not None:
            factor = min(max(options["scale"]) / max(size), min(options["scale"]) / min(size))
            height, width = (int(side * factor + 0.5) for side in size)
            pixels = np.stack([resize_pixels(item, (height, width)) for item in items])
        results = []
        for logits in self.maps(pixels):
            logits = resize_bilinear(logits, size, align_corners=options["align_corners"])
            labels = logits.argmax(0).astype(np.int64)
            results.append(SegmentationMap(labels=labels, class_names=self.class_names, palette=options["palette"]))
        return results


def _spans(side: int, window: int, stride: int) -> Iterator[slice]:
    """Yield where windows lie along one side; the last one ends at its end, and a short side has one."""
    last = max(side - window, 0)
    for first in [*range(0, last, stride), last]:
        yield slice(first, first + window)
