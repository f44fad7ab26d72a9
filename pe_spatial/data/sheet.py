"""A contact sheet: images with their boxes and masks, and how classes, sizes and images are distributed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageDraw

from pe_spatial.atomic import atomic_write
from pe_spatial.data.colors import palette

_COLUMNS = 4
_SIDE = 480  # pixels of the longer side of an image on the sheet
_CLASSES = 25  # bars
_NAMED = 15  # objects in an image, above which only colors tell the classes


@dataclass(frozen=True)
class Example:
    """An image of the sheet.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (N, 4) left, top, right, bottom, in pixels.
        labels: N indices of classes.
        masks: for each object a list of polygons, or (H, W) bool; empty if there are no masks.
        title: above the image.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: Sequence[int]
    masks: Sequence[Any]
    title: str


@dataclass(frozen=True)
class Statistics:
    """Numbers of a dataset.

    Attributes:
        per_class: name of a split -> objects of each class.
        sides: square roots of the areas of all boxes, in pixels.
        per_image: objects of each image.
    """

    per_class: Mapping[str, Sequence[int]]
    sides: Sequence[float]
    per_image: Sequence[int]


def draw_sheet(
    path: str | Path, examples: Sequence[Example], classes: Sequence[str], statistics: Statistics, lines: Sequence[str]
) -> None:
    """Write a PNG with `examples`, the `statistics` of the dataset, and lines of text below."""
    rows = math.ceil(len(examples) / _COLUMNS)
    heights = [*[2.7] * rows, 3.4 + 0.1 * min(len(classes), _CLASSES) / 5, 0.22 * len(lines) + 0.1]
    figure = Figure(figsize=(13, sum(heights)), layout="constrained")
    grid = figure.add_gridspec(rows + 2, 12, height_ratios=heights)
    for i, example in enumerate(examples):
        left = 3 * (i % _COLUMNS)
        _draw_example(figure.add_subplot(grid[i // _COLUMNS, left : left + 3]), example, classes)
    _draw_classes(figure.add_subplot(grid[rows, :6]), classes, statistics.per_class)
    _draw_sides(figure.add_subplot(grid[rows, 6:9]), statistics.sides)
    _draw_per_image(figure.add_subplot(grid[rows, 9:]), statistics.per_image)
    text = figure.add_subplot(grid[rows + 1, :])
    text.axis("off")
    text.text(0, 1, "\n".join(lines), va="top", fontsize=9, wrap=True, transform=text.transAxes, parse_math=False)
    with atomic_write(path) as unfinished:
        figure.savefig(unfinished, dpi=110, format="png")


def _colors(number: int) -> np.ndarray:
    return np.array(palette(number)).reshape(number, 3) / 255


def _draw_example(axes: Axes, example: Example, classes: Sequence[str]) -> None:
    height, width = example.image.shape[:2]
    scale = min(1, _SIDE / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    colors = _colors(len(classes))
    pixels = np.asarray(Image.fromarray(example.image).resize(size, Image.Resampling.BILINEAR)).astype(np.float32)
    for label, mask in zip(example.labels, example.masks, strict=False):
        inside = _raster(mask, size, scale)
        pixels[inside] = 0.55 * pixels[inside] + 0.45 * 255 * colors[label]
    axes.imshow(pixels.round().astype(np.uint8))
    axes.set_title(example.title, fontsize=7, parse_math=False)
    axes.axis("off")
    for (x, y, right, bottom), label in zip(example.boxes * scale, example.labels, strict=True):
        box = Rectangle((x - 0.5, y - 0.5), right - x, bottom - y, fill=False, color=colors[label], linewidth=1.1)
        axes.add_patch(box)
        if len(example.labels) <= _NAMED:
            back = dict(facecolor=colors[label], edgecolor="none", pad=0.8)
            ink = "black" if colors[label].sum() > 1.5 else "white"
            text = axes.text(x, y, classes[label], fontsize=6, color=ink, va="bottom", bbox=back, parse_math=False)
            text.set_clip_on(True)


def _raster(mask: Any, size: tuple[int, int], scale: float) -> np.ndarray:
    """Return a mask of `size` (width, height) from polygons in pixels of the unscaled image, or from its pixels."""
    if isinstance(mask, np.ndarray) and mask.ndim == 2:
        return np.asarray(Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
    image = Image.new("1", size)
    for polygon in mask or ():
        points = (np.asarray(polygon, np.float64) * scale).ravel().tolist()
        if len(points) >= 6:
            ImageDraw.Draw(image).polygon(points, fill=1)
    return np.asarray(image)


def _draw_classes(axes: Axes, classes: Sequence[str], per_class: Mapping[str, Sequence[int]]) -> None:
    totals = [sum(counts[i] for counts in per_class.values()) for i in range(len(classes))]
    order = sorted(range(len(classes)), key=lambda i: -totals[i])[:_CLASSES]
    left = np.zeros(len(order))
    colors = _colors(len(classes))[order]
    for split, alpha in zip(per_class, (1, 0.55, 0.3), strict=False):
        counts = np.array([per_class[split][i] for i in order])
        axes.barh(range(len(order)), counts, left=left, color=colors, alpha=alpha, edgecolor="white")
        left += counts
    shares = [", ".join(f"{counts[i]} {split}" for split, counts in per_class.items()) for i in order]
    for i, share in enumerate(shares):
        axes.text(left[i], i, f" {share}", va="center", fontsize=6)
    axes.set_yticks(range(len(order)), [classes[i] for i in order], fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max([*left, 1]))
    more = f" (the {len(order)} most frequent of {len(classes)} classes)" if len(order) < len(classes) else ""
    axes.set_title(f"objects per class{more}", fontsize=9)
    axes.tick_params(axis="x", labelsize=7)


def _draw_sides(axes: Axes, sides: Sequence[float]) -> None:
    positive = np.array([side for side in sides if side > 0])
    axes.set_title("sizes", fontsize=9)
    if not len(positive):
        return
    low, high = positive.min() / 1.1, positive.max() * 1.1
    axes.hist(positive, bins=np.geomspace(low, high, 30).tolist(), color="tab:gray")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    for side in (32, 96):
        if low < side < high:
            axes.axvline(side, color="tab:red", linewidth=1)
    small, medium = (positive < 32).mean(), ((positive >= 32) & (positive < 96)).mean()
    parts = f"small {small:.0%}, medium {medium:.0%}, large {1 - small - medium:.0%}"
    axes.set_title(f"sizes of objects: {parts}", fontsize=9)
    axes.set_xlabel("square root of the box's area in pixels (lines at 32 and 96)", fontsize=7)
    axes.tick_params(labelsize=7, which="both")


def _draw_per_image(axes: Axes, per_image: Sequence[int]) -> None:
    high = max(per_image, default=0)
    width = high // 30 + 1
    axes.hist(per_image, bins=(np.arange(0, high + width + 1, width) - 0.5).tolist(), color="tab:gray")
    axes.set_title(f"objects per image (of {len(per_image)}; {sum(n == 0 for n in per_image)} have none)", fontsize=9)
    axes.tick_params(labelsize=7)
