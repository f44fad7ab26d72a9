"""One row per released checkpoint, one for the encoder that ships with this package, and the fine-tuning recipe.

Source of the released rows: facebookresearch/perception_models@3e352cc:core/vision_encoder/config.py.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, NamedTuple

from pe_spatial.errors import integer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The shape of a Perception Encoder.

    Args:
        img_size: side of the pretraining images, in pixels; any other input size may be used later.
        patch_size: side of a patch, in pixels.
        embed_dim: width of the tokens; a multiple of `4 * num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `embed_dim`.
        in_chans: channels of the input images.
        class_token: whether token 0 is a learned class token.
        init_values: initial value of LayerScale; None means that the blocks have none.
        mean: mean of R, G and B, in 0 to 255, by which the input is normalized.
        std: standard deviation of R, G and B, likewise.
    """

    img_size: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    in_chans: int = 3
    class_token: bool = True
    init_values: float | None = None
    # perception_models@3e352cc:core/vision_encoder/transforms.py
    mean: tuple[float, float, float] = field(default=(127.5, 127.5, 127.5), repr=False)
    std: tuple[float, float, float] = field(default=(127.5, 127.5, 127.5), repr=False)

    def __post_init__(self) -> None:
        for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "in_chans"):
            object.__setattr__(self, name, integer(name, getattr(self, name)))
        for name in ("mean", "std"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # configs give lists, which have no hash
            if len(getattr(self, name)) != 3:
                raise ValueError(f"{name} is {getattr(self, name)}; give three numbers, for R, G and B in 0 to 255")
        if self.embed_dim % (4 * self.num_heads):
            raise ValueError(
                f"embed_dim {self.embed_dim} over num_heads {self.num_heads} must give a head dimension that is a "
                "multiple of 4, because rotary positions turn pairs of it on each of two axes"
            )
        if self.img_size < self.patch_size:
            raise ValueError(f"img_size {self.img_size} is smaller than patch_size {self.patch_size}")

    @property
    def grid_size(self) -> int:
        """Side of the grid of learned positions, in tokens."""
        return self.img_size // self.patch_size


_T = EncoderConfig(img_size=384, patch_size=16, embed_dim=192, depth=12, num_heads=3)
_S = EncoderConfig(img_size=384, patch_size=16, embed_dim=384, depth=12, num_heads=6)
_B = EncoderConfig(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12)
_L = EncoderConfig(img_size=336, patch_size=14, embed_dim=1024, depth=24, num_heads=16)
_G = EncoderConfig(
    img_size=448, patch_size=14, embed_dim=1536, depth=50, num_heads=16, mlp_ratio=8960 / 1536, class_token=False
)

_RELEASED: dict[str, EncoderConfig] = {
    "PE-Spatial-T16-512": replace(_T, img_size=512),
    "PE-Spatial-S16-512": replace(_S, img_size=512),
    "PE-Spatial-B16-512": replace(_B, img_size=512),
    "PE-Spatial-L14-448": replace(_L, img_size=448),
    "PE-Spatial-G14-448": replace(_G, init_values=0.1),
    "PE-Core-T16-384": _T,
    "PE-Core-S16-384": _S,
    "PE-Core-B16-224": _B,
    "PE-Core-L14-336": _L,
    "PE-Core-G14-448": _G,
    "PE-Lang-L14-448": replace(_L, img_size=448, depth=23, init_values=0.1),
    "PE-Lang-G14-448": replace(_G, depth=47, init_values=0.1),
    "PE-Lang-L14-448-Tiling": replace(_L, img_size=448, depth=23, init_values=0.1),
    "PE-Lang-G14-448-Tiling": replace(_G, depth=47, init_values=0.1),
}

RELEASED_NAMES: dict[str, str] = {name.lower().replace("-", "_"): name for name in _RELEASED}
"""Our name of a variant -> the released one, for instance 'pe_spatial_b16_512' -> 'PE-Spatial-B16-512'."""

VARIANTS: dict[str, EncoderConfig] = {ours: _RELEASED[released] for ours, released in RELEASED_NAMES.items()}
"""Our name of a variant -> its configuration. 'pe_spatial_b16_512' and the like."""

DEMO_VARIANTS: dict[str, EncoderConfig] = {
    "pe_synthetic_xs8_192": EncoderConfig(img_size=192, patch_size=8, embed_dim=192, depth=5, num_heads=3),
}
"""For demonstrations and tests without a network; not released by Meta. The weights ship in the package."""


def variant_key(name: str) -> str:
    """Return our name of a variant given by ours or by the released one; ValueError lists the allowed ones."""
    key = name.lower().replace("-", "_")
    if key not in VARIANTS and key not in DEMO_VARIANTS:
        raise ValueError(
            f"unknown variant {name!r}; allowed are {', '.join(VARIANTS)}, also by their released names, "
            f"and {', '.join(DEMO_VARIANTS)} (a demonstration)"
        )
    return key


def get_config(variant: str | EncoderConfig | Mapping[str, Any]) -> EncoderConfig:
    """Return the configuration of a variant's name (ours or the released one), a mapping of fields, or itself."""
    if isinstance(variant, EncoderConfig):
        return variant
    if isinstance(variant, Mapping):
        return EncoderConfig(**variant)
    return (VARIANTS | DEMO_VARIANTS)[variant_key(variant)]


class ViTDetRecipe(NamedTuple):
    """What the published ViTDet fine-tuning sets by the depth of the encoder."""

    global_attn_indexes: tuple[int, ...]  # blocks that keep global attention
    drop_path_rate: float
    layer_decay_rate: float


VITDET_RECIPES: dict[int, ViTDetRecipe] = {
    12: ViTDetRecipe((2, 5, 8, 11), 0.1, 0.7),  # detectron2@02b5c4e:projects/ViTDet (ViT-B)
    24: ViTDetRecipe((5, 11, 17, 23), 0.4, 0.8),  # PE paper, Tab. 24
    50: ViTDetRecipe((12, 24, 36, 49), 0.5, 0.9),  # PE paper, Tab. 24
}
"""Depth -> recipe. Only these depths were published."""


def quarters(depth: int) -> list[int]:
    """Return the last blocks of four equal parts of an encoder; fewer below four blocks."""
    return sorted({depth * (k + 1) // 4 - 1 for k in range(4)} - {-1})


def nearest_recipe(depth: int) -> tuple[ViTDetRecipe, str]:
    """Return a recipe for `depth` blocks, and a note that says what was assumed, which is empty for a published one."""
    if depth in VITDET_RECIPES:
        return VITDET_RECIPES[depth], ""
    nearest = min(VITDET_RECIPES, key=lambda published: abs(published - depth))
    recipe = VITDET_RECIPES[nearest]._replace(global_attn_indexes=tuple(quarters(depth)))
    return recipe, (
        f"no ViTDet recipe is published for {depth} blocks: blocks {list(recipe.global_attn_indexes)} get global "
        f"attention (with geometry 'vitdet'), and drop path and layer decay are those of {nearest} blocks: "
        f"{recipe.drop_path_rate} and {recipe.layer_decay_rate}"
    )


@cache
def vitdet_recipe(depth: int) -> ViTDetRecipe:
    """Return the recipe of `nearest_recipe`, and log its note once."""
    recipe, note = nearest_recipe(depth)
    if note:
        _log.warning(note)
    return recipe


DETECTOR_PIXELS = 127.0
"""Mean and standard deviation of the pixels in the published ViTDet fine-tuning: unlike `EncoderConfig.mean` and `std`.

Source: perception_models@3e352cc:apps/detection/detectron2_pe, the configs.
"""


def recipe_rate(name: str, rate: float | str, depth: int) -> float:
    """Return `rate`, or for 'vitdet' the `name` of the recipe for an encoder of `depth` blocks (see `vitdet_recipe`).

    Raises ValueError for another text.
    """
    if not isinstance(rate, str):
        return float(rate)
    if rate != "vitdet":
        raise ValueError(f"{name} is {rate!r}; allowed are a number and 'vitdet'")
    return float(getattr(vitdet_recipe(depth), name))
