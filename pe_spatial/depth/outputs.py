"""Depth maps as files and images: 16-bit PNG, colors with a color bar, the error against ground truth.

Depth is (H, W) in meters, or in the model's own unit where it is relative; 0, negative and non-finite values are
missing and drawn gray.
"""

import difflib
import io
from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from pe_spatial.errors import ConfigError

GRAY = (128, 128, 128)  # color of missing pixels; no colormap used here contains it
ERROR_COLORS, ERROR_RANGE = "coolwarm", (0.0, 0.2)  # range of abs_rel, as in UniDepth's demo


def is_valid(depth: np.ndarray) -> np.ndarray:
    """Return where depth is not missing, (H, W) bool."""
    return np.isfinite(depth) & (depth > 0)


def encode_png16(depth: np.ndarray, scale: float, text: Mapping[str, str]) -> tuple[bytes, int]:
    """Return a 16-bit PNG of round(depth * scale), and the number of pixels that exceed it and are saturated at 65535.

    Missing pixels are 0; valid ones are at least 1. `scale` is in units per meter: 1000 as in NYUv2 (up to 65 m), 256
    as in KITTI (256 m), 5000 as in TUM (13 m). `text` is written into the file, in addition to the scale.
    """
    valid = is_valid(depth)
    units = np.round(np.where(valid, depth, 0).astype(np.float64) * scale)
    saturated = int((units > 65535).sum())
    pixels = np.where(valid, units.clip(1, 65535), 0).astype(np.uint16)
    chunks = PngInfo()
    for key, value in {"depth_scale": f"{scale:g}", "depth_missing": "0", **text}.items():
        chunks.add_text(key, value)
    return _png(Image.fromarray(pixels), pnginfo=chunks), saturated


def encode_color(depth: np.ndarray, limits: tuple[float, float], colors: str, label: str) -> bytes:
    """Return a PNG of `draw_depth` with a color bar."""
    return _png(Image.fromarray(add_bar(draw_depth(depth, limits, colors), limits, colors, label)))


def encode_error(depth: np.ndarray, truth: np.ndarray) -> bytes:
    """Return a PNG of `draw_error` with a color bar."""
    image = add_bar(draw_error(depth, truth), ERROR_RANGE, ERROR_COLORS, "|depth - truth| / truth")
    return _png(Image.fromarray(image))


def _png(image: Image.Image, **options: PngInfo) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def depth_range(depth: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float] | None:
    """Return two percentiles of the valid pixels; None if there are no valid pixels."""
    values = depth[is_valid(depth)]
    if not values.size:
        return None
    low, high = np.percentile(values, percentiles)
    return float(low), float(high)


def draw_values(values: np.ndarray, valid: np.ndarray, limits: tuple[float, float], colors: str) -> np.ndarray:
    """Return (H, W, 3) uint8: `values` by a matplotlib colormap over `limits`, gray where not `valid`.

    Values outside the limits get the colors of its ends. Raises ConfigError for an unknown colormap.
    """
    low, high = limits
    position = (np.where(valid, values, low) - low) / max(high - low, 1e-12)
    image = _colormap(colors)(position.clip(0, 1), bytes=True)[..., :3].copy()
    image[~valid] = GRAY
    return image


def draw_depth(depth: np.ndarray, limits: tuple[float, float], colors: str) -> np.ndarray:
    """Return (H, W, 3) uint8: depth by a colormap over `limits`."""
    return draw_values(depth, is_valid(depth), limits, colors)


def draw_error(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: |depth - truth| / truth over 0 to 0.2, gray where either is missing."""
    valid = is_valid(depth) & is_valid(truth)
    error = np.abs(depth - truth) / np.where(valid, truth, 1)
    return draw_values(error, valid, ERROR_RANGE, ERROR_COLORS)


def add_bar(image: np.ndarray, limits: tuple[float, float], colors: str, label: str) -> np.ndarray:
    """Return `image` (H, W, 3) uint8 with a color bar to its right, scaled to its height."""
    height = image.shape[0]
    inches = (1.2, 4.8)  # 100 dots per inch at a height of 480 px
    figure = Figure(figsize=inches, dpi=height / inches[1])
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.04, 0.18, 0.92))
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10])
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), _colormap(colors)), cax=axes, ticks=ticks)
    bar.set_label(label)
    canvas.draw()
    panel = np.asarray(canvas.buffer_rgba())[..., :3]
    rows = np.linspace(0, panel.shape[0] - 1, height).round().astype(int)  # rounding may add or drop a row
    return np.concatenate([image, panel[rows]], axis=1)


def _colormap(name: str) -> Colormap:
    if name not in matplotlib.colormaps:
        near = difflib.get_close_matches(name, list(matplotlib.colormaps), n=3, cutoff=0.4)
        raise ConfigError(f"matplotlib has no colormap {name!r}; try {', '.join(near) or 'Spectral'}")
    return matplotlib.colormaps[name]
