"""A depth map as colored points, and the camera for it: given, from EXIF, or guessed."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.ndimage import maximum_filter, minimum_filter

from pe_spatial.depth.outputs import is_valid
from pe_spatial.errors import ConfigError
from pe_spatial.images import open_image

_EXIF, _FOCAL_LENGTH_35MM = 0x8769, 0xA405
_FILM_DIAGONAL = math.hypot(36, 24)  # mm


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels; the center of the first pixel is (0, 0), as in OpenCV."""

    fx: float
    fy: float
    cx: float
    cy: float
    source: str  # where the numbers come from

    def __str__(self) -> str:
        return f"fx {self.fx:.2f} fy {self.fy:.2f} cx {self.cx:.2f} cy {self.cy:.2f} ({self.source})"


def given_camera(values: Sequence[float], size: tuple[int, int]) -> Intrinsics:
    """Return the camera of `values` (fx, fy, cx, cy); ConfigError if they do not fit an image of `size` (H, W)."""
    fx, fy, cx, cy = values
    h, w = size
    if not (min(fx, fy) > 0 and 0 < cx < w and 0 < cy < h):
        raise ConfigError(
            f"intrinsics {fx:g} {fy:g} {cx:g} {cy:g} do not fit an image of {w}x{h} pixels; "
            "give fx fy cx cy in pixels of that image, with the center inside"
        )
    return Intrinsics(fx, fy, cx, cy, "given")


def exif_camera(path: Path, size: tuple[int, int]) -> Intrinsics | None:
    """Return the camera for EXIF's focal length in 35 mm film, or None if EXIF has none.

    The equivalence holds for diagonals (CIPA DCG-001), so orientation does not matter. It is wrong for cropped images.
    """
    try:
        with open_image(path) as image:
            focal = float(image.getexif().get_ifd(_EXIF).get(_FOCAL_LENGTH_35MM, 0))
    except Exception:  # PIL raises almost anything on broken tags
        return None
    if not 0 < focal < math.inf:
        return None
    return _central(focal / _FILM_DIAGONAL * math.hypot(*size), size, f"EXIF: {focal:g} mm on 35 mm film")


def guessed_camera(size: tuple[int, int], fov: float) -> Intrinsics:
    """Return a camera with a field of view of `fov` degrees along the longer side."""
    if not 0 < fov < 180:
        raise ConfigError(f"the field of view is {fov:g} degrees; give a value between 0 and 180")
    focal = max(size) / 2 / math.tan(math.radians(fov) / 2)
    return _central(focal, size, f"GUESS: a field of view of {fov:g} degrees")


def _central(focal: float, size: tuple[int, int], source: str) -> Intrinsics:
    return Intrinsics(focal, focal, (size[1] - 1) / 2, (size[0] - 1) / 2, source)


def without_edges(depth: np.ndarray, ratio: float) -> np.ndarray:
    """Return `depth` (H, W) without pixels at edges, where networks predict depths between near and far.

    `ratio` is the largest ratio of the farthest to the nearest depth in a window of 3 x 3 pixels, for instance 1.05.
    """
    if ratio <= 1:
        raise ConfigError(f"the ratio of depths at an edge is {ratio:g}; give more than 1, for instance 1.05")
    valid = is_valid(depth)
    far = maximum_filter(np.where(valid, depth, 0), 3, mode="nearest")
    near = minimum_filter(np.where(valid, depth, np.inf), 3, mode="nearest")
    return np.where(valid & (far <= near * ratio), depth, 0)


def encode_ply(depth: np.ndarray, rgb: np.ndarray, camera: Intrinsics, comments: Sequence[str]) -> tuple[bytes, int]:
    """Return a binary PLY file of the valid pixels of `depth` (H, W) and `rgb` (H, W, 3) uint8, and their number.

    x points right, y down, z away from the camera, in the unit of `depth`, which is along z, not along the ray. The
    header contains the camera and `comments`.
    """
    valid = is_valid(depth)
    v, u = np.nonzero(valid)
    z = depth[valid]
    points = np.empty(z.size, [(name, "<f4") for name in "xyz"] + [(name, "u1") for name in ("red", "green", "blue")])
    points["x"], points["y"], points["z"] = (u - camera.cx) / camera.fx * z, (v - camera.cy) / camera.fy * z, z
    points["red"], points["green"], points["blue"] = rgb[valid].T
    header = [
        "ply",
        "format binary_little_endian 1.0",
        *(f"comment {line}" for line in (f"intrinsics {camera}", "x right, y down, z forward", *comments)),
        f"element vertex {z.size}",
        *(f"property float {name}" for name in "xyz"),
        *(f"property uchar {name}" for name in ("red", "green", "blue")),
        "end_header\n",
    ]
    return "\n".join(header).encode("ascii", "replace") + points.tobytes(), int(z.size)
