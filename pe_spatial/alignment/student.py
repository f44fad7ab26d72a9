"""What spatial alignment changes in the encoder that it trains: LayerScale, and masked patches."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pe_spatial.encoder.variants import get_config
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.integrations.openmmlab import Backbone, build_encoder
from pe_spatial.integrations.timm import TimmEncoder


@dataclass(frozen=True, kw_only=True)
class Masking:
    """Which patches the student does not see.

    Args:
        ratio: part of the blocks that are masked; 0 for none. The paper has 0.75.
        block: side of a block in patches. The paper has 2.
        fill: what replaces a masked patch. 'gray' is the mean color of the encoder's pixels; its embedding is zero, so
            that the position remains. 'token' is a learned embedding, dropped after the training. The paper does not
            say; it adds no parameters but LayerScale, which excludes 'token'.
    """

    ratio: float = 0.75
    block: int = 2
    fill: str = "gray"

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1 or self.block < 1:
            raise ConfigError(
                f"masking has ratio={self.ratio} and block={self.block}; ratio is at least 0 and below 1, block a "
                "number of patches"
            )
        one_of("masking.fill", self.fill, ["gray", "token"])

    def draw(self, batch: int, grid: tuple[int, int], device: torch.device) -> Tensor:
        """Return which patches (B, h, w) are masked; every image has the same number of masked blocks."""
        rows, columns = (math.ceil(side / self.block) for side in grid)
        order = torch.rand(batch, rows * columns, device=device).argsort(1).argsort(1)
        blocks = (order < round(self.ratio * rows * columns)).unflatten(1, (rows, columns))
        return blocks.repeat_interleave(self.block, 1).repeat_interleave(self.block, 2)[:, : grid[0], : grid[1]]


def fill_gray(images: Tensor, masked: Tensor, patch_size: int) -> Tensor:
    """Return normalized images (B, 3, H, W) whose `masked` patches (B, h, w) are the mean color, zero."""
    pixels = masked.repeat_interleave(patch_size, 1).repeat_interleave(patch_size, 2)
    return images.masked_fill(pixels[:, None], 0.0)


def build_student(backbone: Mapping[str, Any], layer_scale: float | None) -> Backbone | TimmEncoder:
    """Build the encoder to train; `layer_scale` is the initial value of LayerScale if it gets one.

    Raises ConfigError where LayerScale cannot be added.
    """
    options = {key: value for key, value in backbone.items() if key != "type"}
    if layer_scale is None:
        return build_encoder(**options)
    variant = options.pop("variant")
    if isinstance(variant, str) and variant.startswith("timm:"):
        raise ConfigError(f"layer_scale is {layer_scale}, but {variant} is timm's; set layer_scale=None")
    config = get_config(variant)
    if config.init_values is not None or options.get("lora"):
        why = "trains adapters alone" if options.get("lora") else "has LayerScale already"
        raise ConfigError(f"layer_scale is {layer_scale}, but the student {why}; set layer_scale=None")
    if not layer_scale > 0:
        raise ConfigError(f"layer_scale is {layer_scale}; it must be above 0, or None")
    return Backbone(replace(config, init_values=layer_scale), **{**options, "init_cfg": None})


@torch.no_grad()
def start_with_layer_scale(student: Backbone, backbone: Mapping[str, Any], *, exact: bool) -> None:
    """Load the weights of an encoder without LayerScale, which `backbone` describes, into `student`, which has it.

    Args:
        exact: divide the two layers before each LayerScale by it, so that the student starts as exactly the function
            that its weights were; otherwise they are taken as they are, and every block starts weaker.
    """
    plain = build_encoder(**{key: value for key, value in backbone.items() if key != "type"})
    plain.init_weights()
    gammas = {name: x for name, x in student.state_dict().items() if name.rpartition(".")[2].startswith("gamma_")}
    student.load_state_dict({**plain.state_dict(), **gammas})
    blocks: Any = student.blocks if exact else ()
    for block in blocks:
        for gamma, layer in ((block.gamma_1, block.attn.proj), (block.gamma_2, block.mlp.fc2)):
            layer.weight.div_(gamma[:, None])
            layer.bias.div_(gamma)
