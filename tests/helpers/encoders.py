"""Encoders that are small enough for any test."""

from dataclasses import replace

from pe_spatial import EncoderConfig

TINY = EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
TINY_NO_CLASS = replace(TINY, class_token=False, init_values=0.1)
