"""AdamW with moments of 8 bits: torchao's, as an optimizer of mmengine's configs."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from mmengine.registry import OPTIMIZERS

from pe_spatial.errors import ConfigError


@OPTIMIZERS.register_module(name="AdamW8bit", force=True)  # mmengine gives the name to bitsandbytes, if it is installed
def adamw_8bit(params: Any, **options: Any) -> torch.optim.Optimizer:
    """Return torchao's `AdamW8bit`, which takes what torch's AdamW takes: lr, betas, eps, weight_decay, amsgrad.

    Tensors of at least 4096 values, in multiples of 256, have moments of one byte for each value, with a scale for each
    256 and a table; others have moments in float32. The update itself is computed in float32. Raises ConfigError
    without torchao. FSDP (`ShardedRunner`) does not take it.
    """
    return _optimizer_class()(params, **options)


@cache
def _optimizer_class() -> Callable[..., torch.optim.Optimizer]:
    try:
        from torchao.optim import AdamW8bit as TorchaoAdamW8bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ConfigError(
            f"the optimizer AdamW8bit needs torchao, which cannot be imported ({error}): pip install torchao"
        ) from error

    class AdamW8bit(TorchaoAdamW8bit):
        """torchao's, with rates that are numbers, as mmengine's schedules set them, and states that are plain tensors.

        Without a GPU it runs uncompiled, because compiling takes longer than a short training.
        """

        shardable = False  # `gather` and the reader of parts do not know its states

        def add_param_group(self, param_group: dict[str, Any]) -> None:
            torch.optim.Optimizer.add_param_group(self, param_group)

        def step(self, closure: Any = None) -> Any:
            groups = self.param_groups
            rates = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = torch.tensor(group["lr"], dtype=torch.float32)
            on_gpu = any(p.is_cuda for group in groups for p in group["params"])
            with nullcontext() if on_gpu else torch.compiler.set_stance("force_eager"):
                loss = super().step(closure)
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
            return loss

        def state_dict(self) -> dict[str, Any]:
            state = super().state_dict()
            return {**state, "state": _mapped(state["state"], _pack)}

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            super().load_state_dict({**state_dict, "state": _mapped(state_dict["state"], unpack)})

    def unpack(value: Any) -> Any:
        return OptimState8bit(**value) if isinstance(value, Mapping) else value

    return AdamW8bit


def _pack(value: Any) -> Any:
    """Return a state of 8 bits as a dict of its parts, which any reader of checkpoints knows."""
    if not hasattr(value, "qmap"):
        return value
    return dict(codes=value.codes, scale=value.scale, qmap=value.qmap, signed=value.signed, dtype=value.dtype)


def _mapped(states: Mapping[Any, Mapping[str, Any]], function: Callable[[Any], Any]) -> dict[Any, dict[str, Any]]:
    return {key: {name: function(value) for name, value in state.items()} for key, state in states.items()}
