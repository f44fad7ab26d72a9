"""Encoder and pyramid in one: the backbone that every framework registers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.errors import ConfigError, one_of

from .pyramid import DETAFeaturePyramid, FusedFeaturePyramid, PlainFeaturePyramid, SimpleFeaturePyramid, as_float32
from .recompute import check_micro_batch, run_in_micro_batches
from .variants import EncoderConfig
from .vit import PerceptionEncoder

ADAPTERS: dict[str, type[nn.Module]] = {
    "simple": SimpleFeaturePyramid,
    "fused": FusedFeaturePyramid,
    "single": PlainFeaturePyramid,
    "deta": DETAFeaturePyramid,
}
_OF_ONE_MAP = ("simple", "deta")


class PerceptionEncoderPyramid(nn.Module):
    """Encoder and pyramid in one: levels with the strides and channels of the backbone that it replaces.

    All widths follow from the variant.

    Args:
        variant: as in `PerceptionEncoder`.
        pyramid: options of the adapter.
        adapter: 'simple' (`SimpleFeaturePyramid`), 'fused' (`FusedFeaturePyramid`), 'single' (`PlainFeaturePyramid`) or
            'deta' (`DETAFeaturePyramid`); None takes the first for one block in `out_indices` and the second for
            several.
        any_size: accept images of any size: zeros at the right and at the bottom fill them up to complete cells of the
            coarsest level, and every level is cut to ceil(H / stride), as convolutional backbones return it.
        renormalize: `dict(mean=, std=, bgr=, to_mean=, to_std=)`: the statistics that the images were normalized with,
            whether their channels are B, G, R, and the statistics that this encoder expects, in R, G, B. For models in
            which another part, for instance a teacher, reads the same images.
        eval_level: in evaluation return only this level, as real-time segmentation backbones do.
        micro_batch: as in `PerceptionEncoder`, for encoder and adapter together.
        options: those of `PerceptionEncoder`.

    Raises ConfigError if the adapter is unknown or does not take the number of maps that `out_indices` asks for.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        pyramid: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        any_size: bool = False,
        renormalize: Mapping[str, Any] | None = None,
        eval_level: int | None = None,
        micro_batch: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.encoder = self.build_encoder(variant, **options)
        kinds = self.encoder.grad_checkpointing.values() if isinstance(self.encoder, PerceptionEncoder) else ()
        self.micro_batch = check_micro_batch(micro_batch, kinds)
        maps = len(self.encoder.out_indices)
        adapter = adapter or ("simple" if maps == 1 else "fused")
        one_of("adapter", adapter, tuple(ADAPTERS))
        if adapter in _OF_ONE_MAP and maps > 1:
            raise ConfigError(
                f"adapter {adapter!r} reads one layer but out_indices names {maps}; use 'fused' or 'single'"
            )
        width: int = self.encoder.embed_dim
        self.pyramid = ADAPTERS[adapter](
            width if adapter in _OF_ONE_MAP else [width] * maps,
            **{"in_stride": self.encoder.patch_size, **(pyramid or {})},
        )
        levels: Any = self.pyramid.pyramid if isinstance(self.pyramid, FusedFeaturePyramid) else self.pyramid
        self.strides: tuple[int, ...] = levels.strides
        self.out_channels: tuple[int, ...] = levels.out_channels
        self.any_size = any_size
        self.eval_level = eval_level
        self._renormalize = renormalize is not None
        if renormalize is not None:
            scale, shift = _affine(**renormalize)
            self._bgr = bool(renormalize["bgr"])
            self.register_buffer("_scale", scale, persistent=False)
            self.register_buffer("_shift", shift, persistent=False)

    def build_encoder(self, variant: str | EncoderConfig | Mapping[str, Any], **options: Any) -> Any:
        """Return the encoder; a subclass may return another one with the attributes of `PerceptionEncoder`."""
        return PerceptionEncoder(variant, **options)

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """(B, 3, H, W), normalized -> one map (B, C, H / stride, W / stride) for each stride, float32, contiguous."""
        levels = run_in_micro_batches(self._levels, images, self.micro_batch)
        return levels if self.training or self.eval_level is None else levels[self.eval_level]

    def _levels(self, images: Tensor) -> tuple[Tensor, ...]:
        images = self.normalize(images)
        h, w = images.shape[-2:]
        if self.any_size:
            cell = math.lcm(self.encoder.patch_size, *self.strides)
            images = F.pad(images, (0, (cell - w % cell) % cell, 0, (cell - h % cell) % cell))
        levels = as_float32(self.pyramid(self.encoder(images)))
        if self.any_size:  # without negative numbers, which ONNX divides towards zero
            sides = [((h + s - 1) // s, (w + s - 1) // s) for s in self.strides]
            levels = tuple(_cut(x, *side) for x, side in zip(levels, sides, strict=True))
        return levels

    def normalize(self, images: Tensor) -> Tensor:
        """Bring `images` (B, 3, H, W) to the encoder's own normalization, if they came with another."""
        if not self._renormalize:
            return images
        return (images.flip(1) if self._bgr else images) * self._scale + self._shift


def _cut(level: Tensor, h: int, w: int) -> Tensor:
    level = level[..., :h, :w]
    return level.contiguous() if any(level.stride()) else level


def _affine(
    *, mean: Sequence[float], std: Sequence[float], bgr: bool, to_mean: Sequence[float], to_std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), (3, 1, 1) each and in R, G, B, from one normalization to another."""
    values = [torch.tensor(list(v), dtype=torch.float32)[:, None, None] for v in (mean, std, to_mean, to_std)]
    if bgr:
        values[:2] = [v.flip(0) for v in values[:2]]
    return values[1] / values[3], (values[0] - values[2]) / values[3]
