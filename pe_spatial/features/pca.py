"""Feature maps as colors: three principal components as lightness, chroma and hue.

As in the appendix of the PE paper (arXiv 2504.13181v2): half of the features and half of their Gaussian blur, whose
first three principal components become a color in LCh. The paper gives no ranges; those here are `_LIGHTNESS`,
`_CHROMA` and `_HUE`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

_LIGHTNESS, _CHROMA, _HUE = (25.0, 90.0), (15.0, 85.0), (0.0, 1.6 * math.pi)  # 1.6: the ends have different colors
_PERCENTILES = (0.02, 0.98)  # of the components, over all patches of a basis: the ends of the ranges


def smooth(maps: Tensor) -> Tensor:
    """Return half of maps (B, C, h, w) and half of their Gaussian blur (3 x 3, sigma 1); borders are repeated."""
    side = math.exp(-0.5)
    kernel = maps.new_tensor([side, 1.0, side]) / (1 + 2 * side)
    padded = F.pad(maps, (1, 1, 1, 1), mode="replicate")
    rows = sum(k * padded[..., i : i + maps.shape[-2], :] for i, k in enumerate(kernel))
    blurred = sum(k * rows[..., i : i + maps.shape[-1]] for i, k in enumerate(kernel))
    return 0.5 * maps + 0.5 * blurred


@dataclass(frozen=True)
class Basis:
    """Three principal axes, and the range of the components.

    Attributes:
        mean: (C,).
        axes: (C, 3), orthonormal, largest variance first.
        low: (3,), components that become 0.
        high: (3,), components that become 1.
    """

    mean: Tensor
    axes: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def fit(cls, maps: Sequence[Tensor]) -> "Basis":
        """Fit a basis to all patches of the maps, (B, C, h, w) each.

        The sign of an axis makes the skewness of its component positive, so that it depends on how the features lie
        to one another alone: features that are rotated in their space get the same components.
        """
        x = torch.cat([_tokens(m) for m in maps]).double()  # (N, C)
        mean = x.mean(0)
        centered = x - mean
        axes = torch.linalg.eigh(centered.T @ centered).eigenvectors[:, -3:].flip(1)
        components = centered @ axes
        sign = torch.where(components.pow(3).sum(0) < 0, -1.0, 1.0)
        low, high = (components * sign).quantile(torch.tensor(_PERCENTILES, dtype=x.dtype, device=x.device), dim=0)
        return cls(mean.float(), (axes * sign).float(), low.float(), high.float())

    def components(self, maps: Tensor) -> Tensor:
        """Return the three components of maps (B, C, h, w), scaled to 0 to 1 and clipped: (B, 3, h, w)."""
        x = (maps.movedim(1, -1) - self.mean) @ self.axes
        return ((x - self.low) / (self.high - self.low).clamp_min(1e-12)).clamp(0, 1).movedim(-1, 1)

    def colors(self, maps: Tensor) -> Tensor:
        """Return maps (B, C, h, w) as colors (B, h, w, 3), uint8 RGB."""
        first, second, third = self.components(maps).unbind(1)
        values = [low + (high - low) * x for x, (low, high) in zip(
            (first, second, third), (_LIGHTNESS, _CHROMA, _HUE), strict=True)]  # fmt: skip
        return lch_to_rgb(torch.stack(values, -1))


def shared_over_layers(layers: Sequence[Sequence[Tensor]]) -> list[Basis]:
    """Fit the same axes and ranges to the maps of several layers; return the basis of each.

    Layers differ in mean and scale: each is centered, and scaled to a mean square of 1.
    """
    tokens = [torch.cat([_tokens(m) for m in maps]) for maps in layers]
    means = [x.mean(0) for x in tokens]
    scales = [(x - mean).square().mean().sqrt().clamp_min(1e-12) for x, mean in zip(tokens, means, strict=True)]
    standard = [[(m - mean[:, None, None]) / scale for m in maps]
                for maps, mean, scale in zip(layers, means, scales, strict=True)]  # fmt: skip
    basis = Basis.fit([m for maps in standard for m in maps])
    return [replace(basis, mean=mean, axes=basis.axes / scale) for mean, scale in zip(means, scales, strict=True)]


def _tokens(maps: Tensor) -> Tensor:
    """(B, C, h, w) -> (B * h * w, C)."""
    return maps.movedim(1, -1).flatten(0, 2)


def lch_to_rgb(lch: Tensor) -> Tensor:
    """Convert CIE LCh (..., 3), white D65, to sRGB (..., 3), uint8: lightness 0 to 100, chroma, hue in radians.

    Colors outside of sRGB are clipped.
    """
    lightness, chroma, hue = lch.unbind(-1)
    y = (lightness + 16) / 116
    f = torch.stack((y + chroma * hue.cos() / 500, y, y - chroma * hue.sin() / 200), -1)
    white = f.new_tensor([0.95047, 1.0, 1.08883])
    xyz = white * torch.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29))
    # IEC 61966-2-1
    matrix = f.new_tensor([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
    linear = (xyz @ matrix.T).clamp(0, 1)
    rgb = torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return (255 * rgb).round().to(torch.uint8)
