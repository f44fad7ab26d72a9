"""What a predictor takes as an image: a path, a PIL image, an array, a tensor. Importing it needs no torch."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, Union

import numpy as np
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb, to_rgb, turn_upright

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
ImageLike = Union[str, Path, Image.Image, np.ndarray, "Tensor"]


def is_single(images: Any) -> bool:
    """Return whether `images` is one image and not several."""
    if isinstance(images, np.ndarray) or _is_tensor(images):
        return images.ndim != 4
    return isinstance(images, str | Path | Image.Image) or not isinstance(images, Iterable)


def read_images(images: Iterable[ImageLike]) -> Iterator[np.ndarray]:
    """Yield each image as (H, W, 3) uint8 RGB; DatasetError says which of them cannot be used."""
    for number, image in enumerate(images):
        yield read_image(image, f"image {number}")


def read_image(image: ImageLike, name: str = "the image") -> np.ndarray:
    """Return (H, W, 3) uint8 RGB, upright, from a path, a PIL image, or pixels: (H, W, 3) arrays, (3, H, W) tensors."""
    if isinstance(image, str | Path):
        if "://" in str(image):
            raise DatasetError(f"{image} is an address; download the image and give the path of the file")
        return read_rgb(image)
    if isinstance(image, Image.Image):
        try:
            return to_rgb(turn_upright(image))
        except ValueError as error:
            raise DatasetError(f"{name} cannot be used: {error}") from error
    if _is_tensor(image):
        kind, wanted = f"a tensor {tuple(image.shape)} of {image.dtype}", "(3, H, W) uint8"
        pixels: np.ndarray = image.movedim(0, -1).cpu().numpy()
    elif isinstance(image, np.ndarray):
        pixels, kind, wanted = image, f"an array {image.shape} of {image.dtype}", "(H, W, 3) uint8"
    else:
        kind = type(image).__name__
        raise DatasetError(f"{name} is a {kind}; give a path, a PIL image, an array (H, W, 3) or a tensor (3, H, W)")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DatasetError(f"{name} is {kind}; give {wanted}, RGB from 0 to 255")
    return pixels


def _is_tensor(image: Any) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    return torch is not None and isinstance(image, torch.Tensor)


def ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield `items`, whose next ones, up to `count`, a thread computes meanwhile."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        coming: deque[Any] = deque(pool.submit(next, iterator, end) for _ in range(count))
        while (item := coming.popleft().result()) is not end:
            coming.append(pool.submit(next, iterator, end))
            yield item
