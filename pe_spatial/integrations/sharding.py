"""Training with weights, gradients and optimizer states cut over the GPUs: FSDP2 under mmengine's Runner.

In a config: `runner_type = 'ShardedRunner'` and `custom_imports = dict(imports=['pe_spatial.integrations.sharding'])`.
Needs torch 2.7 or later.
"""

from __future__ import annotations

from typing import Any

import torch
from mmengine.device import get_device
from mmengine.hooks import EMAHook
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.serialization import config as serialization

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError

from .openmmlab import BFloat16OptimWrapper


def shard(model: nn.Module, optimizer: Optimizer, *, bfloat16: bool = False) -> None:
    """Cut `model` over all ranks: each block of an encoder is gathered for itself, and the rest stays together.

    Every rank must have the same weights; on the CPU is best, because then only one unit at a time is whole on the GPU.
    From here on `state_dict` of the model and of the optimizer gives whole tensors, in the memory of rank 0 alone, and
    `load_state_dict` takes them, so that files are those of a run that is not sharded. All ranks must call them.

    Args:
        optimizer: of the model's parameters, before its first step; it gets the cut ones in their places.
        bfloat16: gather the linear layers of the blocks in bfloat16, as units of their own, for training under
            autocast. Their gradients are averaged in float32, and the rest of the model keeps float32.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    # autocast decides what is computed in bfloat16: norms, LayerScale and the residual stream stay in float32
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for encoder in [module for module in model.modules() if isinstance(module, PerceptionEncoder)]:
        for block in encoder.blocks:
            for layers in (block.attn, block.mlp) if bfloat16 else ():
                fully_shard(layers, mp_policy=policy)
            fully_shard(block)
    fully_shard(model)
    if bfloat16:
        _always_autocast(model)
    cut = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [cut[names[parameter]] for parameter in group["params"]]

    model.register_state_dict_post_hook(lambda _, state, *__: state.update(_gathered(dict(state))))
    model.register_load_state_dict_pre_hook(_cut_weights)
    optimizer.register_state_dict_post_hook(lambda _, state: _gathered(state))
    optimizer.register_load_state_dict_pre_hook(_cut_states)


def _always_autocast(model: nn.Module) -> None:
    """Compute under autocast in evaluation too, where mmengine turns it off: float32 would not meet float32 weights."""
    autocast = torch.autocast(get_device(), torch.bfloat16)

    def enter(*_: Any) -> None:
        autocast.__enter__()

    def leave(*_: Any) -> None:
        autocast.__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def _gathered(tree: Any) -> Any:
    """Return `tree` with whole tensors on the CPU of rank 0 in the place of cut ones; other ranks get None for them."""

    def whole(x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        full = x.detach().full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else None

    return tree_map(whole, tree)


def _cut_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of `full`, cut as `like` is; each rank takes it from its own `full`."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor) or full.shape != like.shape:
        return full  # a shape that does not fit is the caller's to report
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _cut_weights(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in model.named_parameters(prefix.removesuffix(".")):
        if name in state:
            state[name] = _cut_like(state[name], parameter)


def _cut_states(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    states = dict(state["state"])
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
        for index, parameter in zip(saved["params"], group["params"], strict=False):
            if index in states:
                states[index] = {
                    key: _cut_like(value, parameter) if isinstance(value, Tensor) else value
                    for key, value in states[index].items()
                }
    return {**state, "state": states}


@RUNNERS.register_module()
class ShardedRunner(Runner):
    """Runner whose training is sharded by `shard` instead of replicated by DDP; with one process it is a plain Runner.

    Checkpoints are exactly those of a plain Runner: either resumes what the other saved, on any number of processes.
    Each rank builds the whole model in the CPU's memory and initialises it there before it is cut: on a node of 8 GPUs
    it is there 8 times. With a `BFloat16OptimWrapper` the blocks' linear layers are gathered in bfloat16. Validation
    gathers all weights once, for its whole length, because ranks may have different numbers of pictures; it computes in
    bfloat16 if training does. Without training nothing is cut, and each GPU holds the whole model. With
    `optim_wrapper.accumulative_counts` gradients are averaged in each of the steps.

    Raises ConfigError for `model_wrapper_cfg`, `sync_bn`, an EMAHook, and optimizer wrappers in float16.
    """

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Leave the model as it is, on the CPU; it is cut when its weights are there."""
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        for option in ("model_wrapper_cfg", "sync_bn"):
            if self.cfg.get(option):
                raise ConfigError(f"{option} is set, which ShardedRunner knows nothing of; leave it out or use Runner")
        return model

    def load_or_resume(self) -> None:
        """Cut the model, whose weights are initialised by now, and then load what is to be loaded."""
        if self.distributed and not self._sharded:
            if isinstance(self.optim_wrapper, OptimWrapper):  # built: this is a training
                self._shard(self.optim_wrapper)
            else:
                self.model.to(get_device())
        super().load_or_resume()

    @property
    def _sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def _shard(self, wrapper: OptimWrapper) -> None:
        if any(isinstance(hook, EMAHook) for hook in self.hooks):
            raise ConfigError("EMAHook averages whole models, which ShardedRunner does not have; leave it out")
        if isinstance(wrapper, AmpOptimWrapper):
            raise ConfigError(
                "optim_wrapper.type=AmpOptimWrapper scales losses, which ShardedRunner cannot; use BFloat16OptimWrapper"
            )
        for module in self.model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(get_device())  # it remembers where pictures go; its tensors alone would move with the model
        shard(self.model, wrapper.optimizer, bfloat16=isinstance(wrapper, BFloat16OptimWrapper))

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **options: Any) -> Any:
        """As in Runner; a rank reads of a file on disk what it needs, and `map_location` holds without sharding."""
        if not self._sharded:
            return super().load_checkpoint(filename, map_location, **options)
        with serialization.patch("load.mmap", True):
            return super().load_checkpoint(filename, "cpu", **options)

    def save_checkpoint(self, *args: Any, save_optimizer: bool = True, **options: Any) -> None:
        """As in Runner, which saves on rank 0; the other ranks take part in gathering, in its order."""
        if self._sharded and self.rank:
            self.model.state_dict()
            if save_optimizer:
                self.optim_wrapper.state_dict()
        else:
            super().save_checkpoint(*args, save_optimizer=save_optimizer, **options)

    def call_hook(self, fn_name: str, **options: Any) -> None:
        """As in Runner; an evaluation within a training gathers the weights before it, and gives them back after it."""
        if self._sharded and fn_name == "after_val_epoch":
            self._keep_whole(False)
        super().call_hook(fn_name, **options)
        if self._sharded and fn_name == "before_val_epoch":
            self._keep_whole(True)

    def _keep_whole(self, whole: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not whole and module is not self.model, recurse=False)
                module.unshard() if whole else module.reshard()
