"""The ledger of a training step on the meta device, and CUDA's rules: its attention kernels and its autocast."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from pe_spatial.encoder.vit import PerceptionEncoder

_torch_autocast = torch.autocast


class Ledger(TorchDispatchMode):
    """Track the storages that operations allocate until they are freed, and count operations; on any device.

    Parameters and buffers of `model` are not counted; gradients of parameters are counted apart from everything else,
    also before they are complete.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.flops: Counter[torch.dtype] = Counter()
        self._model = model
        self._kinds: list[str] = []  # of every storage, in the order of their creation: activation, gradient, copy
        self._changes: list[tuple[int, int]] = []  # (storage by its place in this order, bytes that it takes or frees)
        self._alive: dict[int, int] = {}  # address of a storage -> its place in this order
        self._terms: dict[int, list[int]] = {}  # of sums and copies; autograd adds up gradients
        self._weights = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
        self._refs: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> Ledger:
        self._hooks = [
            parameter.register_post_accumulate_grad_hook(lambda p: self.mark(p.grad, "gradient"))
            for parameter in self._model.parameters()
            if parameter.requires_grad
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x.untyped_storage())
        if func in (torch.ops.aten.add.Tensor, torch.ops.aten.copy_.default):
            place, *others = [self._place(x) for x in (out, *args) if isinstance(x, Tensor)]
            self._terms[place] = [other for other in others if other != place]
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            dtype = next(x.dtype for x in tree_leaves(args) if isinstance(x, Tensor))
            self.flops[dtype] += count(*args, **(kwargs or {}), out_val=out)
        return out

    def mark(self, x: Tensor, kind: str) -> None:
        """Count the storage of `x` as `kind`, from its creation on, and those that it is the sum of."""
        marked = [self._place(x)]
        while marked:
            place = marked.pop()
            if place >= 0:
                self._kinds[place] = kind
                marked += self._terms.get(place, ())

    def _place(self, x: Tensor) -> int:
        """Return the place of the storage of `x` in the order of creation, -1 if it is not counted."""
        return self._alive.get(x.untyped_storage()._cdata, -1)

    @property
    def alive(self) -> int:
        """Bytes of the storages that are not freed yet."""
        return sum(size for _, size in self._changes)

    @property
    def highest(self) -> Counter[str]:
        """The maxima over time of activations, with and without copies of weights, and of all."""
        now: Counter[str] = Counter()
        highest: Counter[str] = Counter()
        for number, size in self._changes:
            now[self._kinds[number]] += size
            activations, copies = now["activation"], now["copy"]
            highest |= Counter(
                activations=activations + copies, activations_without_copies=activations, peak=now.total()
            )
        return highest

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._weights or key in self._alive:
            return
        self._alive[key] = len(self._kinds)
        self._kinds.append("activation")
        self._changes.append((self._alive[key], size))
        self._refs[key] = weakref.ref(storage, lambda _: self._free(key, size))

    def _free(self, key: int, size: int) -> None:
        self._changes.append((self._alive.pop(key), -size))
        del self._refs[key]


# The functions of these models that CUDA's autocast casts
# (docs.pytorch.org/docs/stable/amp.html#autocast-op-reference).
_TO_BFLOAT16 = {
    F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip
_TO_FLOAT32 = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax, F.cross_entropy, Tensor.sum,
    torch.sum, torch.norm, Tensor.norm, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, F.mse_loss, F.l1_loss,
    F.binary_cross_entropy_with_logits,
}  # fmt: skip

# Results of functions that read values: MMCV asserts that shapes agree, averages are divided by a number, DETA reads
# the sizes of levels, and samplers call `unique` on indices without duplicates.
_ASSUMED_VALUES = {
    Tensor.__bool__: lambda _: True,
    Tensor.__int__: lambda _: 1,
    Tensor.item: lambda _: 1.0,
    Tensor.tolist: lambda x: [0] * len(x),
    Tensor.unique: lambda x: x,
}


class EmulateCuda(TorchFunctionMode):
    """Run tensors without values as CUDA would: with its attention kernels and its autocast.

    torch.autocast then accepts the device type 'meta'; it does nothing unless `bfloat16`. The ledger counts the
    bfloat16 copies of the weights of the model's blocks apart.
    """

    def __init__(self, model: nn.Module, ledger: Ledger, bfloat16: bool) -> None:
        super().__init__()
        self._ledger = ledger
        self._bfloat16 = bfloat16
        self._enabled = False
        self._outer: list[bool] = []
        self._copies: dict[Tensor, Tensor] = {}  # autocast casts each weight once
        self._modules = list(model.modules()) if bfloat16 else []
        self._ran: dict[nn.Module, bool] = {}  # whether under autocast
        self._block_weights = {p for block in encoder_blocks(model) for p in block.parameters()}

    def __enter__(self) -> EmulateCuda:
        self._hooks = [module.register_forward_pre_hook(self._enter_module) for module in self._modules]
        self._hooks += [x.register_forward_hook(lambda *_: self._pop(), always_call=True) for x in self._modules]
        self._patch = mock.patch("torch.autocast", self._autocast)
        self._patch.start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        self._patch.stop()
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    def _autocast(
        self, device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any
    ) -> AbstractContextManager[Any]:
        if device_type == "meta":
            return self._autocast_on_meta(enabled)
        return _torch_autocast(device_type, dtype, enabled, **options)

    @contextmanager
    def _autocast_on_meta(self, enabled: bool) -> Iterator[None]:
        self._push(enabled and self._bfloat16)
        try:
            yield
        finally:
            self._pop()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # not in a backward pass
            self._ran[module] = self._enabled
        self._push(self._ran[module])  # in the backward pass a checkpointed module runs as it did in the forward pass

    def _push(self, enabled: bool) -> None:
        self._outer.append(self._enabled)
        self._enabled = enabled

    def _pop(self) -> None:
        self._enabled = self._outer.pop()
        if not self._outer:
            self._copies.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._enabled and func in _TO_BFLOAT16:
            args, kwargs = tree_map(self._to_bfloat16, (args, kwargs))
        elif self._enabled and func in _TO_FLOAT32:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _ASSUMED_VALUES and args[0].is_meta:
            return _ASSUMED_VALUES[func](args[0])
        return func(*args, **kwargs)

    def _to_bfloat16(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            copy = x.to(torch.bfloat16)
            if x in self._block_weights:  # frozen: cast at every use
                self._ledger.mark(copy, "copy")
            return copy
        if x not in self._copies:
            self._copies[x] = x.to(torch.bfloat16)
            if x in self._block_weights:
                self._ledger.mark(self._copies[x], "copy")
        return self._copies[x]


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """Call the kernel that CUDA chooses; both keep q, k, v, the output and a logarithm for each query and head."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p)[0]


def encoder_blocks(model: nn.Module) -> list[nn.Module]:
    return [block for x in model.modules() if isinstance(x, PerceptionEncoder) for block in x.blocks]
