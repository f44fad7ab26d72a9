"""The shapes of PE-Core, one row per released model.

Source: facebookresearch/perception_models@3e352cc:core/vision_encoder/config.py (PE_VISION_CONFIG, PE_TEXT_CONFIG).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pe_spatial.encoder.variants import RELEASED_NAMES, VARIANTS, EncoderConfig, variant_key
from pe_spatial.errors import ConfigError, integer


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """The shape of a text tower.

    Args:
        context_length: the most tokens of a text, with those of its start and end.
        width: width of the tokens; a multiple of `num_heads`.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_ratio: hidden width of the MLP over `width`.
        vocab_size: number of tokens there are; the last one ends a text.
    """

    context_length: int
    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    vocab_size: int = 49408

    def __post_init__(self) -> None:
        for name in ("context_length", "width", "depth", "num_heads", "vocab_size"):
            integer(name, getattr(self, name))
        if self.width % self.num_heads:
            raise ValueError(f"the text tower's width {self.width} is not a multiple of num_heads {self.num_heads}")


@dataclass(frozen=True, kw_only=True)
class CoreConfig:
    """The shape of a PE-Core.

    Args:
        vision: the encoder of images, or its fields.
        text: the text tower, or its fields.
        output_dim: width of the common space.
        pool_heads: heads of the attention pooling.
    """

    vision: EncoderConfig
    text: TextConfig
    output_dim: int
    pool_heads: int = 8

    def __post_init__(self) -> None:
        for name, kind in (("vision", EncoderConfig), ("text", TextConfig)):
            value = getattr(self, name)
            object.__setattr__(self, name, kind(**value) if isinstance(value, Mapping) else value)
        if self.vision.embed_dim % self.pool_heads:
            raise ValueError(f"embed_dim {self.vision.embed_dim} is not a multiple of pool_heads {self.pool_heads}")

    def fields(self) -> dict[str, Any]:
        """Return plain values, from which `CoreConfig(**fields)` builds it again."""
        return asdict(self)


_S_TEXT = TextConfig(context_length=32, width=512, depth=12, num_heads=8)
_L_TEXT = TextConfig(context_length=32, width=1024, depth=24, num_heads=16)
_G_TEXT = TextConfig(context_length=72, width=1280, depth=24, num_heads=20)

CORES: dict[str, CoreConfig] = {
    name: CoreConfig(vision=VARIANTS[name], text=text, output_dim=text.width)
    for name, text in {
        "pe_core_t16_384": _S_TEXT,
        "pe_core_s16_384": _S_TEXT,
        "pe_core_b16_224": _L_TEXT,
        "pe_core_l14_336": _L_TEXT,
        "pe_core_g14_448": _G_TEXT,
    }.items()
}
"""Our name of a PE-Core -> its configuration."""

# PE paper, sections 4 and 5; perception_models issue 20
_NO_TEXT = {
    "spatial": "its training aligns it to an inner layer of PE-Core and to masks, and removes the layers that lead to "
    "the text space",
    "lang": "its training aligns it to a language model, and removes the layers that lead to the text space",
    "synthetic": "it was trained without texts",
}


def get_core_config(variant: str | CoreConfig | Mapping[str, Any]) -> CoreConfig:
    """Return the configuration of a PE-Core's name (ours or the released one), a mapping of fields, or itself.

    Raises ConfigError for an encoder without a text space: the reason, and which PE-Core to use.
    """
    if isinstance(variant, CoreConfig):
        return variant
    if isinstance(variant, Mapping):
        return CoreConfig(**variant)
    key = core_key(variant)
    return CORES[key]


def core_key(name: str) -> str:
    """Return our name of a PE-Core given by ours or by the released one; ConfigError for any other encoder."""
    try:
        key = variant_key(name)
    except ValueError:
        allowed = ", ".join(RELEASED_NAMES[core] for core in CORES)
        raise ConfigError(f"unknown PE-Core {name!r}; allowed are {allowed}, also in lower case with _") from None
    if key in CORES:
        return key
    _, kind, size = key.split("_", 2)
    core = next((core for core in CORES if core.split("_")[2] == size.split("_")[0]), "pe_core_b16_224")
    raise ConfigError(f"{RELEASED_NAMES.get(key, key)} has no text space: {_NO_TEXT[kind]}. Use {RELEASED_NAMES[core]}")
