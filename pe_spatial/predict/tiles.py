"""Detection in large images: overlapping tiles, and their boxes merged into those of the image."""

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any

import numpy as np
from mmcv.transforms import Compose

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.images import tile_starts
from pe_spatial.predict.results import Detections

IOU = 0.5
"""Overlap from which two boxes of one class, of different tiles, are one object."""

BORDER = 4
"""Pixels from the inner border of a tile within which the box of an object that is cut there ends."""


def tile_unit(model: Any) -> int:
    """Return the pixels of an attention window, or of a patch without windows; other backbones: of their padding."""
    for module in model.modules():
        if isinstance(module, PerceptionEncoder):
            return module.patch_size * (module.geometry.window_size or 1)
    return getattr(model.data_preprocessor, "pad_size_divisor", 1)


def choose_tile(model: Any, pipeline: Compose, tile: int | None) -> int:
    """Return the side of a tile in pixels: the given one, or the one that reaches the model unchanged.

    Raises ConfigError for a side that is not a multiple of `tile_unit`.
    """
    unit = tile_unit(model)
    if tile is None:
        square = dict(img=np.zeros((1024, 1024, 3), np.uint8), img_shape=(1024, 1024), ori_shape=(1024, 1024))
        inputs = pipeline(dict(square, img_id=0, img_path=None, seg_fields=[]))["inputs"]
        sides = (inputs[0] if isinstance(inputs, list) else inputs).shape[1:]  # a list in test-time augmentation
        return -(-max(sides) // unit) * unit
    if tile < 1 or tile % unit:
        near = max(unit, round(tile / unit) * unit)
        raise ConfigError(f"the tile is {tile}; the model's attention windows have {unit} pixels, so give {near}")
    return tile


def tile_corners(size: tuple[int, int], tile: int, overlap: int) -> list[tuple[int, int]]:
    """Return the top left corner (y, x) of each tile, evenly spaced."""
    rows, columns = (tile_starts(side, tile, overlap) for side in size)
    return list(product(rows, columns))


def merge_tiles(
    parts: Iterable[Detections], corners: Sequence[tuple[int, int]], size: tuple[int, int], class_names: tuple[str, ...]
) -> Detections:
    """Return the detections of an image (H, W) from those of its tiles, best first, each object once.

    An object in the overlap of tiles has a box in each. Of boxes of one class and of different tiles, the better one
    suppresses those that overlap it by `IOU`, and those that are cut at the border of their tile and lie mostly in it.
    A cut box counts half of its score. An object larger than the overlap may be cut in every tile, and stays in parts.
    """
    found: list[Detections] = []
    tiles, cut = [], []
    for number, ((y, x), part) in enumerate(zip(corners, parts, strict=True)):
        tiles += [number] * len(part)
        cut.append(_is_cut(part, (y, x), size))
        crops = None if part.crops is None else tuple(crop._replace(x=crop.x + x, y=crop.y + y) for crop in part.crops)
        found.append(Detections(
            boxes=part.boxes + np.array([x, y, x, y], np.float32), scores=part.scores, labels=part.labels,
            class_names=class_names, image_size=size, crops=crops,
        ))  # fmt: skip
    together = Detections(
        boxes=np.concatenate([part.boxes for part in found]),
        scores=np.concatenate([part.scores for part in found]),
        labels=np.concatenate([part.labels for part in found]),
        class_names=class_names,
        image_size=size,
        crops=None
        if any(part.crops is None for part in found)
        else tuple(c for part in found for c in part.crops or ()),
    )
    kept = _suppress(together, np.array(tiles), np.concatenate(cut))
    return together.select(kept[np.argsort(-together.scores[kept], kind="stable")])


def _is_cut(part: Detections, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """Return which boxes end at a border of their tile that is not one of the image."""
    (height, width), (y, x) = part.image_size, corner
    inner = np.array([x > 0, y > 0, x + width < size[1], y + height < size[0]])
    distance = np.abs(part.boxes - np.array([0, 0, width, height]))
    return ((distance <= BORDER) & inner).any(1)


def _suppress(found: Detections, tiles: np.ndarray, cut: np.ndarray) -> np.ndarray:
    """Return the numbers of the detections that remain; `tiles` and `cut` are (N,)."""
    order = np.argsort(-found.scores * np.where(cut, 0.5, 1), kind="stable")
    areas = (found.boxes[:, 2:] - found.boxes[:, :2]).prod(1)
    kept = []
    for label in np.unique(found.labels):
        waiting = order[found.labels[order] == label]
        while waiting.size:
            best, waiting = waiting[0], waiting[1:]
            kept.append(best)
            low = np.maximum(found.boxes[best, :2], found.boxes[waiting, :2])
            high = np.minimum(found.boxes[best, 2:], found.boxes[waiting, 2:])
            common = (high - low).clip(min=0).prod(1)
            union = areas[best] + areas[waiting] - common
            same = (common >= IOU * union) | (cut[waiting] & (common >= 0.5 * areas[waiting]))
            waiting = waiting[~(same & (tiles[waiting] != tiles[best]) & (common > 0))]
    return np.array(kept, int)
