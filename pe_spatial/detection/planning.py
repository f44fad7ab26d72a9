"""What the planner must know about detectors: example batches, and replacements of operations that need values."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
from mmcv.ops import multi_scale_deform_attn
from mmdet.models.dense_heads import RPNHead
from mmdet.models.detectors import SingleStageDetector, TwoStageDetector
from mmdet.models.roi_heads import SingleRoIExtractor
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.task_modules.samplers import PseudoSampler, SamplingResult
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from pe_spatial.detection.deta import detector as deta
from pe_spatial.planning.registry import register_example, sum_outputs, total_loss


@register_example(SingleStageDetector, counted="backbone, neck and head, without losses")
def _single_stage_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:  # noqa: ARG001
    with torch.autocast("meta"):
        return sum_outputs(model.bbox_head(model.extract_feat(images)))


@register_example(
    TwoStageDetector,
    counted="backbone, neck, proposals, RoI heads and losses with {objects} objects on an image and full samplers; not "
    "what NMS and RoIAlign use inside, and targets of masks are cut on the CPU, as from polygons",
)
def _two_stage_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:
    for owner, name, replacement in (
        (RPNHead, "_bbox_post_process", _keep_proposals),
        (PseudoSampler, "sample", _sample_each_once),
        (BBoxHead, "refine_bboxes", _keep_boxes),
        (SingleRoIExtractor, "forward", _pool_regions),
    ):
        replaced.enter_context(mock.patch.object(owner, name, replacement))
    replaced.enter_context(mock.patch("mmdet.structures.mask.mask_target.mask_target_single", _cut_masks))
    return total_loss(model, inputs=images, data_samples=_annotated(images, objects))


def _annotated(images: Tensor, objects: int) -> list[DetDataSample]:
    size = tuple(images.shape[-2:])
    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), size)
    boxes, labels = images.new_empty(objects, 4), images.new_empty(objects, dtype=torch.long)
    truth = InstanceData(bboxes=boxes, labels=labels, masks=boxes)  # `_cut_masks` does not read the masks
    return [
        DetDataSample(metainfo=dict(shapes, scale_factor=(1.0, 1.0)), gt_instances=truth, ignored_instances=truth[:0])
        for _ in images
    ]


def _keep_proposals(self: nn.Module, results: Any, cfg: Any, *_: Any, **__: Any) -> Any:  # noqa: ARG001
    return results[: cfg.max_per_img]


def _sample_each_once(self: Any, assigned: Any, predicted: Any, objects: Any, **_: Any) -> Any:  # noqa: ARG001
    boxes = predicted.priors
    indices = torch.arange(len(boxes), device=boxes.device)
    flags = boxes.new_zeros(len(boxes), dtype=torch.uint8)
    return SamplingResult(indices, indices[:0], boxes, objects.bboxes, assigned, flags, avg_factor_with_neg=False)


def _keep_boxes(self: nn.Module, sampling_results: Sequence[Any], *_: Any) -> list[Any]:  # noqa: ARG001
    return [InstanceData(bboxes=sample.priors) for sample in sampling_results]


def _cut_masks(boxes: Tensor, indices: Tensor, masks: Any, cfg: Any) -> Tensor:  # noqa: ARG001
    return boxes.new_empty(len(boxes), *_pair(cfg.mask_size))


def _pool_regions(self: Any, levels: Sequence[Tensor], rois: Tensor) -> Tensor:
    return _RoIAlign.apply(len(rois), _pair(self.roi_layers[0].output_size), *levels)


class _RoIAlign(torch.autograd.Function):
    """RoIAlign without values: it keeps only the boxes, and its gradient is one tensor for each level."""

    @staticmethod
    def forward(ctx: Any, number: int, size: tuple[int, int], *levels: Tensor) -> Tensor:
        ctx.shapes = [level.shape for level in levels]
        return levels[0].new_empty(number, levels[0].shape[1], *size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, None, *[grad.new_empty(shape) for shape in ctx.shapes]


class _DeformableAttention(torch.autograd.Function):
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


@register_example(deta.DETA, counted="backbone, neck, transformer, heads and focal losses")
def _deta_loss(model: deta.DETA, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:  # noqa: ARG001
    """Call the transformer with shapes made here, because the sizes of levels cannot be read on the meta device."""
    with torch.autocast("meta"):
        maps = model.backbone(images)
    levels = model.neck(tuple(x.float() for x in maps))
    batch_size = len(images)
    masks = [torch.zeros(batch_size, *x.shape[-2:], dtype=torch.bool, device="meta") for x in levels]
    mask = torch.cat([x.flatten(1) for x in masks], 1)  # (B, N)
    feat = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], 1)  # (B, N, C)
    feat_pos = torch.cat([
        model.positional_encoding(x).flatten(2).transpose(1, 2) + embed
        for x, embed in zip(masks, model.level_embed, strict=True)
    ], 1)  # fmt: skip
    geometry = dict(
        spatial_shapes=torch.empty(len(levels), 2, dtype=torch.long, device="meta"),
        level_start_index=torch.empty(len(levels), dtype=torch.long, device="meta"),
        valid_ratios=torch.empty(batch_size, len(levels), 2, device="meta"),
    )
    _replace_in_deta(model, mask.shape[1], len(levels), replaced)
    encoded = model.forward_encoder(feat=feat, feat_mask=mask, feat_pos=feat_pos, **geometry)
    queries, head = model.pre_decoder(**encoded)
    outputs = model.forward_decoder(memory_mask=mask, **geometry, **queries)
    logits, boxes = model.bbox_head(outputs["hidden_states"], outputs["references"])
    # The focal loss keeps the logits and makes as many values forward and backward; few boxes have a loss.
    proposals = head["proposals"]
    return sum(x.square().sum() for x in (logits, proposals["enc_logits"])) + boxes.sum() + proposals["enc_boxes"].sum()


def _replace_in_deta(model: deta.DETA, tokens: int, levels: int, replaced: ExitStack) -> None:
    def reference_points(shapes: Tensor, ratios: Tensor, device: Any) -> Tensor:  # noqa: ARG001
        return ratios.new_empty(len(ratios), tokens, levels, 2)

    def proposals(memory: Tensor, mask: Tensor, shapes: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG001
        kept = memory.masked_fill(mask[..., None], 0.0).masked_fill(mask[..., None], 0.0)
        return model.memory_trans_norm(model.memory_trans_fc(kept)), memory.new_empty(*memory.shape[:2], 4)

    def choice(*_: Any, number: int, **__: Any) -> Tensor:
        return torch.empty(number, dtype=torch.long, device="meta")

    for owner, name, replacement in (
        (multi_scale_deform_attn, "multi_scale_deformable_attn_pytorch", _DeformableAttention.apply),
        (model.encoder, "get_encoder_reference_points", reference_points),
        (model, "gen_encoder_output_proposals", proposals),
        (deta, "select_proposals", choice),
    ):
        replaced.enter_context(mock.patch.object(owner, name, replacement))
