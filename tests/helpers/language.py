"""PE-Cores that are small enough for any test."""

from dataclasses import replace
from typing import Any

import torch

from pe_spatial.encoder.variants import EncoderConfig
from pe_spatial.language.model import PECore
from pe_spatial.language.variants import CoreConfig, TextConfig


def core_of(facts: dict[str, Any]) -> CoreConfig:
    """Return the configuration of a `clip_<case>.json` of tests/golden."""
    vision, text = facts["vision"], facts["text"]
    return CoreConfig(
        vision=EncoderConfig(
            img_size=vision["image_size"], patch_size=vision["patch_size"], embed_dim=vision["width"],
            depth=vision["layers"], num_heads=vision["heads"], mlp_ratio=vision["mlp_ratio"],
            class_token=vision["use_cls_token"],
        ),
        text=TextConfig(
            context_length=text["context_length"], width=text["width"], depth=text["layers"], num_heads=text["heads"],
            vocab_size=text["vocab_size"],
        ),
        output_dim=vision["output_dim"],
    )  # fmt: skip


TINY_CORE = CoreConfig(
    vision=EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2),
    text=TextConfig(context_length=16, width=32, depth=2, num_heads=2, vocab_size=600),
    output_dim=24,
)


WORD_CORE = replace(TINY_CORE, text=replace(TINY_CORE.text, context_length=32, vocab_size=49408))
"""With the real vocabulary."""


def tiny_core(config: CoreConfig = TINY_CORE, **options: Any) -> PECore:
    """Return a small PE-Core in evaluation mode, always with the same weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return PECore(config, **options).eval()
