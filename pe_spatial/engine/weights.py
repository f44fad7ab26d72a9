"""Checks of the weights that a run starts from, before anything is built."""

import os

from mmengine.config import Config

from pe_spatial.encoder.checkpoint import released_source
from pe_spatial.encoder.files import SUFFIXES, CheckpointError, locate
from pe_spatial.engine.checkpoints import check_complete
from pe_spatial.engine.summary import encoders


def check_weights(source: str | None) -> None:
    """Raise CheckpointError if the weights are missing or damaged; mmengine's own addresses and plain names pass."""
    if not source or ("://" in source and not source.startswith(("hf://", "http://", "https://", "package://"))):
        return
    path = locate(source)
    if path.is_dir() and not any(file.suffix in SUFFIXES for file in path.iterdir()):
        raise CheckpointError(f"{path} is a folder without weights; give a .pth, .pt or .safetensors file")
    if path.is_file():
        check_complete(path)
    elif not path.is_dir() and (path.suffix or os.sep in str(path)):  # others are names, such as 'released'
        raise CheckpointError(f"no checkpoint at {path}; download it, or give the path of a file that exists")


def check_pretrained(cfg: Config) -> None:
    """Check the weights that encoders start from; released ones are downloaded now."""
    for place, options in encoders(cfg.get("model")):
        source, variant = (options.get("init_cfg") or {}).get("checkpoint"), options.get("variant")
        try:
            if source == "released" and isinstance(variant, str) and not variant.startswith("timm:"):
                source = released_source(variant, variant)
            check_weights(source)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}, with --cfg-options {place}.init_cfg.checkpoint=FILE; "
                f"or train from random weights on purpose with --cfg-options {place}.init_cfg=None"
            ) from error
