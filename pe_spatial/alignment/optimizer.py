"""LAMB, the optimizer of spatial alignment, from pytorch_optimizer; with sharded weights too."""

from collections.abc import Iterable
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

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

    class ShardableLamb(Lamb):  # type: ignore[misc, unused-ignore]
        """Its trust ratios are of complete weights, which version 4.1 cannot compute of FSDP's parts."""

        def step(self, closure: Any = None) -> Any:
            if not any(hasattr(p, "full_tensor") for group in self.param_groups for p in group["params"]):
                return super().step(closure)
            for group in self.param_groups:
                group["foreach"] = False
            with _NormsOfCompleteTensors():
                return super().step(closure)

    return ShardableLamb(params, **options)


class _NormsOfCompleteTensors(TorchFunctionMode):
    """The norm of a sharded tensor is that of all parts, as a plain number."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.full_tensor() if func is torch.linalg.norm and hasattr(out, "full_tensor") else out
