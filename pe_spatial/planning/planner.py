"""What a training step costs in memory and arithmetic, found on the meta device: no weights are made, none computed.

Every operation of a real forward and backward pass runs on tensors without data, and a ledger follows the storages
that are alive, as they would be on a GPU: attention keeps what the fused kernels keep, autocast casts what it casts on
CUDA, deformable attention keeps what MMCV's kernel keeps, and checkpointed blocks run again. The losses are the
models' own, on an example batch. Where the course depends on values, the plan takes the most that can come: proposals
up to their number, samplers with full quotas, every pixel valid.

Not seen: what kernels allocate inside, the CUDA context, cuBLAS's and NCCL's buffers, and what the allocator wastes.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.nn.modules.utils import _pair
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from pe_spatial.encoder.vit import PerceptionEncoder


def build_on_meta(cfg: Any) -> tuple[nn.Module, Optimizer]:
    """Build the model and the optimizer of an mmengine config without making a single weight."""
    from mmengine.optim import build_optim_wrapper
    from mmengine.registry import MODELS, init_default_scope

    init_default_scope(cfg.get("default_scope", "mmengine"))
    with torch.device("meta"):
        model = MODELS.build(copy.deepcopy(cfg.model))  # MMDetection writes into it
    model = model.to("meta")  # torch.Tensor(n, m) makes values all the same
    return model, build_optim_wrapper(model, cfg.optim_wrapper).optimizer


def set_checkpointing(model: nn.Module, on: bool) -> None:
    """Let the encoder, and whatever else can, recompute its activations in the backward pass, or not."""
    for module in model.modules():
        if hasattr(module, "grad_checkpointing"):
            module.grad_checkpointing = on


@dataclass(frozen=True, kw_only=True)
class Step:
    """What one forward and backward pass takes on one GPU, in bytes and in operations, besides the weights.

    Args:
        saved: alive between forward and backward pass.
        activations: highest number alive at once, without the gradients of parameters; with the weights in bfloat16
            that autocast makes of the blocks' float32 ones.
        activations_without_copies: the same without these weights.
        peak: highest number alive at once, gradients of parameters included.
        forward_flops: multiplications and additions of matrix products, convolutions and attention, by data type.
        step_flops: the same, of forward and backward pass, with what checkpointing computes again.
        counted: the parts of the model that are in these numbers.
    """

    saved: int
    activations: int
    activations_without_copies: int
    peak: int
    forward_flops: Mapping[torch.dtype, int]
    step_flops: Mapping[torch.dtype, int]
    counted: str


class Ledger(TorchDispatchMode):
    """Follow the storages that operations make until they are freed, and count operations; on any device.

    Parameters and buffers of `model` are not counted, and gradients of parameters apart from everything else.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.alive: Counter[str] = Counter()  # bytes of each kind: activation, gradient, copy
        self.highest: Counter[str] = Counter()
        self.flops: Counter[torch.dtype] = Counter()
        self._model = model
        self._kinds: dict[int, str] = {}
        self._known = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
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
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            dtype = next(x.dtype for x in tree_leaves(args) if isinstance(x, Tensor))
            self.flops[dtype] += count(*args, **(kwargs or {}), out_val=out)
        return out

    def mark(self, x: Tensor, kind: str) -> None:
        """Count the storage of `x` as `kind` from now on."""
        key, size = x.untyped_storage()._cdata, x.untyped_storage().nbytes()
        if key in self._kinds:
            self.alive[self._kinds[key]] -= size
            self.alive[kind] += size
            self._kinds[key] = kind

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in self._kinds:
            return
        self._kinds[key] = "activation"
        self._refs[key] = weakref.ref(storage, lambda _: self._free(key, size))
        self.alive["activation"] += size
        now = self.alive
        for name, value in (
            ("activations", now["activation"] + now["copy"]),
            ("activations_without_copies", now["activation"]),
            ("peak", now.total()),
        ):
            self.highest[name] = max(self.highest[name], value)

    def _free(self, key: int, size: int) -> None:
        self.alive[self._kinds.pop(key)] -= size
        del self._refs[key]


# What CUDA's autocast casts, of what these models call (docs.pytorch.org/docs/stable/amp.html#autocast-op-reference).
_TO_BFLOAT16 = {
    F.linear, F.conv2d, F.conv_transpose2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.einsum,
    Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
}  # fmt: skip
_TO_FLOAT32 = {
    F.layer_norm, F.group_norm, F.softmax, F.log_softmax, torch.softmax, Tensor.softmax, F.cross_entropy, Tensor.sum,
    torch.sum, torch.norm, Tensor.norm, Tensor.pow, Tensor.__pow__, torch.exp, Tensor.exp, F.mse_loss, F.l1_loss,
    F.binary_cross_entropy_with_logits,
}  # fmt: skip

# What is read from tensors without values. MMCV asserts that shapes agree; averages are divided by a number; DETA reads
# the sizes of levels, for `select_proposals` alone; samplers call `unique` on what has no duplicates.
_READ = {
    Tensor.__bool__: lambda _: True,
    Tensor.__int__: lambda _: 1,
    Tensor.item: lambda _: 1.0,
    Tensor.tolist: lambda x: [0] * len(x),
    Tensor.unique: lambda x: x,
}


class _AsOnCuda(TorchFunctionMode):
    """Let tensors without data take CUDA's ways: its attention kernels and its autocast."""

    def __init__(self, model: nn.Module, ledger: Ledger, bfloat16: bool) -> None:
        super().__init__()
        self._ledger = ledger
        self._possible = bfloat16
        self._on = False
        self._outer: list[bool] = []
        self._cast: dict[Tensor, Tensor] = {}  # autocast casts a weight once
        self._modules = list(model.modules()) if bfloat16 else []
        self._ran: dict[nn.Module, bool] = {}  # under autocast or not
        self._of_blocks = {p for block in _blocks(model) for p in block.parameters()}

    def __enter__(self) -> _AsOnCuda:
        self._hooks = [module.register_forward_pre_hook(self._enter_module) for module in self._modules]
        self._hooks += [x.register_forward_hook(lambda *_: self._pop(), always_call=True) for x in self._modules]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*error)

    @contextmanager
    def autocast(self, enabled: bool = True) -> Iterator[None]:
        """Compute in bfloat16 where `enabled` and if the training does so."""
        self._push(enabled and self._possible)
        try:
            yield
        finally:
            self._pop()

    def _enter_module(self, module: nn.Module, _: Any) -> None:
        if torch._C._current_graph_task_id() == -1:  # no backward pass
            self._ran[module] = self._on
        self._push(self._ran[module])  # in the backward pass a checkpointed module runs as it did in the forward pass

    def _push(self, on: bool) -> None:
        self._outer.append(self._on)
        self._on = on

    def _pop(self) -> None:
        self._on = self._outer.pop()
        if not self._outer:
            self._cast.clear()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._on and func in _TO_BFLOAT16:
            args, kwargs = tree_map(self._to_bfloat16, (args, kwargs))
        elif self._on and func in _TO_FLOAT32:
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **kwargs)
        if func in _READ and args[0].is_meta:
            return _READ[func](args[0])
        return func(*args, **kwargs)

    def _to_bfloat16(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32:
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(torch.bfloat16)
        if x not in self._cast:
            self._cast[x] = x.to(torch.bfloat16)
            if x in self._of_blocks:
                self._ledger.mark(self._cast[x], "copy")
        return self._cast[x]


def _to_float32(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype == torch.bfloat16 else x


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The kernels that CUDA chooses; both keep q, k, v, the output and a logarithm for each query and head."""
    if attn_mask is None and q.dtype != torch.float32:
        return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p)[0]
    bias = None if attn_mask is None else attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, dropout_p)[0]


OBJECTS = 20
"""Of an image, if nothing else is said; COCO's have 7 on average."""


def measure_step(
    model: nn.Module,
    batch: int,
    size: Sequence[int],
    *,
    bfloat16: bool,
    frames: int | None = None,
    objects: int = OBJECTS,
) -> Step:
    """Run a training step of `model`, which lies on the meta device, and return what it takes.

    Args:
        batch: images, or clips.
        size: (H, W) of the images when they reach the model, in pixels.
        bfloat16: whether the training runs under autocast; DETA's float32 parts stay float32.
        frames: of a clip, for models that train on clips.
        objects: annotated in each image or clip.

    Raises RuntimeError or TypeError for models whose losses do not run without values.
    """
    model.train()
    images = torch.empty(batch, *([frames] if frames else []), 3, *size, device="meta")
    ledger = Ledger(model)
    with ExitStack() as replaced, ledger, _AsOnCuda(model, ledger, bfloat16) as cuda:
        replaced.enter_context(_autocast_on_meta(cuda))
        loss, counted = _loss(model, images, objects, cuda, replaced)
        saved, forward = ledger.alive.total(), dict(ledger.flops)
        # torch.autograd.backward would leave the mode of functions, and blocks that run again would not be in it
        _engine_run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
    model.zero_grad(set_to_none=True)
    return Step(saved=saved, forward_flops=forward, step_flops=dict(ledger.flops), counted=counted, **ledger.highest)


def _autocast_on_meta(cuda: _AsOnCuda) -> Any:
    real = torch.autocast

    def autocast(device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any) -> Any:
        if device_type == "meta":
            return cuda.autocast(enabled)
        return real(device_type, dtype, enabled, **options)

    return mock.patch("torch.autocast", autocast)


def _loss(model: nn.Module, images: Tensor, objects: int, cuda: _AsOnCuda, replaced: ExitStack) -> tuple[Tensor, str]:
    """Run the forward pass and return a sum that the backward pass can start from, and the names of what ran.

    Functions are replaced in `replaced`, which holds until the backward pass is over: checkpointing calls them again.
    """
    kinds = [kind.__name__ for kind in type(model).__mro__]
    if "DETA" in kinds:
        return _deta(model, images, cuda, replaced), "backbone, neck, transformer, heads and focal losses"
    example = next((_EXAMPLES[kind] for kind in kinds if kind in _EXAMPLES), None)
    with cuda.autocast():
        if example is not None:
            make, counted = example
            replaced.enter_context(_most_of_everything())
            losses = model(**make(images, objects), mode="loss")
            return model.parse_losses(losses)[0], counted.format(objects=objects)
        if isinstance(model, PerceptionEncoder):
            return _sum(model(images)), "the encoder"
        levels = model.backbone(images)
        if getattr(model, "neck", None) is not None:
            levels = model.neck(levels)
        if "SingleStageDetector" in kinds:
            return _sum(model.bbox_head(levels)), "backbone, neck and head, without losses"
        return _sum(levels), "backbone and neck; THE HEADS ARE NOT COUNTED"


def _sum(outputs: Any) -> Tensor:
    return torch.stack([x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor)]).sum()


def _pixel_batch(name: str, dtype: torch.dtype, images: Tensor, _: int) -> dict[str, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = [SegDataSample(**{name: PixelData(data=image[:1].to(dtype))}) for image in images]
    return dict(inputs=images, data_samples=samples)


def _detection_batch(images: Tensor, objects: int) -> dict[str, Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    size = tuple(images.shape[-2:])
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    boxes, labels = images.new_empty(objects, 4), images.new_empty(objects, dtype=torch.long)
    truth = InstanceData(bboxes=boxes, labels=labels, masks=boxes)  # whose masks nobody looks at, see `_cut_masks`
    samples = [
        DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)), gt_instances=truth, ignored_instances=truth[:0])
        for _ in images
    ]
    return dict(inputs=images, data_samples=samples)


def _clip_batch(clips: Tensor, objects: int) -> dict[str, Any]:
    batch, frames, _, h, w = clips.shape
    masks = torch.empty(batch, objects, frames, h, w, dtype=torch.bool, device=clips.device)
    return dict(inputs=list(clips.to(torch.uint8)), masks=list(masks))


# A class of models, or one of their bases -> what makes the arguments of its `forward` from images (B, 3, H, W) or
# clips (B, T, 3, H, W) and a number of objects, and what of the model that counts.
_EXAMPLES: dict[str, tuple[Callable[[Tensor, int], dict[str, Any]], str]] = {
    "DepthEstimator": (partial(_pixel_batch, "gt_depth_map", torch.float32), "backbone, depth head and losses"),
    "EncoderDecoder": (partial(_pixel_batch, "gt_sem_seg", torch.long), "backbone, decode head and its loss"),
    "TwoStageDetector": (
        _detection_batch,
        "backbone, neck, proposals, RoI heads and losses with {objects} objects on an image and full samplers; not "
        "what NMS and RoIAlign use inside, and targets of masks are cut on the CPU, as from polygons",
    ),
    "PESAM2": (
        _clip_batch,
        "encoder, tracker and losses with {objects} objects in a clip, and as many prompts and clicks as can be drawn",
    ),
}


@contextmanager
def _most_of_everything() -> Iterator[None]:
    """Let what depends on values take the most that can come: `nonzero` finds everything, NMS keeps its number."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch("torch.fx.experimental._config.meta_nonzero_assume_all_nonzero", True))
        for name, replacement in _REPLACED.items():
            if name.rpartition(".")[0].rpartition(".")[0] in sys.modules:
                stack.enter_context(mock.patch(name, replacement))
        yield


def _keep_proposals(self: nn.Module, results: Any, cfg: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG001
    return results[: cfg.max_per_img]


def _sample_each_once(self: Any, assigned: Any, predicted: Any, objects: Any, **_: Any) -> Any:  # noqa: ARG001
    from mmdet.models.task_modules.samplers import SamplingResult

    boxes = predicted.priors
    every = torch.arange(len(boxes), device=boxes.device)
    flags = boxes.new_zeros(len(boxes), dtype=torch.uint8)
    return SamplingResult(every, every[:0], boxes, objects.bboxes, assigned, flags, avg_factor_with_neg=False)


def _keep_boxes(self: nn.Module, sampling_results: Sequence[Any], *_: Any) -> list[Any]:  # noqa: ARG001
    from mmengine.structures import InstanceData

    return [InstanceData(bboxes=sample.priors) for sample in sampling_results]


def _cut_masks(boxes: Tensor, indices: Tensor, masks: Any, cfg: Any) -> Tensor:  # noqa: ARG001
    return boxes.new_empty(len(boxes), *_pair(cfg.mask_size))


def _pool_regions(self: nn.Module, levels: Sequence[Tensor], rois: Tensor) -> Tensor:
    return _PoolRegions.apply(len(rois), _pair(self.roi_layers[0].output_size), *levels)


def _most_clicks(self: Any, frames: int, _: Any) -> Any:
    return self.most(frames)


_REPLACED = {
    "mmdet.models.dense_heads.rpn_head.RPNHead._bbox_post_process": _keep_proposals,
    "mmdet.models.task_modules.samplers.PseudoSampler.sample": _sample_each_once,
    "mmdet.models.roi_heads.bbox_heads.BBoxHead.refine_bboxes": _keep_boxes,
    "mmdet.models.roi_heads.roi_extractors.SingleRoIExtractor.forward": _pool_regions,
    "mmdet.structures.mask.mask_target.mask_target_single": _cut_masks,
    "pe_spatial.tracking.sam2.training.Prompting.draw": _most_clicks,
}


class _PoolRegions(torch.autograd.Function):
    """RoIAlign without values: it keeps the boxes alone, and its gradient is one of each level."""

    @staticmethod
    def forward(ctx: Any, number: int, size: tuple[int, int], *levels: Tensor) -> Tensor:
        ctx.shapes = [level.shape for level in levels]
        return levels[0].new_empty(number, levels[0].shape[1], *size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *[grad.new_empty(shape) for shape in ctx.shapes]


class _SampleDeformably(torch.autograd.Function):
    """Deformable attention without values, which keeps what MMCV's CUDA kernel keeps.

    onedl-mmcv 2.3.6: mmcv/ops/multi_scale_deform_attn.py, `MultiScaleDeformableAttnFunction`.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, shapes: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(value, shapes, locations, weights)
        return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        value, _, locations, weights = ctx.saved_tensors
        return torch.zeros_like(value), None, torch.zeros_like(locations), torch.zeros_like(weights)


def _deta(model: nn.Module, images: Tensor, cuda: _AsOnCuda, replaced: ExitStack) -> Tensor:
    """DETA, whose transformer gets its shapes by hand: on the meta device no level's size can be read from a tensor."""
    with cuda.autocast():
        maps = model.backbone(images)
    levels = model.neck(tuple(x.float() for x in maps))
    batch = len(images)
    masks = [torch.zeros(batch, *x.shape[-2:], dtype=torch.bool, device="meta") for x in levels]
    mask = torch.cat([x.flatten(1) for x in masks], 1)  # (B, N)
    feat = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)  # (B, N, C)
    feat_pos = torch.cat([
        model.positional_encoding(x).flatten(2).transpose(1, 2) + embed
        for x, embed in zip(masks, model.level_embed, strict=True)
    ], 1)  # fmt: skip
    geometry = dict(
        spatial_shapes=torch.empty(len(levels), 2, dtype=torch.long, device="meta"),
        level_start_index=torch.empty(len(levels), dtype=torch.long, device="meta"),
        valid_ratios=torch.empty(batch, len(levels), 2, device="meta"),
    )
    replaced.enter_context(_without_values(model, mask.shape[1], len(levels)))
    encoded = model.forward_encoder(feat=feat, feat_mask=mask, feat_pos=feat_pos, **geometry)
    queries, head = model.pre_decoder(**encoded)
    outputs = model.forward_decoder(memory_mask=mask, **geometry, **queries)
    logits, boxes = model.bbox_head(outputs["hidden_states"], outputs["references"])
    # The focal loss keeps the logits, and makes as many values forwards and backwards; few boxes have a loss.
    proposals = head["proposals"]
    return sum(x.square().sum() for x in (logits, proposals["enc_logits"])) + boxes.sum() + proposals["enc_boxes"].sum()


@contextmanager
def _without_values(model: nn.Module, tokens: int, levels: int) -> Iterator[None]:
    def reference_points(shapes: Tensor, ratios: Tensor, device: Any) -> Tensor:  # noqa: ARG001
        return ratios.new_empty(len(ratios), tokens, levels, 2)

    def proposals(memory: Tensor, mask: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        kept = memory.masked_fill(mask[..., None], 0.0).masked_fill(mask[..., None], 0.0)
        return model.memory_trans_norm(model.memory_trans_fc(kept)), memory.new_empty(*memory.shape[:2], 4)

    def choice(*_: Any, number: int, **__: Any) -> Tensor:
        return torch.empty(number, dtype=torch.long, device="meta")

    with (
        mock.patch("mmcv.ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch", _SampleDeformably.apply),
        mock.patch.object(model.encoder, "get_encoder_reference_points", reference_points),
        mock.patch.object(model, "gen_encoder_output_proposals", proposals),
        mock.patch("pe_spatial.detection.deta.model.select_proposals", choice),
    ):
        yield


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes that the weights and what belongs to them take on one GPU, all through the training.

    Args:
        parameters, gradients, states: of the model and the optimizer.
        extra: under DDP the buckets in which gradients are averaged; under FSDP what is gathered at the same time: the
            root unit and its gradients, the parameters of three blocks (in use, fetched ahead, and on their way) and
            the gradients of one, as computed and in float32 for the reduction.
        update: what the optimizer's step makes in passing, when no activations are alive.
    """

    parameters: int
    gradients: int
    states: int
    extra: int
    update: int

    @property
    def kept(self) -> int:
        """The sum of all but `update`."""
        return self.parameters + self.gradients + self.states + self.extra


def measure_weights(
    model: nn.Module, optimizer: Optimizer, *, shards: int | None, bfloat16: bool = False, buckets: bool = False
) -> Weights:
    """Let `optimizer` step on `model`, both on the meta device, and return what weights and states take.

    Args:
        shards: GPUs over which parameters, gradients and states are cut along their first dimension (FSDP), with one
            unit for each block of an encoder; None for whole ones on each GPU. Counted is the first GPU's part, which
            is the largest.
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
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
    kept = ledger.alive.total()
    model.zero_grad(set_to_none=True)
    optimizer.state.clear()

    gradients = _bytes(trained)
    blocks = _blocks(model) if shards else []
    in_blocks = {p for block in blocks for p in block.parameters()}
    root = [p for p in model.parameters() if p not in in_blocks]
    largest = max((_bytes(block.parameters()) for block in blocks), default=0)
    gathered = _bytes(root) + _bytes(p for p in root if p.requires_grad) + largest * (4 * (0.5 if bfloat16 else 1) + 1)
    return Weights(
        parameters=_bytes(model.parameters(), shards),
        gradients=_bytes(trained, shards),
        states=_bytes(states, shards),
        extra=int(gathered) if shards else gradients * buckets,
        update=(ledger.highest["peak"] - kept) // (shards or 1),
    )


def _bytes(tensors: Iterable[Tensor], shards: int | None = None) -> int:
    """Bytes of the tensors; of the first of `shards` parts, as FSDP2 cuts them."""
    return sum(
        x.nbytes if shards is None or not x.ndim else -(-x.shape[0] // shards) * (x.nbytes // x.shape[0])
        for x in tensors
    )


def _blocks(model: nn.Module) -> list[nn.Module]:
    return [block for x in model.modules() if isinstance(x, PerceptionEncoder) for block in x.blocks]
