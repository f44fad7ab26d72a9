"""Depth maps as files and images: 16-bit PNG, colours with a bar, the error against ground truth.

Everywhere depth is (H, W) in metres (or in the model's own unit, where it is relative); 0, negative and non-finite
values are missing and drawn grey.
"""

from __future__ import annotations

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

GREY = (128, 128, 128)  # of missing pixels; in none of the maps used here
ERROR_COLOURS, ERROR_RANGE = "coolwarm", (0.0, 0.2)  # of abs_rel, as in UniDepth's demo


def is_valid(depth: np.ndarray) -> np.ndarray:
    """Return where depth is known."""
    return np.isfinite(depth) & (depth > 0)


def encode_png16(depth: np.ndarray, scale: float, text: Mapping[str, str]) -> tuple[bytes, int]:
    """Return a 16-bit PNG of round(depth * scale), and how many pixels are too far for it and became 65535.

    Missing pixels are 0; known ones are at least 1, however near.

    Args:
        depth: the map.
        scale: units per metre: 1000 as in NYUv2 (up to 65 m), 256 as in KITTI (256 m), 5000 as in TUM (13 m).
        text: further text chunks of the file; the scale is always one of them.
    """
    valid = is_valid(depth)
    units = np.round(np.where(valid, depth, 0).astype(np.float64) * scale)
    saturated = int((units > 65535).sum())
    pixels = np.where(valid, units.clip(1, 65535), 0).astype(np.uint16)
    chunks = PngInfo()
    for key, value in {"depth_scale": f"{scale:g}", "depth_missing": "0", **text}.items():
        chunks.add_text(key, value)
    return _png(Image.fromarray(pixels), pnginfo=chunks), saturated


def encode_rgb(image: np.ndarray) -> bytes:
    """Return (H, W, 3) uint8 as a PNG."""
    return _png(Image.fromarray(image))


def _png(image: Image.Image, **options: PngInfo) -> bytes:
    file = io.BytesIO()
    image.save(file, format="PNG", **options)
    return file.getvalue()


def depth_range(depth: np.ndarray, percentiles: tuple[float, float]) -> tuple[float, float] | None:
    """Return the two percentiles of the known pixels; None if there are none."""
    known = depth[is_valid(depth)]
    if not known.size:
        return None
    low, high = np.percentile(known, percentiles)
    return float(low), float(high)


def draw_values(values: np.ndarray, known: np.ndarray, limits: tuple[float, float], colours: str) -> np.ndarray:
    """Return (H, W, 3) uint8: `values` in the colours of a matplotlib map over `limits`; grey where not `known`.

    Values beyond the limits have the colours of its ends. Raises ConfigError for a map that matplotlib does not know.
    """
    low, high = limits
    position = (np.where(known, values, low) - low) / max(high - low, 1e-12)
    image = _colours(colours)(position.clip(0, 1), bytes=True)[..., :3].copy()
    image[~known] = GREY
    return image


def draw_depth(depth: np.ndarray, limits: tuple[float, float], colours: str) -> np.ndarray:
    """Return (H, W, 3) uint8: depth in colours over `limits`."""
    return draw_values(depth, is_valid(depth), limits, colours)


def draw_error(depth: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8: |depth - truth| / truth over 0 to 0.2, grey where either is missing."""
    known = is_valid(depth) & is_valid(truth)
    error = np.abs(depth - truth) / np.where(known, truth, 1)
    return draw_values(error, known, ERROR_RANGE, ERROR_COLOURS)


def add_bar(image: np.ndarray, limits: tuple[float, float], colours: str, label: str) -> np.ndarray:
    """Return `image` (H, W, 3) uint8 with a colour bar at its right; the bar grows with the image."""
    height = image.shape[0]
    inches = (1.2, 4.8)  # at a height of 480 px that is 100 dots an inch
    figure = Figure(figsize=inches, dpi=height / inches[1])
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.1, 0.04, 0.18, 0.92))
    ticks = MaxNLocator(8, steps=[1, 2, 5, 10])
    bar = figure.colorbar(ScalarMappable(Normalize(*limits), _colours(colours)), cax=axes, ticks=ticks)
    bar.set_label(label)
    canvas.draw()
    panel = np.asarray(canvas.buffer_rgba())[..., :3]
    rows = np.linspace(0, panel.shape[0] - 1, height).round().astype(int)  # a row more or less from rounding
    return np.concatenate([image, panel[rows]], axis=1)


def _colours(name: str) -> Colormap:
    if name not in matplotlib.colormaps:
        near = difflib.get_close_matches(name, list(matplotlib.colormaps), n=3, cutoff=0.4)
        raise ConfigError(f"matplotlib has no colours {name!r}; near are {', '.join(near) or 'none'}; try Spectral")
    return matplotlib.colormaps[name]
