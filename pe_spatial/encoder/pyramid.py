"""From the encoder's single-scale maps to the pyramid that detection and segmentation heads expect."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.errors import integer


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of each pixel of (B, C, H, W)."""

    def __init__(self, num_features: int, eps: float = 1e-6) -> None:
        super().__init__(num_features, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _resample(channels: int, scale: float) -> tuple[list[nn.Module], int]:
    """Return the layers that change the resolution by `scale` (a power of two) and the channels that they leave."""
    layers: list[nn.Module] = []
    if scale < 1:
        factor = round(1 / scale)
        return [nn.MaxPool2d(factor, factor)], channels
    for step in range(round(math.log2(scale))):
        if step:
            layers += [ChannelLayerNorm(channels), nn.GELU()]
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, stride=2))
        channels //= 2
    return layers, channels


class _Pyramid(nn.Module):
    """Levels at `strides`, of which the `unused` ones have no parameters and are views of one zero."""

    def __init__(
        self, out_channels: int | Sequence[int], strides: Sequence[int], in_stride: int, unused: Sequence[int]
    ) -> None:
        super().__init__()
        self.strides, self.in_stride, self.unused = tuple(strides), in_stride, tuple(unused)
        several = isinstance(out_channels, Iterable) and not isinstance(out_channels, str)
        channels = out_channels if several else (out_channels,) * len(strides)
        self.out_channels = tuple(integer("out_channels", number) for number in channels)  # type: ignore[union-attr]
        self.levels = nn.ModuleList()
        if len(self.out_channels) != len(strides):
            raise ValueError(f"out_channels {self.out_channels} and strides {self.strides} differ in length")
        if any(s <= 0 or not math.log2(s / in_stride).is_integer() for s in strides):
            raise ValueError(
                f"strides {self.strides} must be in_stride {in_stride} times powers of two; "
                "an encoder of patch 14 is brought to 16 with patch_size=16"
            )
        if any(not 0 <= i < len(strides) for i in unused) or len(set(unused)) == len(strides):
            raise ValueError(f"unused is {self.unused}; places 0 to {len(strides) - 1} are allowed, not all of them")

    def _zeros(self, i: int, like: Tensor) -> Tensor:
        h, w = (side * self.in_stride // self.strides[i] for side in like.shape[-2:])
        return like.new_zeros(()).expand(like.shape[0], self.out_channels[i], h, w)


class SimpleFeaturePyramid(_Pyramid):
    """ViTDet's pyramid: every level from the last map alone, by deconvolution or pooling.

    Equal to detectron2@02b5c4e:detectron2/modeling/backbone/vit.py (`SimpleFeaturePyramid`) with norm 'LN' and
    `LastLevelMaxPool`: a level coarser than `2 * in_stride` is the stride-2 subsampling of the level before it, where
    that has half its stride and the same channels.

    Args:
        in_channels: channels of the map.
        out_channels: channels of every level, or one number for each of `strides`.
        strides: strides of the levels, in pixels: `in_stride` times powers of two, in any order, repeated or not.
        in_stride: stride of the map: the encoder's patch size, in pixels.
        unused: places in `strides` of levels that nobody reads. They have no parameters and are views of one zero.
        hidden_channels: largest width of the 3x3 convolutions; a level with more channels gets them by another 1x1
            convolution with a norm, at a fraction of the cost. None is ViTDet's: as wide as the level.
    """

    def __init__(
        self,
        in_channels: int,
        *,
        out_channels: int | Sequence[int] = 256,
        strides: Sequence[int] = (4, 8, 16, 32, 64),
        in_stride: int = 16,
        unused: Sequence[int] = (),
        hidden_channels: int | None = None,
    ) -> None:
        super().__init__(out_channels, strides, in_stride, unused)
        before = (0, 0)
        for i, (stride, channels) in enumerate(zip(self.strides, self.out_channels, strict=True)):
            if i in self.unused:
                before = (0, 0)
                self.levels.append(nn.Identity())
                continue
            follows = before == (stride // 2, channels)
            before = (stride, channels)
            if stride > 2 * in_stride and follows:  # LastLevelMaxPool
                self.levels.append(nn.MaxPool2d(1, stride=2))
                continue
            layers, width = _resample(in_channels, in_stride / stride)
            hidden = min(channels, hidden_channels or channels)
            layers += [
                nn.Conv2d(width, hidden, 1, bias=False),
                ChannelLayerNorm(hidden),
                nn.Conv2d(hidden, hidden, 3, padding=1, bias=False),
                ChannelLayerNorm(hidden),
            ]
            if hidden < channels:
                layers += [nn.Conv2d(hidden, channels, 1, bias=False), ChannelLayerNorm(channels)]
            self.levels.append(nn.Sequential(*layers))

    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, C, h, w), or a sequence of just that, -> one map for each of `strides`."""
        maps = _only_map(maps, "SimpleFeaturePyramid")
        levels: list[Tensor] = []
        for i, level in enumerate(self.levels):
            if i in self.unused:
                levels.append(self._zeros(i, maps))
            else:
                levels.append(level(levels[-1] if isinstance(level, nn.MaxPool2d) else maps))
        return tuple(levels)


class FusedFeaturePyramid(nn.Module):
    """A pyramid on several intermediate layers, above all for frozen encoders.

    PE's best features lie at different depths for different tasks, so a frozen encoder should offer more than its last
    block. Every map is normalized (residual streams grow with depth), brought to one width by its own 1x1 convolution,
    and their sum, through a GELU, feeds a `SimpleFeaturePyramid`.

    Args:
        in_channels: channels of each map, one entry for each of the encoder's `out_indices`.
        options: the other options of `SimpleFeaturePyramid`.
    """

    def __init__(self, in_channels: Sequence[int], **options: Any) -> None:
        super().__init__()
        width = in_channels[-1]
        self.norms = nn.ModuleList(ChannelLayerNorm(channels) for channels in in_channels)
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.pyramid = SimpleFeaturePyramid(width, **options)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """A sequence of (B, C_i, h, w), all of one size, -> one map for each of `strides`."""
        if len(maps) != len(self.lateral):
            raise ValueError(f"got {len(maps)} maps for in_channels of {len(self.lateral)}; out_indices must match it")
        each = [lateral(norm(x)) for lateral, norm, x in zip(self.lateral, self.norms, maps, strict=True)]
        return tuple(self.pyramid(F.gelu(torch.stack(each).sum(0))))


class PlainFeaturePyramid(_Pyramid):
    """The cheapest pyramid: each level is one map, resampled without parameters, and a 1x1 convolution with a norm.

    The levels may come from different layers: shallow ones for fine levels, as segmentation on ViTs usually has it.

    Args:
        in_channels: channels of each map; one map for all levels, or one for each of `strides`.
        out_channels: as in `SimpleFeaturePyramid`.
        strides: as in `SimpleFeaturePyramid`.
        in_stride: as in `SimpleFeaturePyramid`.
        unused: as in `SimpleFeaturePyramid`.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        *,
        out_channels: int | Sequence[int] = 256,
        strides: Sequence[int] = (4, 8, 16, 32),
        in_stride: int = 16,
        unused: Sequence[int] = (),
    ) -> None:
        super().__init__(out_channels, strides, in_stride, unused)
        if len(in_channels) not in (1, len(strides)):
            raise ValueError(f"{len(in_channels)} maps for {len(strides)} levels; give one map, or one for each level")
        widths = tuple(in_channels) * (1 if len(in_channels) == len(strides) else len(strides))
        self.maps = len(in_channels)
        for i, (stride, width, channels) in enumerate(zip(self.strides, widths, self.out_channels, strict=True)):
            if i in self.unused:
                self.levels.append(nn.Identity())
                continue
            scale = in_stride / stride
            resample = nn.Upsample(scale_factor=scale, mode="bilinear") if scale > 1 else nn.MaxPool2d(round(1 / scale))
            project = nn.Conv2d(width, channels, 1, bias=False)
            self.levels.append(nn.Sequential(resample, project, ChannelLayerNorm(channels)))

    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One (B, C, h, w), or one for each level, -> one map for each of `strides`."""
        maps = [maps] if isinstance(maps, Tensor) else maps
        if len(maps) != self.maps:
            raise ValueError(f"got {len(maps)} maps for in_channels of {self.maps}; out_indices must match it")
        each = list(maps) if self.maps > 1 else [maps[0]] * len(self.levels)
        return tuple(
            self._zeros(i, x) if i in self.unused else level(x)
            for i, (level, x) in enumerate(zip(self.levels, each, strict=True))
        )


class DETAFeaturePyramid(nn.Module):
    """The released DETA's pyramid: the map itself between a deconvolution and a pooling, without any norm.

    Equal to perception_models@3e352cc:apps/detection/DETA_pe/models/pev1.py (`PEv1_simpleFPN`); a 1x1 convolution and a
    norm for each level, and the levels coarser than these, are the neck's.

    Args:
        in_channels: channels of the map.
        in_stride: stride of the map: the encoder's patch size, in pixels. The levels have half of it, it and twice it;
            the first has half the channels of the map, the others have all.
    """

    def __init__(self, in_channels: int, *, in_stride: int = 16) -> None:
        super().__init__()
        self.strides = (in_stride // 2, in_stride, 2 * in_stride)
        self.out_channels = (in_channels // 2, in_channels, in_channels)
        deconvolution = nn.ConvTranspose2d(in_channels, in_channels // 2, 2, stride=2)
        self.levels = nn.ModuleList([deconvolution, nn.Identity(), nn.MaxPool2d(2)])

    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """(B, C, h, w), or a sequence of just that, -> one map for each of `strides`."""
        x = _only_map(maps, "DETAFeaturePyramid")
        return tuple(level(x) for level in self.levels)


def as_float32(levels: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Bring levels (B, C, h, w) to float32 and a contiguous layout; unused levels stay views of one zero.

    Under bfloat16 autocast torch's layer norm returns float32 on CUDA but bfloat16 on CPU, and RoI extractors cast the
    boxes to the dtype of the levels: in bfloat16 a coordinate near 1000 moves by up to 4 pixels. And each of several
    RoIAlign calls would copy the channels-last levels that the norms return to contiguous ones again.
    """
    return tuple(
        level.to(torch.float32, memory_format=torch.contiguous_format) if any(level.stride()) else level.float()
        for level in levels
    )


def _only_map(maps: Tensor | Sequence[Tensor], name: str) -> Tensor:
    if isinstance(maps, Tensor):
        return maps
    if len(maps) != 1:
        raise ValueError(
            f"{name} takes one map but got {len(maps)}; ask the encoder for one of out_indices, "
            "or use FusedFeaturePyramid for several"
        )
    return maps[0]
