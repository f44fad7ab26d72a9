"""Results brought from one image size to another."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np

from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import DepthMap, Detections, SegmentationMap, TrackedFrame


def squeezed(rgb: np.ndarray, side: int) -> np.ndarray:
    """Resize (H, W, 3) to a square, whatever its form."""
    shrink = side < min(rgb.shape[:2])
    return cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)


def to_size(result: Any, size: tuple[int, int]) -> Any:
    """Return a result in pixels of an image of `size` (H, W), to which its own image is resized."""
    (height, width), shape = size, size[::-1]
    if isinstance(result, Detections):
        scale = np.array([width / result.image_size[1], height / result.image_size[0]] * 2, np.float32)
        crops = result.crops and tuple(_crop(crop, result.image_size, size) for crop in result.crops)
        return replace(result, boxes=result.boxes * scale, image_size=size, crops=crops)
    if isinstance(result, TrackedFrame):
        objects = {i: _crop(crop, result.image_size, size) for i, crop in result.objects.items()}
        return TrackedFrame(objects=objects, image_size=size)
    if isinstance(result, SegmentationMap):
        labels = cv2.resize(result.labels.astype(np.int32), shape, interpolation=cv2.INTER_NEAREST)
        return replace(result, labels=labels.astype(np.int64))
    assert isinstance(result, DepthMap)
    return replace(result, depth=cv2.resize(result.depth, shape, interpolation=cv2.INTER_LINEAR))


def _crop(crop: MaskCrop, before: tuple[int, int], size: tuple[int, int]) -> MaskCrop:
    full = crop.full(before).astype(np.uint8)
    return MaskCrop.cut(cv2.resize(full, size[::-1], interpolation=cv2.INTER_NEAREST) > 0)
