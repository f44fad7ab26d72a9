"""Layer-wise learning-rate decay: one rule for every framework, and where the encoders of a model are.

Equal to perception_models@3e352cc:apps/detection/detectron2_pe/modeling/backbone/pev1_det.py
(`get_vit_lr_decay_rate_pev1`), on our names.
"""

from typing import Any

from torch import Tensor, nn

from pe_spatial.errors import ConfigError

from .variants import recipe_rate

_STEM = ("patch_embed.", "cls_token", "pos_embed", "norm_pre.")


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter of an encoder with `depth` blocks built: 0 for the stem, i + 1 for block i.

    Raises ValueError for a name that no encoder has.
    """
    if name.startswith(_STEM):
        return 0
    head, _, rest = name.partition(".")
    index = rest.partition(".")[0]
    if head == "blocks" and index.isdecimal() and int(index) < depth:
        return int(index) + 1
    raise ValueError(f"{name!r} is not a parameter of a PerceptionEncoder of {depth} blocks")


def lr_factors(model: nn.Module, rate: float | str) -> dict[str, float]:
    """Return name -> factor on the learning rate, for the parameters of every encoder in `model`.

    An encoder is a module with `layer_of(name)`, `depth` (blocks built) and `config.depth` (all blocks), such as a
    `PerceptionEncoder`. Its layer i has the factor `rate ** (depth + 1 - i)`; parameters outside of encoders have none.

    Args:
        model: contains one encoder or several, at any place.
        rate: factor from one layer to the one before it, or 'vitdet': the published rate for the encoder's depth.

    Raises ConfigError if there is no encoder.
    """
    factors: dict[str, float] = {}
    encoders: dict[str, Any] = {name: part for name, part in model.named_modules() if hasattr(part, "layer_of")}
    for place, encoder in encoders.items():
        base = recipe_rate("layer_decay_rate", rate, encoder.config.depth)
        for name, _ in encoder.named_parameters(remove_duplicate=False):
            path = f"{place}.{name}" if place else name
            factors[path] = base ** (encoder.depth + 1 - encoder.layer_of(name))
    if not encoders:
        raise ConfigError("the model contains no PerceptionEncoder, so there are no layers to decay the rate over")
    return factors


def is_norm_or_bias(name: str, parameter: Tensor) -> bool:
    """Whether `parameter` is a norm's, a bias, a LayerScale or a learned position: what most recipes do not decay."""
    return parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed"))
