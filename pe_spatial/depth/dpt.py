"""The DPT head for depth: four maps of a plain vision transformer, resized to four scales and fused.

Reference: dinov2@b8931f7:dinov2/hub/depth/decode_heads.py (DPTHead). The 1x1 convolution of a fusion comes before the
upsampling, which gives the same result at a quarter of the cost; levels can have norms as in dinov3@6876159.
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pe_spatial.errors import ConfigError, one_of

from .heads import SPACINGS, WEIGHTINGS, Level, bin_depths, check_depth_range, expected_depth, resize


class Reassemble(nn.Module):
    """Bring one layer's map to one scale of the pyramid: `scale`, the factor on the grid, is 4, 2, 1 or 0.5."""

    def __init__(
        self, channels: int, out_channels: int, *, scale: float, readout: str, token: str | None, norm: str | None
    ) -> None:
        super().__init__()
        self.level = Level(channels, token=token, join="add" if readout == "add" else "concat", norm=norm)
        self.readout: nn.Module = nn.Identity()
        if readout == "project":
            self.readout = nn.Sequential(nn.Conv2d(self.level.out_channels, channels, 1), nn.GELU())
        self.project = nn.Conv2d(channels, out_channels, 1)
        self.resize: nn.Module = nn.Identity()
        if one_of("the scale of a DPT level", scale, (4, 2, 1, 0.5)) == 0.5:
            self.resize = nn.Conv2d(out_channels, out_channels, 3, stride=2, padding=1)
        elif scale > 1:
            self.resize = nn.ConvTranspose2d(out_channels, out_channels, int(scale), stride=int(scale))

    def forward(self, patches: Tensor, class_token: Tensor | None) -> Tensor:
        """(B, C, h, w), (B, C) -> (B, out, h * scale, w * scale), rounded up."""
        return self.resize(self.project(self.readout(self.level(patches, class_token))))


class ResidualUnit(nn.Module):
    """Two 3x3 convolutions, each after a ReLU, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Fusion(nn.Module):
    """Add a level to the running map and double its resolution; the deepest level starts the map."""

    def __init__(self, channels: int, *, deepest: bool) -> None:
        super().__init__()
        if not deepest:
            self.level_unit = ResidualUnit(channels)
        self.unit = ResidualUnit(channels)
        self.project = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor | None, level: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 * h, 2 * w); the level is resized to (h, w), which odd grids need."""
        x = level if x is None else x + self.level_unit(resize(level, x.shape[-2:]))
        return double(self.project(self.unit(x)))


def double(x: Tensor) -> Tensor:
    """Upsample (B, C, h, w) by two, bilinearly, corners aligned."""
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)


@MODELS.register_module()
class DPTDepthHead(nn.Module):
    """DPT: four layers at strides p / 4, p / 2, p and 2 p of a patch p, fused from the deepest up, then depth.

    The output has 32 times the grid of the deepest map, more than the image at odd grids; the caller resizes it.

    Args:
        in_channels: channels of each map of the encoder.
        in_index: index of the map for each of the four levels, finest first; [0, 0, 0, 0] reads one layer four times.
        channels: channels of the fusion; None: a quarter of the width of the deepest map.
        level_channels: channels of the four levels before it; None: 1/8, 1/4, 1/2 and all of that width.
        scales: factor on the grid of each level; all 1 for a hierarchical backbone, which has these scales already.
        readout: use of the image's token: 'ignore', 'add' to each patch, or 'project' (concatenate, linear, GELU).
        token: the image's token: 'class' or 'mean'; None for 'ignore'. PE-Spatial-G has no class token.
        norm: norm on each level: 'batch', 'layer' or None.
        min_depth, max_depth: range in meters.
        bins: None regresses relu(x) + min_depth; a number: expectation over that many bins, at half the resolution.
        spacing, weighting: those of the bins, as in `BinsDepthHead`.
        init_depth: initial prediction of the regression in meters; it could not leave the flat side of the relu.
        grad_checkpointing: recompute the fusions in the backward pass; the two finest dominate the memory.
    """

    depths: Tensor | None

    def __init__(  # noqa: PLR0913  (one option for each decision in which published heads differ)
        self, in_channels: Sequence[int], *, in_index: Sequence[int] = (0, 1, 2, 3), channels: int | None = None,
        level_channels: Sequence[int] | None = None, scales: Sequence[float] = (4, 2, 1, 0.5),
        readout: str = "ignore", token: str | None = None, norm: str | None = None, min_depth: float = 1e-3,
        max_depth: float = 10.0, bins: int | None = None, spacing: str = "uniform", weighting: str = "linear",
        init_depth: float = 2.5, grad_checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_depth_range(min_depth, max_depth)
        one_of("readout", readout, ("ignore", "add", "project"))
        if (token is None) != (readout == "ignore"):
            raise ConfigError(
                f"readout is {readout!r} and token {token!r}; 'ignore' reads no token, the others 'class' or 'mean'"
            )
        if len(in_index) != 4 or not all(0 <= i < len(in_channels) for i in in_index):
            raise ConfigError(
                f"in_index is {list(in_index)} but the encoder gives {len(in_channels)} maps; give four indices, such "
                "as [0, 0, 0, 0] for one layer, or set four layers in out_indices"
            )
        self.in_index = tuple(in_index)
        self.min_depth, self.max_depth = min_depth, max_depth
        self.token = token
        self.weighting = one_of("weighting", weighting, WEIGHTINGS)
        self.grad_checkpointing = grad_checkpointing
        width = in_channels[in_index[-1]]
        channels = channels or width // 4
        level_channels = level_channels or [width // 8, width // 4, width // 2, width]
        self.reassemble = nn.ModuleList(
            Reassemble(in_channels[i], out, scale=scale, readout=readout, token=token, norm=norm)
            for i, out, scale in zip(in_index, level_channels, scales, strict=True)
        )
        self.convs = nn.ModuleList(nn.Conv2d(c, channels, 3, padding=1, bias=False) for c in level_channels)
        self.fusions = nn.ModuleList(Fusion(channels, deepest=i == 3) for i in range(4))
        self.project = nn.Conv2d(channels, channels, 3, padding=1)
        self.narrow = nn.Conv2d(channels, channels // 2, 3, padding=1)
        self.hidden = nn.Conv2d(channels // 2, 32, 3, padding=1)
        self.out = nn.Conv2d(32, bins or 1, 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.constant_(self.out.bias, 0.0 if bins else init_depth - min_depth)  # type: ignore[arg-type]
        one_of("spacing", spacing, SPACINGS)
        depths = bin_depths(bins, min_depth, max_depth, spacing) if bins else None
        self.register_buffer("depths", depths, persistent=False)

    def forward(self, maps: Sequence[Tensor], class_tokens: Sequence[Tensor] = ()) -> Tensor:
        """Maps (B, C, h, w), with token 'class' also class tokens (B, C) -> depth (B, 1, H, W) in meters."""
        tokens: Sequence[Tensor | None] = class_tokens or [None] * len(maps)
        levels = [reassemble(maps[i], tokens[i]) for i, reassemble in zip(self.in_index, self.reassemble, strict=True)]
        x = self.narrow(F.relu(self.project(self._fuse(levels))))
        if self.depths is not None:
            return expected_depth(self.out(F.relu(self.hidden(x))), self.depths, self.weighting)
        return F.relu(self.out(F.relu(self.hidden(double(x)))).float()) + self.min_depth

    def _fuse(self, levels: Sequence[Tensor]) -> Tensor:
        x: Any = None
        for level, conv, fusion in list(zip(levels, self.convs, self.fusions, strict=True))[::-1]:
            recompute = self.grad_checkpointing and self.training
            x = checkpoint(fusion, x, conv(level), use_reentrant=False) if recompute else fusion(x, conv(level))
        return x
