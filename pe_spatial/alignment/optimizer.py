"""LAMB, the optimizer of spatial alignment, from pytorch_optimizer."""

from collections.abc import Iterable
from typing import Any

from mmengine.registry import OPTIMIZERS
from torch.optim import Optimizer

from pe_spatial.errors import ConfigError


@OPTIMIZERS.register_module(name="LAMB")
def build_lamb(params: Iterable[Any], **options: Any) -> Optimizer:
    """Return `pytorch_optimizer.Lamb`, whose options apply; ConfigError if the package is missing."""
    try:
        from pytorch_optimizer import Lamb
    except ModuleNotFoundError as error:
        raise ConfigError(
            "LAMB needs pytorch_optimizer, which is not installed; pip install pytorch-optimizer, or take "
            "optim_wrapper.optimizer.type=AdamW"
        ) from error
    return Lamb(params, **options)
