"""Which activations the encoder keeps for the backward pass, and which it computes again there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from pe_spatial.errors import ConfigError

from .geometry import block_indices

KINDS = ("full", "selective")
_LINEAR = ("mm", "addmm")  # of `torch.ops.aten`; both take the weight last
_ATTENTION = (
    "bmm", "baddbmm", "_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)  # fmt: skip

Choice = bool | str | Sequence[int] | Mapping[int, str]
Maps = Callable[[Tensor], tuple[Tensor, ...]]


def recomputed_blocks(choice: Choice, num_blocks: int, depth: int) -> dict[int, str]:
    """Return block -> 'full' or 'selective' for `grad_checkpointing`, as `PerceptionEncoder` describes it.

    Args:
        choice: what the user asked for.
        num_blocks: number of blocks that the encoder builds.
        depth: number of blocks of the complete network, which negative indices count from.

    Raises ConfigError for what is not allowed, and for 'selective' with a torch before 2.4.
    """
    kinds: dict[int, str]
    if isinstance(choice, bool | str):
        kinds = dict.fromkeys(range(num_blocks), "full" if choice is True else choice) if choice else {}
    elif isinstance(choice, Mapping):
        kinds = {block_indices("grad_checkpointing", [i], depth)[0]: kind for i, kind in choice.items()}
    else:
        kinds = dict.fromkeys(block_indices("grad_checkpointing", choice, depth), "full")
    unknown = [kind for kind in kinds.values() if kind not in KINDS]
    if unknown or choice == "":
        raise ConfigError(
            f"grad_checkpointing is {choice!r}; allowed are True, False, 'full', 'selective', block indices, and a "
            "mapping of block indices to 'full' or 'selective'"
        )
    if "selective" in kinds.values() and not hasattr(checkpoint, "create_selective_checkpoint_contexts"):
        raise ConfigError(
            f"grad_checkpointing='selective' needs torch 2.4 or later, and this is {torch.__version__}; use True, "
            "which computes all again"
        )
    return kinds


def run_recomputed(block: nn.Module, kind: str, *args: Any) -> Tensor:
    """Call a block so that its backward pass computes again what `kind` does not keep.

    'full' keeps the inputs alone. 'selective' keeps also what takes the time: the results of attention and of the
    matrix products that widen their input (queries, keys and values, and the hidden layer of the MLP), which is half of
    what a block keeps. Norms, GELU, LayerScale, rotary products and the square projection run again. The last product
    would do so only for LayerScale and drop path, and is kept where there is either.
    """
    options: dict[str, Any] = {}
    if kind == "selective":
        options["context_fn"] = _contexts(bool(block.scales_branches))
    out: Tensor = checkpoint.checkpoint(block, *args, use_reentrant=False, **options)
    return out


def check_micro_batch(micro_batch: int | None, kinds: Collection[str]) -> int | None:
    """Return the option `micro_batch`; `kinds` are those in which blocks recompute activations.

    Raises ConfigError for what is not a positive number, and beside 'selective', which keeps its results of all images.
    """
    if micro_batch is None:
        return None
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, int) or micro_batch < 1:
        raise ConfigError(f"micro_batch is {micro_batch!r}; give a number of images, at least 1, or None for all")
    if "selective" in kinds:
        raise ConfigError(
            "micro_batch saves nothing beside grad_checkpointing='selective', which keeps results of all images; set "
            "grad_checkpointing to True or False"
        )
    return micro_batch


def run_in_micro_batches(function: Maps, images: Tensor, size: int | None) -> tuple[Tensor, ...]:
    """Return the maps of all images, of which `function` computes `size` at a time, if gradients are wanted.

    Only the maps are kept. The backward pass computes each micro-batch again, with the same random numbers, just before
    its gradients, so that activations of one are alive at a time. What reads the maps sees all images: losses are those
    of the complete batch, whatever they divide by.

    Args:
        function: images (B, 3, H, W) -> maps (B, ...).
        images: (B, 3, H, W).
        size: images of a micro-batch; None for all.
    """
    if size is None or images.shape[0] <= size or not torch.is_grad_enabled():
        return function(images)
    parts = [checkpoint.checkpoint(function, part, use_reentrant=False) for part in images.split(size)]
    return tuple(_join(maps) for maps in zip(*parts, strict=True))


def _join(maps: tuple[Tensor, ...]) -> Tensor:
    """Concatenate maps (B, ...); an unused level stays a view of one zero."""
    first = maps[0]
    return torch.cat(maps) if any(first.stride()) else first[:1].expand(sum(map(len, maps)), *first.shape[1:])


@cache
def _contexts(narrow: bool) -> Callable[[], Any]:
    """Return the contexts of 'selective'; `narrow`: keep products that narrow their input too."""
    aten = torch.ops.aten
    linear = {getattr(aten, name).default for name in _LINEAR}
    attention = {getattr(aten, name).default for name in _ATTENTION if hasattr(aten, name)}

    def policy(_: Any, operation: Any, *args: Any, **__: Any) -> checkpoint.CheckpointPolicy:
        keep = operation in attention
        if operation in linear:
            width_in, width_out = args[-1].shape
            keep = width_out > width_in or (narrow and width_out < width_in)
        return checkpoint.CheckpointPolicy.MUST_SAVE if keep else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    return partial(checkpoint.create_selective_checkpoint_contexts, policy)
