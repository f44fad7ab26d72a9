"""An exported encoder: images in, the maps of the chosen layers out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.runtime.manifest import Manifest, read_manifest
from pe_spatial.runtime.sessions import open_session


class ExportedEncoder:
    """An encoder in another runtime.

    Args:
        folder: what `pe-spatial export` wrote.
        options: `backend` and `threads`, see `open_session`.
    """

    task = "encoder"

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.session = open_session(self.folder, self.manifest, **options)

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return one map (B, C, H / p, W / p) float32 for each layer.

        `images` are what the manifest's input says: `pixels` (B, H, W, 3) uint8 RGB, or `images` (B, 3, H, W) float32,
        normalized. Raises DatasetError for other arrays and sizes.
        """
        (name,) = self.manifest.inputs
        check_input(images, name, self.manifest)
        return tuple(self.session.run({name: np.ascontiguousarray(images)}).values())


def check_input(images: Any, name: str, manifest: Manifest) -> None:
    """Raise DatasetError for an array that the graph does not take."""
    wanted = "(B, H, W, 3) uint8" if name == "pixels" else "(B, 3, H, W) float32"
    dtype = np.uint8 if name == "pixels" else np.float32
    channels, first = (3, 1) if name == "pixels" else (1, 2)
    shape = getattr(images, "shape", None)
    if shape is None or len(shape) != 4 or shape[channels] != 3 or images.dtype != dtype:
        kind = f"a {type(images).__name__}" if shape is None else f"an array {shape} of {images.dtype}"
        raise DatasetError(f"the input is {kind}; this model takes {wanted}")
    height, width = shape[first : first + 2]
    step = manifest.multiple
    if height % step or width % step or not height * width:
        larger = f"{max(-(-height // step), 1) * step}x{max(-(-width // step), 1) * step}"
        raise DatasetError(f"image size {height}x{width} is not a multiple of {step}; pad or resize to {larger}")
    if min(height, width) < manifest.minimum:
        raise DatasetError(f"image size {height}x{width} is too small; this file takes {manifest.minimum} and more")
    if manifest.sizes and [height, width] not in manifest.sizes:
        sizes = ", ".join(f"{h}x{w}" for h, w in manifest.sizes)
        raise DatasetError(f"image size {height}x{width} is not one that this file was exported for: {sizes}")
