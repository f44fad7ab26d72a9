"""Encoders that are small enough for any test."""

from dataclasses import replace

import torch

from pe_spatial import EncoderConfig

TINY = EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
TINY_NO_CLASS = replace(TINY, class_token=False, init_values=0.1)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Fill every parameter, those that start as zeros or ones too, so that each one matters; always with the same."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        scale = {1: 0.1, 2: parameter.shape[-1] ** -0.5, 3: 1.0, 4: 0.1}[parameter.ndim]
        offset = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0  # norms and LayerScale
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale + offset)
    return module
