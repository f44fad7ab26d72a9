"""A contact sheet of small images with captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _LINE = 6, 18  # pixels


@dataclass(frozen=True)
class Strip:
    """Cells under a title, in as many rows as needed.

    Attributes:
        title: one line.
        cells: captions and images (H, W, 3), uint8 RGB, of one size.
    """

    title: str
    cells: Sequence[tuple[str, np.ndarray]]


def draw_strips(strips: Sequence[Strip], *, columns: int, width: int) -> np.ndarray:
    """Return one image (H, W, 3) uint8 RGB of all strips; cells are `width` pixels wide and captioned above."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")  # Pillow's own has no letters but English ones
    font = ImageFont.truetype(str(fonts / "DejaVuSans.ttf"), 12)
    heights = [_cell_height(strip, width) for strip in strips]
    rows = [math.ceil(len(strip.cells) / columns) for strip in strips]
    columns = min(columns, max(len(strip.cells) for strip in strips))
    total = sum(_LINE + n * (height + _LINE + _GAP) for n, height in zip(rows, heights, strict=True)) + _GAP
    sheet = Image.new("RGB", (_GAP + columns * (width + _GAP), total), "white")
    pen = ImageDraw.Draw(sheet)
    y = _GAP
    for strip, height in zip(strips, heights, strict=True):
        pen.text((_GAP, y), strip.title, "black", font)
        y += _LINE
        for i, (caption, image) in enumerate(strip.cells):
            x = _GAP + i % columns * (width + _GAP)
            top = y + i // columns * (height + _LINE + _GAP)
            pen.text((x, top), caption, (110, 110, 110), font)
            cell = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)
            sheet.paste(cell, (x, top + _LINE))
        y += math.ceil(len(strip.cells) / columns) * (height + _LINE + _GAP)
    return np.array(sheet)


def _cell_height(strip: Strip, width: int) -> int:
    height, own = strip.cells[0][1].shape[:2]
    return max(1, round(width * height / own))


def heat(values: Tensor, colors: int) -> np.ndarray:
    """Return values (h, w) as colors (h, w, 3), uint8 RGB, from their least to their largest, by OpenCV's colormap."""
    low, high = values.min(), values.max()
    scaled = (255 * (values - low) / (high - low).clamp_min(1e-12)).byte().cpu().numpy()
    return np.ascontiguousarray(cv2.applyColorMap(scaled, colors)[..., ::-1])


def marked(rgb: np.ndarray, point: tuple[float, float]) -> np.ndarray:
    """Return an image with a ring around the point (x, y)."""
    image, radius = rgb.copy(), max(3, max(rgb.shape[:2]) // 40)
    center = (round(point[0]), round(point[1]))
    for color, extra in (((0, 0, 0), 2), ((255, 255, 255), 0)):
        cv2.circle(image, center, radius, color, max(1, radius // 3) + extra, cv2.LINE_AA)
    return image
