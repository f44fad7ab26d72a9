"""Memory and FLOPs of a training step, measured on the meta device: nothing is allocated and nothing computed.

Every operation of a forward and a backward pass runs on tensors without values, and a ledger tracks the storages that
are alive, as they would be on a GPU: attention keeps what the fused kernels keep, autocast casts what it casts on CUDA,
and checkpointed blocks run again. The losses are the models' own, on an example batch. Where the number of operations
depends on values, the plan assumes the maximum: every proposal, samplers with full quotas, every pixel valid. The
package of a class of models registers its peculiarities (see registry.py).

Not measured: what kernels allocate inside, the CUDA context, buffers of cuBLAS and NCCL, and allocator fragmentation.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.planning.ledger import EmulateCuda, Ledger, encoder_blocks
from pe_spatial.planning.registry import find_example, sum_outputs

try:
    from torch.autograd.graph import _engine_run_backward
except ImportError as error:
    raise ConfigError(f"planning needs torch 2.4 or later, and this is torch {torch.__version__}") from error

OBJECTS = 20  # annotated objects in an image by default; COCO images have 7 on average


def build_on_meta(cfg: Any) -> tuple[nn.Module, Optimizer]:
    """Build the model and the optimizer of an mmengine config without allocating a weight."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    with torch.device("meta"):
        model = MODELS.build(copy.deepcopy(cfg.model))  # MMDetection writes into it
    model = model.to("meta")  # torch.Tensor(n, m) ignores the device
    return model, build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def set_checkpointing(model: nn.Module, kind: bool | str) -> None:
    """Set the recomputing of activations in every module that supports it; only encoders have 'selective'."""
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            value = kind if isinstance(module, PerceptionEncoder) else kind is True
            setattr(module, "grad_checkpointing", value)  # noqa: B010  (mypy sees a submodule)


def recomputing_kinds(model: nn.Module) -> tuple[bool | str, ...]:
    """Return what `set_checkpointing` offers for a model."""
    ours = any(isinstance(module, PerceptionEncoder) for module in model.modules())
    return (False, "selective", True) if ours and not has_micro_batches(model) else (False, True)


def has_micro_batches(model: nn.Module) -> bool:
    """Return whether an encoder of a model computes its images in micro-batches."""
    return any(getattr(module, "micro_batch", None) is not None for module in model.modules())


def can_be_sharded(model: nn.Module, optimizer: Optimizer) -> bool:
    """Return whether `ShardedRunner` takes a model and its optimizer."""
    return not has_micro_batches(model) and getattr(optimizer, "shardable", True)


@dataclass(frozen=True, kw_only=True)
class Step:
    """Memory in bytes and operations of one forward and backward pass on one GPU, weights excluded.

    Operations are the multiplications and additions of matrix products, convolutions and attention, by data type.
    """

    saved: int  # in use between forward and backward pass
    activations: int  # peak without gradients of parameters, with autocast's bfloat16 copies of the weights of blocks
    activations_without_copies: int
    peak: int  # with gradients of parameters
    forward_flops: Mapping[torch.dtype, int]
    step_flops: Mapping[torch.dtype, int]  # forward and backward, recomputation included
    counted: str  # the parts of the model that these numbers cover


def measure_step(
    model: nn.Module,
    batch_size: int,
    size: Sequence[int],
    *,
    bfloat16: bool,
    frames: int | None = None,
    objects: int = OBJECTS,
) -> Step:
    """Run a training step of `model`, which is on the meta device, and return what it takes.

    Args:
        model: a model; if its package registered no example, the heads are not counted.
        batch_size, objects: number of images or clips, and of annotated objects in each.
        size: (H, W) of the images when they reach the model, in pixels.
        bfloat16: whether the training runs under autocast; parts that disable autocast stay in float32.
        frames: frames of a clip, for models that train on clips.

    Raises RuntimeError or TypeError for models whose losses do not run without values.
    """
    model.train()
    images = torch.empty(batch_size, *([frames] if frames else []), 3, *size, device="meta")
    ledger = Ledger(model)
    all_nonzero = mock.patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True)
    with ExitStack() as replaced, all_nonzero, ledger, EmulateCuda(model, ledger, bfloat16):
        loss, counted = _compute_loss(model, images, objects, replaced)
        saved, forward = ledger.alive, dict(ledger.flops)
        # torch.autograd.backward would disable the torch function mode, also for blocks that run again
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    model.zero_grad(set_to_none=True)
    return Step(saved=saved, forward_flops=forward, step_flops=dict(ledger.flops), counted=counted, **ledger.highest)


def _compute_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> tuple[Tensor, str]:
    """Run the forward pass; return a scalar that the backward pass can start from, and what it covers."""
    registered = find_example(model)
    if registered is not None:
        example, counted = registered
        return example(model, images, objects, replaced), counted.format(objects=objects)
    with torch.autocast("meta"):
        if isinstance(model, PerceptionEncoder):
            return sum_outputs(model(images)), "the encoder"
        levels = model.backbone(images)
        if getattr(model, "neck", None) is not None:
            levels = model.neck(levels)
        return sum_outputs(levels), "backbone and neck; THE HEADS ARE NOT COUNTED"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Memory in bytes that weights and what belongs to them take on one GPU during the complete training.

    `extra` is under DDP the buckets in which gradients are averaged; under FSDP what is gathered at the same time: the
    root unit and its gradients, the parameters of three blocks (in use, prefetched, and in transfer) and the gradients
    of one, as computed and in float32 for the reduction.
    """

    parameters: int
    gradients: int
    states: int
    extra: int
    update: int  # temporary memory of the optimizer's step, when no activations are alive

    @property
    def kept(self) -> int:
        return self.parameters + self.gradients + self.states + self.extra


def measure_weights(
    model: nn.Module, optimizer: Optimizer, *, shards: int | None, bfloat16: bool = False, buckets: bool = False
) -> Weights:
    """Run a step of `optimizer` on `model`, both on the meta device, and return what weights and states take.

    Args:
        model, optimizer: the model, and the optimizer of its parameters.
        shards: number of GPUs over which parameters, gradients and states are sharded along their first dimension
            (FSDP), with one unit for each block of an encoder; None for DDP. The numbers are those of the first GPU,
            whose shard is the largest.
        bfloat16: whether blocks are gathered in bfloat16.
        buckets: whether DDP copies gradients into buckets (several GPUs, without gradient_as_bucket_view).
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    for group in optimizer.param_groups:
        group["foreach"] = True  # the default on CUDA
    with Ledger(model) as ledger:
        optimizer.step()
    kept_states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    states = [part for x in kept_states for part in _parts(x)]
    kept = ledger.alive
    model.zero_grad(set_to_none=True)
    optimizer.state.clear()

    gradients = _bytes(trained)
    blocks = encoder_blocks(model) if shards else []
    in_blocks = {p for block in blocks for p in block.parameters()}
    root = [p for p in model.parameters() if p not in in_blocks]
    factor = 0.5 if bfloat16 else 1
    unit = max((_unit(block, factor) for block in blocks), default=0)
    gathered = _bytes(root) + _bytes(p for p in root if p.requires_grad) + unit
    return Weights(
        parameters=_bytes(model.parameters(), shards),
        gradients=_bytes(trained, shards),
        states=_bytes(states, shards),
        extra=int(gathered) if shards else gradients * buckets,
        update=(ledger.highest["peak"] - kept) // (shards or 1),
    )


def _unit(block: nn.Module, factor: float) -> float:
    """Return the bytes that FSDP gathers of a block: three times its parameters, and its gradients in two types."""
    trained = _bytes(p for p in block.parameters() if p.requires_grad)
    return 3 * factor * _bytes(block.parameters()) + (factor + 1) * trained


def _parts(x: Tensor) -> list[Tensor]:
    """Return the tensors of which one consists: those of 8 bits have codes, scales and a table."""
    if not is_traceable_wrapper_subclass(x):
        return [x]
    return [getattr(x, name) for name in x.__tensor_flatten__()[0]]


def _bytes(tensors: Iterable[Tensor], shards: int | None = None) -> int:
    """Return the bytes of the tensors, or of their first shard as FSDP2 cuts them."""
    return sum(
        x.nbytes if shards is None or not x.ndim else -(-x.shape[0] // shards) * (x.nbytes // x.shape[0])
        for x in tensors
    )
