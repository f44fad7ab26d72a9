"""The option `micro_batch` in a config: fewer images at a time in the encoder, the same batch for the losses."""

from typing import Any

from mmengine.config import Config

from pe_spatial.engine.options import set_options
from pe_spatial.planning.search import encoder_place


def divisors(number: int) -> list[int]:
    """Return all divisors of `number`, the largest first."""
    return [size for size in range(number, 0, -1) if number % size == 0]


def micro_batch_place(cfg: Config) -> str | None:
    """Return where a config takes `micro_batch`, such as 'model.backbone'; None if its encoder does not have it."""
    place = encoder_place(cfg.model)
    if place is None:
        return None
    node = options_at(cfg, place)
    without = str(node.get("variant")).startswith("timm:") and node["type"] == "PerceptionEncoder"
    return None if without else place


def set_micro_batch(cfg: Config, place: str, number: int) -> dict[str, str]:
    """Encode `number` images at a time, without 'selective' recomputing; return what this sets, as options."""
    options = {f"{place}.micro_batch": str(number)}
    if "selective" in str(options_at(cfg, place).get("grad_checkpointing")):
        options[f"{place}.grad_checkpointing"] = "False"
    set_options(cfg, options)
    return options


def micro_batch_of(cfg: Config, place: str) -> int:
    """Return how many images a config encodes at a time."""
    return options_at(cfg, place).get("micro_batch") or cfg.train_dataloader.batch_size


def options_at(cfg: Config, place: str) -> Any:
    """Return the options at a place of a config; {} if it has none there."""
    node: Any = cfg
    for key in place.split("."):
        node = node.get(key) or {}
    return node
