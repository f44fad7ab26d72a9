"""Linear depth heads: a linear map from the layers of an encoder to depth bins, and the expectation over the bins.

Three protocols are called "linear depth probe" and give different results; each is a set of options here:

- `lin1_dinov3`: last layer, a learned batch norm, no class token, no upsampling (dinov3@6876159:dinov3/eval/depth).
- `lin1_dinov2`: last layer, the class token concatenated to every patch, logits x4, no norm.
- `lin4_dinov2`: four layers, otherwise as `lin1_dinov2` (both dinov2@b8931f7:dinov2/hub/depth/decode_heads.py).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from pe_spatial.encoder.pyramid import ChannelLayerNorm
from pe_spatial.errors import ConfigError, one_of

SPACINGS = ("uniform", "log")
WEIGHTINGS = ("linear", "softmax", "sigmoid")
TOKENS = (None, "class", "mean")
NORMS = (None, "batch", "layer")


def bin_depths(bins: int, min_depth: float, max_depth: float, spacing: str) -> Tensor:
    """Return `bins` depths from `min_depth` to `max_depth`, both included, in even steps of depth or of its logarithm.

    DINOv2's own logarithmic bins use the limits as exponents of ten; these do not.
    """
    if spacing == "log":
        return torch.linspace(math.log(min_depth), math.log(max_depth), bins).exp()
    return torch.linspace(min_depth, max_depth, bins)


def expected_depth(logits: Tensor, depths: Tensor, weighting: str) -> Tensor:
    """(B, bins, h, w), (bins,) -> expected depth (B, 1, h, w), in float32 also under autocast.

    The weight of a bin is relu(logit) + 0.1 ('linear'), exp(logit) ('softmax') or sigmoid(logit) ('sigmoid'), divided
    by the sum of all.
    """
    with torch.autocast(logits.device.type, enabled=False):
        logits = logits.float()
        if weighting == "softmax":
            return torch.einsum("bnhw,n->bhw", logits.softmax(1), depths)[:, None]
        weights = logits.relu() + 0.1 if weighting == "linear" else logits.sigmoid()
        return (torch.einsum("bnhw,n->bhw", weights, depths) / weights.sum(1))[:, None]


class Level(nn.Module):
    """What a head reads of one layer: its normalized patches, joined with a token of the image.

    Args:
        channels: channels of the map.
        token: 'class' (the class token after the same layer), 'mean' (of the patches) or None.
        join: 'concat' appends the token to the channels of each patch, 'add' adds it.
        norm: norm of patches and class token: None, 'batch' or 'layer'. PE-Spatial has no final norm, and the scales of
            its layers differ.
    """

    def __init__(self, channels: int, *, token: str | None, join: str = "concat", norm: str | None) -> None:
        super().__init__()
        self.token = one_of("token", token, TOKENS)
        self.join = join
        self.out_channels = 2 * channels if token and join == "concat" else channels
        norms = {None: nn.Identity, "batch": nn.BatchNorm2d, "layer": ChannelLayerNorm}
        self.norm = norms[one_of("norm", norm, NORMS)](channels)

    def forward(self, patches: Tensor, class_token: Tensor | None) -> Tensor:
        """(B, C, h, w), (B, C) -> (B, out_channels, h, w)."""
        if self.token is None:
            return self.norm(patches)
        if self.token == "mean":
            patches = self.norm(patches)
            token = patches.mean((2, 3), keepdim=True)
        else:
            assert class_token is not None
            tokens = self.norm(torch.cat((class_token[..., None], patches.flatten(2)), 2)[..., None])  # (B, C, 1+hw, 1)
            token, patches = tokens[:, :, :1], tokens[:, :, 1:, 0].unflatten(2, patches.shape[-2:])
        return patches + token if self.join == "add" else torch.cat((patches, token.expand_as(patches)), 1)


@MODELS.register_module()
class BinsDepthHead(nn.Module):
    """A linear probe: a 1x1 convolution from one or several layers to depth bins; their expectation is the depth.

    The logits are upsampled, not the features as in the references: both steps are linear, so they commute, and this
    order takes a fraction of the memory. The caller resizes the depth.

    Args:
        in_channels: channels of the map of each layer. Maps of another size than the first are resized to it.
        bins: number of bins.
        min_depth, max_depth: the first and the last bin, in meters.
        spacing: spacing of the bins: 'uniform' or 'log' (even steps of the logarithm).
        weighting: weights of the bins: 'linear', 'softmax' or 'sigmoid', see `expected_depth`.
        token: token joined to every patch: 'class', 'mean' or None. PE-Spatial-G has no class token.
        norm: norm of each layer: 'batch', 'layer' or None.
        upsample: factor on the grid of the logits, bilinear.
    """

    depths: Tensor

    def __init__(
        self, in_channels: Sequence[int], *, bins: int = 256, min_depth: float = 1e-3, max_depth: float = 10.0,
        spacing: str = "uniform", weighting: str = "linear", token: str | None = None, norm: str | None = None,
        upsample: int = 1,
    ) -> None:  # fmt: skip
        super().__init__()
        check_depth_range(min_depth, max_depth)
        self.min_depth, self.max_depth = min_depth, max_depth
        self.weighting = one_of("weighting", weighting, WEIGHTINGS)
        self.token, self.upsample = token, upsample
        levels = [Level(channels, token=token, norm=norm) for channels in in_channels]
        self.levels = nn.ModuleList(levels)
        self.conv = nn.Conv2d(sum(level.out_channels for level in levels), bins, 1)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]
        depths = bin_depths(bins, min_depth, max_depth, one_of("spacing", spacing, SPACINGS))
        self.register_buffer("depths", depths, persistent=False)

    def forward(self, maps: Sequence[Tensor], class_tokens: Sequence[Tensor] = ()) -> Tensor:
        """Maps (B, C, h, w), for 'class' also class tokens (B, C) -> depth (B, 1, h * upsample, w * upsample)."""
        tokens: Sequence[Tensor | None] = class_tokens or [None] * len(maps)
        features = [level(x, token) for level, x, token in zip(self.levels, maps, tokens, strict=True)]
        size = features[0].shape[-2:]
        logits = self.conv(torch.cat([resize(x, size) for x in features], 1))
        return expected_depth(resize(logits, [self.upsample * side for side in size]), self.depths, self.weighting)


def check_depth_range(min_depth: float, max_depth: float) -> None:
    """Raise ConfigError unless 0 < min_depth < max_depth."""
    if not 0.0 < min_depth < max_depth:
        raise ConfigError(f"min_depth is {min_depth} and max_depth {max_depth}; 0 < min_depth < max_depth, meters")


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize (B, C, h, w) bilinearly, align_corners off, unless it has that size."""
    size = tuple(size)
    # the sizes of a program that is exported are symbols, which a comparison would fix
    same = all(type(side) is int for side in (*size, *x.shape[-2:])) and x.shape[-2:] == size
    return x if same else F.interpolate(x, size, mode="bilinear", align_corners=False)
