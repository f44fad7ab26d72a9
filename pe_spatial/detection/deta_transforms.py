"""How DETA's released pipelines size a picture, which none of MMDetection's transforms does to the pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mmdet.datasets.transforms import Resize
from mmengine.registry import TRANSFORMS

from pe_spatial.errors import DatasetError


def short_side_size(height: int, width: int, *, short_side: int, max_long_side: int) -> tuple[int, int]:
    """Return height and width with the short side at `short_side`, less where the long one would exceed its limit.

    The long side is truncated, so that it may be a pixel or two below the limit, and for thin pictures above it
    (perception_models@3e352cc:apps/detection/DETA_pe/datasets/transforms.py).
    """
    small, large = min(height, width), max(height, width)
    if large / small * short_side > max_long_side:
        short_side = round(max_long_side * small / large)
    if small == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


@TRANSFORMS.register_module()
class ShortSideResize(Resize):
    """Resize as `short_side_size` says, by PIL's bilinear filter.

    Args:
        short_sides: in pixels; one of them is drawn for each picture.
        max_long_side: in pixels.
    """

    def __init__(self, *, short_sides: Sequence[int], max_long_side: int) -> None:
        super().__init__(scale=(max_long_side, max_long_side), keep_ratio=False, backend="pillow")
        self.short_sides = list(short_sides)
        self.max_long_side = max_long_side

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize picture, boxes and masks; DatasetError if the picture is too thin for its short side to remain."""
        height, width = results["img"].shape[:2]
        short_side = int(np.random.choice(self.short_sides))
        new_height, new_width = short_side_size(
            height, width, short_side=short_side, max_long_side=self.max_long_side
        )
        if not min(new_height, new_width):
            raise DatasetError(
                f"{results.get('img_path', 'a picture')} is {width} x {height} px and would have no pixel left with "
                f"its long side at {self.max_long_side} px; cut it in pieces or leave it out"
            )
        self.scale = (new_width, new_height)
        return super().transform(results)
