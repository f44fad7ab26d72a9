"""A depth map as coloured points, and the camera that it needs: given, from EXIF, or guessed and said to be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import maximum_filter, minimum_filter

from pe_spatial.depth.outputs import is_valid
from pe_spatial.errors import ConfigError

_EXIF, _FOCAL_LENGTH_35MM = 0x8769, 0xA405
_FILM_DIAGONAL = math.hypot(36, 24)  # mm


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera, in pixels; the centre of the first pixel is (0, 0), as in OpenCV.

    `source` says where the numbers come from, for whoever reads the points.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    source: str

    def __str__(self) -> str:
        return f"fx {self.fx:.2f} fy {self.fy:.2f} cx {self.cx:.2f} cy {self.cy:.2f} ({self.source})"


def given_camera(values: Sequence[float], size: tuple[int, int]) -> Intrinsics:
    """Return the camera of `values` (fx, fy, cx, cy) if it can be that of images of `size` (H, W)."""
    fx, fy, cx, cy = values
    h, w = size
    if not (min(fx, fy) > 0 and 0 < cx < w and 0 < cy < h):
        raise ConfigError(
            f"intrinsics {fx:g} {fy:g} {cx:g} {cy:g} are not those of an image of {w}x{h} pixels; "
            "give fx fy cx cy in its pixels, the centre inside it"
        )
    return Intrinsics(fx, fy, cx, cy, "given")


def exif_camera(path: Path, size: tuple[int, int]) -> Intrinsics | None:
    """Return the camera by the focal length that EXIF gives as of 35 mm film, or None where it gives none.

    The equivalence is that of the diagonals (CIPA DCG-001), so that orientation does not matter. It fails for images
    that were cropped after they were taken.
    """
    try:
        with Image.open(path) as image:
            focal = float(image.getexif().get_ifd(_EXIF).get(_FOCAL_LENGTH_35MM, 0))
    except Exception:  # PIL raises almost anything on broken tags, which are as good as none
        return None
    if not 0 < focal < math.inf:
        return None
    return _central(focal / _FILM_DIAGONAL * math.hypot(*size), size, f"EXIF: {focal:g} mm on 35 mm film")


def guessed_camera(size: tuple[int, int], fov: float) -> Intrinsics:
    """Return a camera whose longer side sees `fov` degrees."""
    if not 0 < fov < 180:
        raise ConfigError(f"a field of view of {fov:g} degrees is none; between 0 and 180 is allowed")
    focal = max(size) / 2 / math.tan(math.radians(fov) / 2)
    return _central(focal, size, f"GUESS: a field of view of {fov:g} degrees")


def _central(focal: float, size: tuple[int, int], source: str) -> Intrinsics:
    return Intrinsics(focal, focal, (size[1] - 1) / 2, (size[0] - 1) / 2, source)


def without_edges(depth: np.ndarray, ratio: float) -> np.ndarray:
    """Return `depth` without the pixels at its edges, where networks put points between near and far.

    Args:
        depth: (H, W).
        ratio: how much farther than the nearest the farthest of the 3 x 3 pixels around may be, for instance 1.05.
    """
    if ratio <= 1:
        raise ConfigError(f"the ratio of depths at an edge is {ratio:g}; it is more than 1, for instance 1.05")
    valid = is_valid(depth)
    far = maximum_filter(np.where(valid, depth, 0), 3, mode="nearest")
    near = minimum_filter(np.where(valid, depth, np.inf), 3, mode="nearest")
    return np.where(valid & (far <= near * ratio), depth, 0)


def encode_ply(depth: np.ndarray, rgb: np.ndarray, camera: Intrinsics, comments: Sequence[str]) -> tuple[bytes, int]:
    """Return a binary PLY file of the known pixels, and their number.

    x points right, y down, z away from the camera, in the unit of `depth`.

    Args:
        depth: (H, W), along z (not along the ray).
        rgb: (H, W, 3) uint8.
        camera: of this image.
        comments: further lines of the header; the camera is always one of them.
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
