"""Objects, class maps and their names drawn over an image."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pe_spatial.data.colors import color_of
from pe_spatial.predict.masks import MaskCrop

OPACITY = 0.45
"""Share of the color in a mask."""


def draw_objects(
    rgb: np.ndarray, boxes: np.ndarray, labels: Sequence[int], texts: Sequence[str],
    crops: Sequence[MaskCrop] | None = None,
) -> np.ndarray:  # fmt: skip
    """Return a copy of (H, W, 3) uint8 RGB with masks, boxes and texts; the first object is on top."""
    pixels = rgb.copy()
    order = range(len(labels) - 1, -1, -1)
    for i in order if crops else ():
        x0, y0, x1, y1 = crops[i].box  # type: ignore[index]
        inside, part = crops[i].pixels, pixels[y0:y1, x0:x1]  # type: ignore[index]
        mixed = (1 - OPACITY) * part[inside] + OPACITY * np.array(color_of(labels[i]), np.float32)
        part[inside] = mixed.round().astype(np.uint8)
    image = Image.fromarray(pixels)
    draw, font = ImageDraw.Draw(image), _font(max(10, round(min(image.size) / 45)))
    width = max(1, round(min(image.size) / 300))
    for i in order:
        color, (x0, y0, x1, y1) = color_of(labels[i]), boxes[i].tolist()
        draw.rectangle((x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)), outline=color, width=width)
        _write(draw, (x0, y0), texts[i], color, font)
    return np.asarray(image)


def draw_labels(
    rgb: np.ndarray, labels: np.ndarray, names: Sequence[str], palette: Sequence[Sequence[int]] | None
) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB under the colors of its classes (H, W), with the names of the largest areas."""
    table = np.array([palette[i] if palette else color_of(i) for i in range(len(names))], np.float32)
    known = labels < len(names)  # 255 is no class
    colors = table[np.where(known, labels, 0)]
    mixed = np.where(known[..., None], (1 - OPACITY) * rgb + OPACITY * colors, rgb)
    image = Image.fromarray(mixed.round().astype(np.uint8))
    draw, font = ImageDraw.Draw(image), _font(max(10, round(min(image.size) / 45)))
    for label in np.unique(labels[known]):
        rows, columns = np.nonzero(labels == label)
        if 100 * rows.size >= labels.size:
            middle = np.argmin(np.abs(rows - np.median(rows)) + np.abs(columns - np.median(columns)))
            color = tuple(int(value) for value in table[label])
            _write(draw, (float(columns[middle]), float(rows[middle])), names[label], color, font)
    return np.asarray(image)


def _write(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    color: tuple[int, ...],
    font: ImageFont.FreeTypeFont,
) -> None:
    """Write a text on a ground of its color, above `corner` or below it at the top of the image."""
    left, top, right, bottom = font.getbbox(text)
    height, (x, y) = bottom - top + 4, corner
    y = y - height if y >= height else y
    draw.rectangle((x, y, x + right - left + 4, y + height), fill=color)
    dark = 0.3 * color[0] + 0.6 * color[1] + 0.1 * color[2] > 140
    draw.text((x + 2 - left, y + 2 - top), text, fill="black" if dark else "white", font=font)


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)
