"""Resize with Pillow's antialiasing, as Detectron2 does, but only the pixels that a random crop keeps."""

from typing import Any

import mmcv
import numpy as np
from mmdet.datasets.transforms import Resize
from mmengine.registry import TRANSFORMS
from PIL import Image
from PIL.Image import Resampling


@TRANSFORMS.register_module()
class DeferredResize(Resize):
    """Resize boxes and masks now, and the image in the `RandomCrop` that has to follow.

    The pixels are those of `Resize(backend='pillow')` and the same crop, for about half of the work.

    Args:
        scale: (width, height) in pixels; with `keep_ratio`, limits of the long and the short side in any order.
        keep_ratio: keep the ratio of the sides.
    """

    def __init__(self, scale: int | tuple[int, int], keep_ratio: bool = False) -> None:
        super().__init__(scale=scale, keep_ratio=keep_ratio)

    def _resize_img(self, results: dict[str, Any]) -> None:
        height, width = results["img"].shape[:2]
        size = mmcv.rescale_size((width, height), results["scale"]) if self.keep_ratio else results["scale"]
        results["img"] = _Resized(results["img"], size)
        results["img_shape"] = size[::-1]
        results["scale_factor"] = (size[0] / width, size[1] / height)
        results["keep_ratio"] = self.keep_ratio


class _Resized:
    """An image (H, W, 3) that is resized where somebody asks for a part of it."""

    def __init__(self, image: np.ndarray, size: tuple[int, int]) -> None:
        self._image, self._size = image, size
        self.shape = (size[1], size[0], 3)

    def __getitem__(self, part: tuple[Any, ...]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (cut.indices(n) for cut, n in zip(part[:2], self.shape[:2], strict=True))
        return resize_part(self._image, self._size, (left, top, right, bottom))


def resize_part(image: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the box (left, top, right, bottom) of an image (H, W, 3) uint8 that Pillow resizes to (width, height).

    Pixel by pixel the same as resizing all of it, bilinear with antialiasing. Pillow resizes along the rows first, so
    the other rows are left out of that, and the other columns out of what follows. Channels come first in memory, as
    networks read them.
    """
    height, (left, top, right, bottom) = image.shape[0], box
    step = height / size[1]
    support = max(step, 1.0) + 1.0  # rows that count, on each side, and one for rounding
    first, last = max(int(top * step - support), 0), min(int(bottom * step + support) + 1, height)
    part = Image.fromarray(image[first:last]).resize((size[0], last - first), Resampling.BILINEAR)
    if size[1] != height:
        if (first, last, left, right) != (0, height, 0, size[0]):
            canvas = Image.new("RGB", (right - left, height))
            canvas.paste(part.crop((left, 0, right, last - first)), (0, first))
            part = canvas
        part, left, right, first = part.resize((part.width, size[1]), Resampling.BILINEAR), 0, right - left, 0
    if part.size != (right - left, bottom - top):
        part = part.crop((left, top - first, right, bottom - first))
    out = np.empty((3, bottom - top, right - left), np.uint8)
    for i, band in enumerate(part.split()):
        out[i] = np.asarray(band)
    return out.transpose(1, 2, 0)
