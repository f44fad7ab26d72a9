"""SAM 2.1 of the package sam2 as it was released: built by its config, loaded strictly."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pe_spatial.encoder.files import CheckpointError, locate
from pe_spatial.errors import ConfigError

SIZES = {"large": "l", "base_plus": "b+", "small": "s", "tiny": "t"}
"""Our name of a SAM 2.1 -> its letter in the configs of sam2."""


def check_sam2(what: str) -> None:
    """Raise ConfigError if `what` needs sam2 and it is not installed."""
    if find_spec("sam2") is None:
        raise ConfigError(f"{what} needs sam2, which is not installed; pip install --no-build-isolation sam2")


def build_sam2(size: str, image_size: int = 1024) -> Any:
    """Return SAM 2.1 of a size with random weights, on the CPU, as sam2's config describes it."""
    from sam2.build_sam import build_sam2 as build

    config = f"configs/sam2.1/sam2.1_hiera_{SIZES[size]}.yaml"
    overrides = [f"++model.image_size={image_size}"]
    return build(config, device="cpu", hydra_overrides_extra=overrides, apply_postprocessing=False)


def load_sam2(size: str, source: str, image_size: int = 1024) -> Any:
    """Return SAM 2.1 of a size with its weights, in evaluation mode.

    Args:
        size: of `SIZES`.
        source: 'released' (from the hub) or a file in sam2's layout.
        image_size: side of its image in pixels.

    Raises CheckpointError for another file.
    """
    if source == "released":
        source = f"hf://facebook/sam2.1-hiera-{size.replace('_', '-')}/sam2.1_hiera_{size}.pt"
    path = locate(source)
    if not Path(path).is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the weights of SAM 2.1 {size}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    except Exception as error:  # of pickle, zipfile and torch
        raise CheckpointError(f"{path} is no checkpoint of SAM 2.1 ({type(error).__name__}: {error})") from error
    sam = build_sam2(size, image_size)
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{source} does not hold SAM 2.1 {size}: {reason}") from error
    return sam.requires_grad_(False).eval()
