"""Resize with Pillow's antialiasing, as Detectron2 does, but only the pixels that a random crop keeps."""

from typing import Any

import cv2
import mmcv
import numpy as np
import shapely
from mmdet.datasets.transforms import RandomFlip, Resize
from mmdet.structures.mask import PolygonMasks
from mmengine.registry import TRANSFORMS
from PIL import Image
from PIL.Image import Resampling

from pe_spatial.engine.loading import SCOPED_TRANSFORMS

_FLIPS = {"horizontal": 1, "vertical": 0, "diagonal": -1}  # OpenCV's codes


@TRANSFORMS.register_module()
class DeferredResize(Resize):
    """Resize boxes and masks now, and the image in the `RandomCrop` that has to follow.

    The pixels are those of `Resize(backend='pillow')` and the same crop, for about half of the work. Polygons are those
    of MMDetection, cropped all at once.

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

    def _resize_masks(self, results: dict[str, Any]) -> None:
        super()._resize_masks(results)
        masks = results.get("gt_masks")
        if isinstance(masks, PolygonMasks):
            results["gt_masks"] = _Polygons(masks.masks, masks.height, masks.width)


@SCOPED_TRANSFORMS.register_module("RandomFlip")
class PlanarRandomFlip(RandomFlip):
    """MMDetection's `RandomFlip`, with the channels of the flipped image one after another in memory.

    MMDetection flips a view, and packing copies that byte by byte. In configs it is `pe_spatial.RandomFlip`.
    """

    def _flip(self, results: dict[str, Any]) -> None:
        image = results["img"]  # (H, W, C)
        super()._flip(results)
        planes = np.empty((image.shape[2], *image.shape[:2]), image.dtype)
        for i, plane in enumerate(planes):
            cv2.flip(image[..., i], _FLIPS[results["flip_direction"]], plane)
        results["img"] = planes.transpose(1, 2, 0)


class _Resized:
    """An image (H, W, 3) that is resized where somebody asks for a part of it."""

    def __init__(self, image: np.ndarray, size: tuple[int, int]) -> None:
        self._image, self._size = image, size
        self.shape = (size[1], size[0], 3)

    def __getitem__(self, part: tuple[Any, ...]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (cut.indices(n) for cut, n in zip(part[:2], self.shape[:2], strict=True))
        return resize_part(self._image, self._size, (left, top, right, bottom))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"{name} of an image that DeferredResize leaves to the RandomCrop after it: put a RandomCrop there, or "
            "use Resize(backend='pillow')"
        )


class _Polygons(PolygonMasks):
    """Polygons that are cropped all at once, with the result of MMDetection's loop over them."""

    def __getitem__(self, index: Any) -> "_Polygons":
        return _Polygons(super().__getitem__(index).masks, self.height, self.width)

    def crop(self, bbox: np.ndarray) -> PolygonMasks:
        """Crop to bbox (x1, y1, x2, y2) int in pixels; an object without any area gets a polygon of zeros."""
        x1, y1, x2, y2 = np.clip(bbox, 0, (self.width, self.height) * 2)
        objects: list[list[np.ndarray]] = [[] for _ in self.masks]
        outlines = [outline.reshape(-1, 2) for one in self.masks for outline in one]
        if outlines:
            owners = np.repeat(np.arange(len(objects)), [len(one) for one in self.masks])
            corners = np.repeat(np.arange(len(outlines)), [len(outline) for outline in outlines])
            with np.errstate(invalid="ignore"):  # of shapely
                rings = shapely.linearrings(np.concatenate(outlines), indices=corners)
                polygons = shapely.buffer(shapely.polygons(rings), 0.0, quad_segs=16)
                polygons[~shapely.is_valid(polygons)] = None
                parts = shapely.intersection(polygons, shapely.box(x1, y1, x2, y2))
            parts, whose = shapely.get_parts(parts, return_index=True)
            good = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & shapely.is_valid(parts)
            good &= ~shapely.is_empty(parts)
            rings = shapely.get_exterior_ring(parts[good])
            points = shapely.get_coordinates(rings) - (x1, y1)
            ends = np.cumsum(shapely.get_num_coordinates(rings))
            for owner, outline in zip(owners[whose[good]], np.split(points, ends)[:-1], strict=True):
                objects[owner].append(outline[:-1].reshape(-1))  # the last corner is the first one
        return PolygonMasks([one or [np.zeros(6, int)] for one in objects], max(y2 - y1, 1), max(x2 - x1, 1))


def resize_part(image: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Return the box (left, top, right, bottom) of an image (H, W, 3) uint8 that Pillow resizes to (width, height).

    Pixel by pixel the same as resizing all of it, bilinear with antialiasing. Pillow resizes along the rows first, so
    the other rows are left out of that, and the other columns out of what follows. Channels come first in memory, as
    networks read them.
    """
    (height, width), (left, top, right, bottom) = image.shape[:2], box
    if size[1] == height or height > 100 * width:  # Pillow has one pass, or begins with the columns
        whole = Image.fromarray(image).resize(size, Resampling.BILINEAR)
        return np.stack(cv2.split(np.asarray(whole.crop(box)))).transpose(1, 2, 0)
    step = height / size[1]
    support = max(step, 1.0) + 1.0  # rows that count, on each side, and one for rounding
    first, last = max(int(top * step - support), 0), min(int(bottom * step + support) + 1, height)
    part = Image.fromarray(image[first:last]).resize((size[0], last - first), Resampling.BILINEAR)
    width, fours = right - left, -((left - right) // 4)
    # Four columns of a channel as one pixel: Pillow takes less time for them than for pixels of three channels.
    rows = np.zeros((height, 4 * fours), np.uint8)
    planes = np.empty((3, bottom - top, 4 * fours), np.uint8)
    for i, plane in enumerate(planes):
        _paste(part.getchannel(i), rows, (-left, first))
        columns = Image.frombuffer("RGBX", (fours, height), rows, "raw", "RGBX", 0, 1)
        _paste(columns.resize((fours, size[1]), Resampling.BILINEAR), plane, (0, -top))
    return planes[..., :width].transpose(1, 2, 0)


def _paste(image: Image.Image, target: np.ndarray, at: tuple[int, int]) -> None:
    """Write an image of one or four bytes a pixel into an array (H, W) uint8, `at` (x, y) in pixels, without a copy."""
    size = (target.shape[1] // len(image.getbands()), target.shape[0])
    view = Image.frombuffer(image.mode, size, target, "raw", image.mode, 0, 1)
    view.readonly, memory = 0, view.im
    view.paste(image, at)
    assert view.im is memory  # else Pillow wrote into a copy
