"""Train with weights, gradients and optimizer states sharded over the GPUs: FSDP2 under mmengine's Runner.

In a config: `runner_type = 'ShardedRunner'` and `custom_imports = dict(imports=['pe_spatial.engine.fsdp'])`.
Needs torch 2.7 or later.
"""

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.device import get_device
from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio import LocalBackend, get_file_backend
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.model import BaseDataPreprocessor
from mmengine.optim import AmpOptimWrapper, OptimWrapper, OptimWrapperDict
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.engine.precision import BFloat16OptimWrapper
from pe_spatial.engine.runner import RunnerMixin
from pe_spatial.engine.weights import load_from_file
from pe_spatial.errors import ConfigError

try:
    from torch.distributed import tensor as dtensor
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.utils._pytree import keystr, tree_map_with_path
    from torch.utils.serialization import config as serialization
except ImportError as error:
    raise ConfigError(
        f"sharded training needs torch 2.7 or later, and this is torch {torch.__version__}. Install a newer torch, "
        "or train without ShardedRunner."
    ) from error


def shard(model: nn.Module, optimizer: Optimizer, *, bfloat16: bool = False) -> None:
    """Shard `model` over all ranks: each block of an encoder is one unit, and the rest of the model another.

    Every rank must have the same weights, best on the CPU: then only one unit at a time is complete on the GPU.
    From here on `state_dict` of the model and of the optimizer returns sharded tensors, which `gather` completes;
    `load_state_dict` takes either.

    Args:
        optimizer: optimizer of the model before its first step; its parameters are replaced by the sharded ones.
        bfloat16: gather the linear layers of the blocks in bfloat16, as separate units, for training under autocast.
            Their gradients are averaged in float32, and the rest of the model keeps float32.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    _shard_modules(model, bfloat16=bfloat16)
    if bfloat16:
        _always_autocast(model)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]
    optimizer.register_load_state_dict_pre_hook(_shard_loaded_states)


def _shard_modules(model: nn.Module, *, bfloat16: bool = False) -> None:
    # autocast decides what is computed in bfloat16: norms, LayerScale and the residual stream stay in float32
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for encoder in [module for module in model.modules() if isinstance(module, PerceptionEncoder)]:
        for block in encoder.blocks:
            for layers in (block.attn, block.mlp) if bfloat16 else ():
                fully_shard(cast(nn.Module, layers), mp_policy=policy)
            fully_shard(block)
    fully_shard(model)
    model.register_load_state_dict_pre_hook(_shard_loaded_weights)


def _always_autocast(model: nn.Module) -> None:
    """Compute under autocast in evaluation too, where mmengine turns it off: the gathered weights are bfloat16."""
    autocast = torch.autocast(get_device(), torch.bfloat16)

    def enter(*_: Any) -> None:
        autocast.__enter__()

    def leave(*_: Any) -> None:
        autocast.__exit__(None, None, None)

    model.register_forward_pre_hook(enter)
    model.register_forward_hook(leave, always_call=True)


def gather(tree: dict[str, Any]) -> dict[str, Any]:
    """Return `tree` with complete tensors on the CPU of rank 0 instead of sharded ones; other ranks get None for them.

    All ranks must call it, with the same sharded tensors in the same order.
    """

    def complete(_: str, x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        part = cast(DTensor, x.detach().to(get_device()))  # Runner has moved the parts of rank 0 to the CPU
        full = part.full_tensor()
        return full.cpu() if torch.distributed.get_rank() == 0 else None

    return _mapped(complete, tree)


def _mapped(function: Callable[[str, Any], Any], tree: dict[str, Any]) -> dict[str, Any]:
    """Apply `function` to the place and the value of each leaf; state dicts keep the versions of their modules."""
    result = {}
    for key, value in tree.items():
        result[key] = tree_map_with_path(lambda path, x, key=key: function(key + keystr(path), x), value)
        if hasattr(value, "_metadata"):
            result[key]._metadata = value._metadata
    return result


def _shard_like(full: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of `full`, sharded like `like`; each rank takes it from its own `full`."""
    if not isinstance(like, DTensor) or isinstance(full, DTensor) or full.shape != like.shape:
        return full  # the caller reports a wrong shape
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def _shard_loaded_weights(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, parameter in model.named_parameters(prefix.removesuffix(".")):
        if name in state:
            state[name] = _shard_like(state[name], parameter)


def _shard_loaded_states(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    states = dict(state["state"])
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=False):
        for index, parameter in zip(saved["params"], group["params"], strict=False):
            if index in states:
                states[index] = {
                    key: _shard_like(value, parameter) if isinstance(value, Tensor) else value
                    for key, value in states[index].items()
                }
    return {**state, "state": states}


def write_parts(checkpoint: dict[str, Any], file: Path) -> dict[str, Any]:
    """Write the sharded tensors of `checkpoint`, each rank its own part, into a folder beside `file`.

    Returns what then has to be written into `file`: the checkpoint with tensors on the meta device in their places,
    and the folder's name. Until `file` is written, the previous checkpoint is valid. Folders without their file, which
    is outdated or was never written, are removed by the next call. All ranks must call it and see one file system.
    """
    tensors = {}

    def take(place: str, x: Any) -> Any:
        if not isinstance(x, DTensor):
            return x
        tensors[place] = x.detach()
        return torch.empty(x.shape, dtype=x.dtype, device="meta")

    rest = _mapped(take, checkpoint)
    names = [f"{file.name}.{time.time_ns()}.parts"]
    if is_main_process():
        _remove_unowned(file.parent)
    broadcast_object_list(names)
    save_parts(tensors, checkpoint_id=file.with_name(names[0]))
    return {**rest, "parts": names[0]}


def _remove_unowned(folder: Path) -> None:
    for parts in folder.glob("*.pth.*.parts"):
        if not parts.with_name(parts.name.rsplit(".", 2)[0]).exists():
            shutil.rmtree(parts)


def read_parts(rest: dict[str, Any], file: Path, mesh: DeviceMesh | None = None) -> dict[str, Any]:
    """Return the complete checkpoint.

    Args:
        rest: the content of `file`.
        mesh: shard the tensors over it. Each rank reads its own part, for any number of ranks that wrote; all must
            call this. None reads complete tensors, in this process alone.

    Raises CheckpointError if the folder of the parts is not beside the file.
    """
    rest = dict(rest)
    folder = file.with_name(rest.pop("parts"))
    if not folder.is_dir():
        raise CheckpointError(f"{file} has its weights in {folder}, which does not exist; keep the two together")
    tensors = {}

    def allocate(place: str, x: Any) -> Any:
        if not (isinstance(x, Tensor) and x.is_meta):
            return x
        if mesh is None:
            tensors[place] = torch.empty(x.shape, dtype=x.dtype)
        else:  # as `fully_shard` does
            tensors[place] = dtensor.empty(x.shape, dtype=x.dtype, device_mesh=mesh, placements=[Shard(0)])
        return tensors[place]

    checkpoint = _mapped(allocate, rest)
    with serialization.patch("load.mmap", False):  # type: ignore[attr-defined]  # mmap gives torch.load open files, which cannot be mapped
        load_parts(tensors, checkpoint_id=folder, no_dist=mesh is None)
    return checkpoint


def consolidate(file: str | Path, target: str | Path) -> None:
    """Write a checkpoint with its weights in parts as the single file of a plain Runner; one process is enough.

    Raises CheckpointError if it does not exist, has no parts, or they are not beside it.
    """
    if not Path(file).is_file():
        raise CheckpointError(f"no checkpoint at {file}; give the .pth file beside the folder of its parts")
    rest = load_from_file(str(file), map_location="cpu")
    if "parts" not in rest:
        raise CheckpointError(f"{file} has no parts: it contains its weights, and any runner loads it")
    with atomic_write(target) as unfinished:
        torch.save(read_parts(rest, Path(file)), unfinished)


@RUNNERS.register_module()
class ShardedRunner(RunnerMixin, Runner):
    """Runner that shards training by `shard` instead of replicating it by DDP; with one process it is a plain Runner.

    Checkpoints are exactly those of a plain Runner: either resumes what the other saved, on any number of processes.
    With `sharded_checkpoints=True` in the config each rank writes its part into a folder beside the file instead, and
    this runner loads them on any number of processes; `consolidate` makes a plain Runner's file of them. The average of
    an EMAHook is sharded like the model.

    Each rank builds and initializes the complete model in CPU memory before it is sharded: a node of 8 GPUs holds it 8
    times. With a `BFloat16OptimWrapper` the blocks' linear layers are gathered in bfloat16. Validation gathers all
    weights once, from its start to its end, because ranks may have different numbers of images; it computes in bfloat16
    if training does. Without training nothing is sharded, and each GPU holds the complete model. With
    `optim_wrapper.accumulative_counts` gradients are averaged in each of the steps.

    Raises ConfigError for `model_wrapper_cfg`, `sync_bn`, `micro_batch` and optimizer wrappers in float16, and for
    sharded checkpoints that are published (`published_keys`) or not written to the file system.
    """

    checkpoint_file = Path()
    """The checkpoint that is being written or read."""

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:
        """Leave the model on the CPU; it is sharded after its weights are initialized."""
        if not self.distributed:
            return super().wrap_model(model_wrapper_cfg, model)
        for option in ("model_wrapper_cfg", "sync_bn"):
            if self.cfg.get(option):
                raise ConfigError(f"{option} is set, which ShardedRunner does not support; remove it or use Runner")
        return model

    def load_or_resume(self) -> None:
        """Shard the model, which is initialized by now, and then load the checkpoint."""
        if self.distributed and not self._sharded:
            if isinstance(self.optim_wrapper, OptimWrapper):  # it was built, so this is a training
                self._shard(self.optim_wrapper)
            else:
                self.model.to(get_device())
        super().load_or_resume()

    @property
    def _sharded(self) -> bool:
        return isinstance(self.model, FSDPModule)

    def _shard(self, wrapper: OptimWrapper) -> None:
        if isinstance(wrapper, OptimWrapperDict):
            raise ConfigError(
                "ShardedRunner shards one optimizer, and heads that train together have one each; remove runner_type"
            )
        if isinstance(wrapper, AmpOptimWrapper):
            raise ConfigError(
                "optim_wrapper.type=AmpOptimWrapper scales losses, which ShardedRunner does not support; "
                "use BFloat16OptimWrapper"
            )
        if not getattr(wrapper.optimizer, "shardable", True):
            raise ConfigError(
                f"ShardedRunner does not shard the states of {type(wrapper.optimizer).__name__}; set "
                "optim_wrapper.optimizer.type=AdamW"
            )
        if any(getattr(module, "micro_batch", None) is not None for module in self.model.modules()):
            raise ConfigError(
                "micro_batch keeps the gradients of the complete encoder on every GPU, which ShardedRunner is there to "
                "avoid; set grad_checkpointing=True instead, or a smaller train_dataloader.batch_size"
            )
        if self.cfg.get("sharded_checkpoints"):
            self._check_parts_can_be_written()
        for module in self.model.modules():
            if isinstance(module, BaseDataPreprocessor):
                module.to(get_device())  # it remembers the device of images; sharding the model moves only its tensors
        shard(self.model, wrapper.optimizer, bfloat16=isinstance(wrapper, BFloat16OptimWrapper))
        for hook in self._averaging:
            average = hook.ema_model
            _shard_modules(average.module)
            states = average.module.state_dict() if average.update_buffers else average.module.named_parameters()
            average.avg_parameters = dict(states)

    @property
    def _averaging(self) -> list[EMAHook]:
        return [hook for hook in self.hooks if isinstance(hook, EMAHook)]

    @property
    def _checkpoint_hooks(self) -> list[CheckpointHook]:
        return [hook for hook in self.hooks if isinstance(hook, CheckpointHook)]

    def _check_parts_can_be_written(self) -> None:
        for hook in self._checkpoint_hooks:
            backend = get_file_backend(hook.out_dir or self.work_dir, backend_args=hook.backend_args)
            if hook.published_keys or not isinstance(backend, LocalBackend):
                raise ConfigError(
                    "sharded_checkpoints=True writes folders into the file system and publishes nothing; remove it, or "
                    "published_keys, out_dir and backend_args of default_hooks.checkpoint"
                )

    def load_checkpoint(self, filename: str, map_location: Any = "cpu", **options: Any) -> Any:
        """As in Runner; a rank reads only what it needs from a file. Without sharding `map_location` applies."""
        self.checkpoint_file = Path(filename)
        if not self._sharded:
            return super().load_checkpoint(filename, map_location, **options)
        with serialization.patch("load.mmap", True):  # type: ignore[attr-defined]
            return super().load_checkpoint(filename, "cpu", **options)

    def save_checkpoint(
        self, out_dir: str, filename: str, *args: Any, save_optimizer: bool = True, **options: Any
    ) -> None:
        """As in Runner, which saves on rank 0; the other ranks contribute their parts in the same order."""
        self.checkpoint_file = Path(out_dir, filename)
        if self._sharded and self.rank:
            checkpoint = {"state_dict": self.model.state_dict()}
            if save_optimizer:
                checkpoint["optimizer"] = self.optim_wrapper.state_dict()
            for hook in self._averaging:
                hook.before_save_checkpoint(self, checkpoint)
            self.omit_base(checkpoint)
            self._without_shards(checkpoint)
        else:
            super().save_checkpoint(out_dir, filename, *args, save_optimizer=save_optimizer, **options)

    def _without_shards(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        if self.cfg.get("sharded_checkpoints"):
            return write_parts(checkpoint, self.checkpoint_file)
        return gather(checkpoint)

    def _with_parts(self, rest: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(self.optim_wrapper, OptimWrapper):  # it was not built, so this is an evaluation
            rest = {key: value for key, value in rest.items() if key != "optimizer"}
        meshes = [p.device_mesh for p in self.model.parameters() if isinstance(p, DTensor)] if self._sharded else [None]
        return read_parts(rest, self.checkpoint_file, meshes[0])

    def call_hook(self, fn_name: str, **options: Any) -> None:
        """As in Runner; validation during training gathers the weights before it and shards them again after it.

        Checkpoints get their parts back before the hooks of loading, and lose them after the hooks of saving.
        """
        if self._sharded and fn_name == "after_val_epoch":
            self._keep_gathered(False)
        checkpoint = options.get("checkpoint", {})
        if fn_name == "after_load_checkpoint" and "parts" in checkpoint:
            checkpoint.update(self._with_parts(checkpoint))
        super().call_hook(fn_name, **options)
        if self._sharded and fn_name == "before_val_epoch":
            self._keep_gathered(True)
        if self._sharded and fn_name == "before_save_checkpoint":
            checkpoint.update(self._without_shards(checkpoint))
        if fn_name == "after_train" and self.cfg.get("sharded_checkpoints") and is_main_process():
            for hook in self._checkpoint_hooks:
                _remove_unowned(Path(hook.out_dir))

    def _keep_gathered(self, gathered: bool) -> None:
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.set_reshard_after_forward(not gathered and module is not self.model, recurse=False)
                module.unshard() if gathered else module.reshard()
