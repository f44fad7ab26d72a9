"""Layer-wise learning-rate decay: one rule for every framework.

Equal to perception_models@3e352cc:apps/detection/detectron2_pe/modeling/backbone/pev1_det.py
(`get_vit_lr_decay_rate_pev1`), on our names.
"""

from __future__ import annotations

from torch import Tensor

_STEM = ("patch_embed.", "cls_token", "pos_embed", "norm_pre.")


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of the encoder: 0 for the stem, i + 1 for block i.

    Args:
        name: as `PerceptionEncoder.named_parameters` gives it.
        depth: number of blocks built.

    Raises ValueError for a name that no encoder has.
    """
    if name.startswith(_STEM):
        return 0
    head, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    if head == "blocks" and index.isdecimal() and int(index) < depth:
        return int(index) + 1
    raise ValueError(f"{name!r} is no parameter of a PerceptionEncoder of {depth} blocks")


def lr_factor(name: str, *, depth: int, rate: float) -> float:
    """Return the factor on the learning rate of the encoder's parameter `name`; heads and pyramids keep 1."""
    return rate ** (depth + 1 - layer_of(name, depth))


def is_norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` is a norm's, a bias, a LayerScale or a learned position: what most recipes do not decay."""
    return parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
