"""Image sizes of DETA's released pipelines, which MMDetection's transforms do not reproduce to the pixel."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from mmcv.transforms import RandomChoice
from mmdet.datasets.transforms import RandomCrop, Resize
from mmengine.registry import TRANSFORMS

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import short_side_size


@TRANSFORMS.register_module()
class ShortSideResize(Resize):
    """Resize to `short_side_size` with PIL's bilinear filter.

    Args:
        short_sides: short sides in pixels; one of them is chosen at random for each image.
        max_long_side: limit of the long side in pixels; none by default.
    """

    def __init__(self, *, short_sides: Sequence[int], max_long_side: float = math.inf) -> None:
        super().__init__(scale=(0, 0), keep_ratio=False, backend="pillow")
        self.short_sides = list(short_sides)
        self.max_long_side = max_long_side

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize image, boxes and masks; DatasetError if the short side of a thin image would vanish."""
        height, width = results["img"].shape[:2]
        short_side = int(np.random.choice(self.short_sides))
        new_height, new_width = short_side_size(height, width, short_side=short_side, max_long_side=self.max_long_side)
        if not min(new_height, new_width):
            raise DatasetError(
                f"{results.get('img_path', 'an image')} is {width} x {height} px: resized to a long side of "
                f"{self.max_long_side} px, its short side would vanish; crop it or remove it from the dataset"
            )
        self.scale = (new_width, new_height)
        return super().transform(results)


@TRANSFORMS.register_module()
class DETAJitter(RandomChoice):
    """Large-scale jitter as in the released DETA, for a canvas that is 32 px wider than any image.

    Half of the images get a short side of `min_short_side`, 32 more, and so on up to the canvas. The others get a short
    side of 400, 500 or 600, then a crop with sides of 384 to 600 px is resized to the full size; crops without objects
    stay, as negatives (perception_models@3e352cc:apps/detection/DETA_pe/datasets/coco.py,
    `make_coco_transforms_lsj`).

    Args:
        canvas: side of the canvas in pixels.
        min_short_side: least short side in pixels; ConfigError unless the canvas is larger.
    """

    def __init__(self, *, canvas: int, min_short_side: int = 480) -> None:
        if canvas <= min_short_side:
            raise ConfigError(f"canvas={canvas} is not above min_short_side={min_short_side}; lower min_short_side")
        side = canvas - 32
        full_size = ShortSideResize(short_sides=[side], max_long_side=side)
        crop = RandomCrop(crop_type="absolute_range", crop_size=(384, 600), allow_negative_crop=True)
        plain = [ShortSideResize(short_sides=range(min_short_side, canvas, 32), max_long_side=side)]
        super().__init__([plain, [ShortSideResize(short_sides=[400, 500, 600]), crop, full_size]])
