"""From pixels to the network's input, inside the graph: resizing as OpenCV or Pillow, normalization, padding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Pixels(nn.Module):
    """(B, H, W, 3) uint8 RGB -> normalized (B, 3, h, w), padded with `pad_value` on the right and at the bottom.

    Args:
        mean, std: of the channels in the network's order, in units of a pixel (0 to 255).
        bgr: the network reads B, G, R.
        multiple: height and width become multiples of it.
        square: height and width become `multiple`, and images are not larger.
        pad_value: value of the padding, after normalization.
        size: height and width of an image -> those to which it is resized, `scaled_size` or `size_of_short_side`; None
            for images in the network's own size.
        pillow: resize as Pillow and not as OpenCV.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], *, bgr: bool = False, multiple: int = 1,
        square: bool = False, pad_value: float = 0.0, size: Callable[[Any, Any], tuple[Any, Any]] | None = None,
        pillow: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.bgr, self.multiple, self.square, self.pad_value = bgr, multiple, square, float(pad_value)
        self.resize = resize_like_pillow if pillow else resize_like_opencv
        self.size = size
        self.register_buffer("mean", torch.tensor(list(mean), dtype=torch.float32), persistent=False)
        self.register_buffer("std", torch.tensor(list(std), dtype=torch.float32), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return the network's input, and (h, w) of the image in it, without the padding."""
        height, width = pixels.shape[1:3]
        images = pixels.float()
        if self.size is not None:
            height, width = self.size(height, width)
            images = self.resize(images, (height, width))
        if self.bgr:
            images = images.flip(-1)
        images = ((images - self.mean) / self.std).permute(0, 3, 1, 2)
        if self.square:
            beyond = (0, self.multiple - width, 0, self.multiple - height)
            return F.pad(images, beyond, value=self.pad_value), (height, width)
        return pad_to(images, self.multiple, self.pad_value), (height, width)


def pad_to(images: Tensor, step: int, value: float = 0.0) -> Tensor:
    """Pad (B, C, H, W) on the right and at the bottom until both sides are multiples of `step`."""
    height, width = images.shape[-2:]
    rows, columns = ((side + step - 1) // step * step for side in (height, width))
    return F.pad(images, (0, columns - width, 0, rows - height), value=value)


def size_of_short_side(height: int, width: int, *, short_side: int, max_long_side: int | None) -> tuple[int, int]:
    """Return what `images.short_side_size` does, in whole numbers; the longest side is None for no limit."""
    longer, shorter = torch.sym_max(height, width), torch.sym_min(height, width)
    side: Any = short_side
    if max_long_side is not None:
        halves = 2 * max_long_side * shorter + longer
        rounded = halves // (2 * longer)  # a half is rounded up, and to an even number by the next line
        rounded -= (rounded % 2) * (1 - torch.sym_min(halves % (2 * longer), 1))
        side = torch.sym_min(side, rounded)
    return side * height // shorter, side * width // shorter


def scaled_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Return the size of an image within `scale` (longer, shorter side), each side rounded; in whole numbers."""
    longer, shorter = torch.sym_max(height, width), torch.sym_min(height, width)

    def side(length: Any) -> Any:
        by_longer = (2 * length * scale[0] + longer) // (2 * longer)
        return torch.sym_min(by_longer, (2 * length * scale[1] + shorter) // (2 * shorter))

    return side(height), side(width)


def resize_like_opencv(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) with whole values from 0 to 255 -> (B, h, w, C), bit for bit as cv2.INTER_LINEAR on uint8.

    OpenCV works in fixed point: weights of 11 bits, 4 bits dropped after the rows, the rest after the columns.
    """
    height, width = images.shape[1:3]
    left, right, a, b = _taps(size[1], width, images, zero_beyond=True)
    rows = torch.floor((images[:, :, left] * a[:, None] + images[:, :, right] * b[:, None]) / 16)
    top, bottom, a, b = _taps(size[0], height, images, zero_beyond=False)
    a, b = a[:, None, None], b[:, None, None]
    return torch.floor((_high_bits(a, rows[:, top]) + _high_bits(b, rows[:, bottom]) + 2) / 4).clamp(0, 255)


def resize_like_pillow(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W, C) with whole values from 0 to 255 -> (B, h, w, C), bit for bit as Pillow's BILINEAR on uint8.

    Pillow averages where it shrinks, in fixed point with weights of 22 bits, and rounds after the rows too.
    """
    height, width = images.shape[1:3]
    columns, rows = _averages(size[1], width, images), _averages(size[0], height, images)
    resized = _rounded(images.permute(0, 3, 1, 2).double() @ columns.T)  # (B, C, H, w)
    return _rounded(rows @ resized).permute(0, 2, 3, 1).float()


def _rounded(sums: Tensor) -> Tensor:
    return torch.floor(sums / 2**22 + 0.5).clamp(0, 255)


def _averages(size: int, side: int, like: Tensor) -> Tensor:
    """Return Pillow's weights (size, side) in float64, whole numbers of 22 bits."""
    scale = _ratio(side, size, like)
    stretch = scale.clamp(min=1)
    centers = (torch.arange(size, device=like.device, dtype=torch.float64)[:, None] + 0.5) * scale
    cells = torch.arange(side, device=like.device, dtype=torch.float64)
    inside = (cells >= torch.floor(centers - stretch + 0.5)) & (cells < torch.floor(centers + stretch + 0.5))
    weights = torch.where(inside, (1 - (cells + 0.5 - centers).abs() / stretch).clamp(min=0), 0.0)
    return torch.floor(weights / weights.sum(1, keepdim=True) * 2**22 + 0.5)


def _ratio(side: int, size: int, like: Tensor) -> Tensor:
    """Return side / size in float64: between sizes that are free, `/` is a division in float32 in ONNX."""
    one = torch.ones((), device=like.device, dtype=torch.float64)
    return one * side / (one * size)


def _taps(size: int, side: int, like: Tensor, *, zero_beyond: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the two cells that each of `size` places reads, and their weights of 0 to 2048.

    Beyond the border OpenCV moves the weights to the last cell along rows, but not along columns.
    """
    places = (torch.arange(size, device=like.device, dtype=torch.float64) + 0.5) * _ratio(side, size, like) - 0.5
    places = places.float()
    first = places.floor()
    rest = places - first
    if zero_beyond:
        rest = torch.where((first < 0) | (first >= side - 1), 0.0, rest)
        first = first.clamp(0, side - 1)
    cells = ((first + step).clamp(0, side - 1).long() for step in (0, 1))
    left, right = cells
    return left, right, torch.round((1 - rest) * 2048), torch.round(rest * 2048)


def _high_bits(weight: Tensor, value: Tensor) -> Tensor:
    """Return floor(weight * value / 65536) in float32, whose 24 bits do not hold the product."""
    high = torch.floor(value / 256)
    low = value - 256 * high
    return torch.floor((weight * high + torch.floor(weight * low / 256)) / 256)
