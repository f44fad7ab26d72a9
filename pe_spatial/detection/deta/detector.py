"""DETA: Deformable DETR that applies NMS to the proposals of each level and starts queries from their tokens.

Based on MMDetection's `DeformableDETR`. Source of every rule that differs from it:
perception_models@3e352cc:apps/detection/DETA_pe/models/deformable_transformer.py.
B images, N tokens of all levels, L levels, Q queries, C channels. Boxes are (cx, cy, w, h) in 0..1 of the image
without padding.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.models.detectors import DeformableDETR
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import batched_nms

from pe_spatial.errors import ConfigError, DatasetError


@MODELS.register_module()
class CanvasPreprocessor(DetDataPreprocessor):
    """DetDataPreprocessor with one square canvas; `pad_size_divisor` is its side in pixels.

    Raises DatasetError for a larger image, which MMDetection would put on a canvas of twice the side.
    """

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Normalize the images and pad them with zeros on the right and at the bottom."""
        side = self.pad_size_divisor
        for index, image in enumerate(data["inputs"]):
            h, w = image.shape[-2:]
            if max(h, w) > side:
                samples = data.get("data_samples") or []
                path = samples[index].get("img_path") if index < len(samples) else None
                raise DatasetError(
                    f"{path or f'image {index} of the batch'} is {w} x {h} px when it reaches the model, and its "
                    f"canvas has {side} px; resize it to at most {side} px in the pipeline, or increase "
                    "model.data_preprocessor.pad_size_divisor"
                )
        return super().forward(data, training)


@MODELS.register_module()
class DETA(DeformableDETR):
    """Two-stage Deformable DETR with box refinement; `select_proposals` chooses the proposals.

    Each query starts from the box of its proposal and the token that proposed it (`pix_trans_fc`). No query is learned,
    so `num_queries` may change after training. Everything but the backbone computes in float32 under autocast.
    `bbox_head` is a `DETAHead`; its `loss` gets the decoder's outputs and `proposals`, a dict of

    - anchors (B, N, 4): boxes of all tokens; (1, 1, 1, 1) for tokens in the padding or too close to a border;
    - init_reference (B, Q, 4): the boxes of the chosen proposals, best first;
    - enc_logits (B, N, classes) and enc_boxes (B, N, 4): predictions of all tokens; column 0 is the objectness.

    Args:
        num_queries: number of proposals that reach the decoder.
        num_feature_levels: number of maps that the neck returns.
        neck: as in `DeformableDETR`, but `in_channels` defaults to those of the backbone's pyramid.
        nms_pre: number of proposals of each level that enter the NMS.
        nms_iou_threshold: IoU above which the NMS drops the lower of two proposals of one level.
        grad_checkpointing: recompute the activations of the deformable encoder's layers in the backward pass.
        options: options of `DeformableDETR`.
    """

    def __init__(
        self,
        *,
        num_queries: int = 900,
        num_feature_levels: int = 5,
        neck: Mapping[str, Any],
        nms_pre: int = 1000,
        nms_iou_threshold: float = 0.9,
        grad_checkpointing: bool = False,
        **options: Any,
    ) -> None:
        self.nms_pre = nms_pre
        self.nms_iou_threshold = nms_iou_threshold
        self.grad_checkpointing = grad_checkpointing
        super().__init__(
            num_queries=num_queries,
            num_feature_levels=num_feature_levels,
            with_box_refine=True,
            as_two_stage=True,
            **options,
        )
        if "in_channels" not in neck:
            neck = {**neck, "in_channels": list(self.backbone.pyramid.out_channels)}
        self.neck = MODELS.build(neck)

    def _init_layers(self) -> None:
        super()._init_layers()
        self.pix_trans_fc = nn.Linear(self.embed_dims, self.embed_dims)
        self.pix_trans_norm = nn.LayerNorm(self.embed_dims)

    def init_weights(self) -> None:
        super().init_weights()
        nn.init.xavier_uniform_(self.pix_trans_fc.weight)

    def loss(self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample]) -> dict[str, Tensor]:
        """Images (B, 3, H, W) and their objects -> the head's losses."""
        levels = self.extract_feat(batch_inputs)
        with _float32(batch_inputs):
            outputs = self.forward_transformer(levels, batch_data_samples)
            return self.bbox_head.loss(**outputs, batch_data_samples=batch_data_samples)

    def predict(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample], rescale: bool = True
    ) -> list[DetDataSample]:
        """Images (B, 3, H, W) -> the samples with `pred_instances`; with `rescale` in pixels of the original image."""
        levels = self.extract_feat(batch_inputs)
        with _float32(batch_inputs):
            outputs = self.forward_transformer(levels, batch_data_samples)
            del outputs["proposals"]
            results = self.bbox_head.predict(**outputs, batch_data_samples=batch_data_samples, rescale=rescale)
        return self.add_pred_to_datasample(batch_data_samples, results)

    def _forward(
        self, batch_inputs: Tensor, batch_data_samples: list[DetDataSample] | None = None
    ) -> tuple[Tensor, Tensor]:
        levels = self.extract_feat(batch_inputs)
        with _float32(batch_inputs):
            outputs = self.forward_transformer(levels, batch_data_samples)
            return self.bbox_head(outputs["hidden_states"], outputs["references"])

    def extract_feat(self, batch_inputs: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) -> L maps (B, C, h, w): the backbone under autocast, the neck in full precision."""
        maps = self.backbone(batch_inputs)
        with _float32(batch_inputs):
            return self.neck(tuple(x.to(self.level_embed.dtype) for x in maps))

    def forward_encoder(
        self, feat: Tensor, feat_mask: Tensor | None, feat_pos: Tensor, **levels: Tensor
    ) -> dict[str, Any]:
        """Tokens (B, N, C) -> `memory` of the same shape, and what `pre_decoder` needs besides it.

        `levels` are spatial_shapes (L, 2), level_start_index (L,) and valid_ratios (B, L, 2).
        """
        if not (self.grad_checkpointing and torch.is_grad_enabled()):
            return super().forward_encoder(feat, feat_mask, feat_pos, **levels)
        shapes, ratios = levels["spatial_shapes"], levels["valid_ratios"]
        points = self.encoder.get_encoder_reference_points(shapes, ratios, device=feat.device)
        options = dict(levels, query_pos=feat_pos, key_padding_mask=feat_mask, reference_points=points)
        for layer in self.encoder.layers:
            feat = checkpoint(layer, feat, use_reentrant=False, **options)
        return dict(memory=feat, memory_mask=feat_mask, spatial_shapes=shapes)

    def pre_decoder(
        self, memory: Tensor, memory_mask: Tensor | None, spatial_shapes: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Choose the proposals and make queries from them.

        Takes the encoder's output (B, N, C), a mask (B, N), True on padding, or None, and (h, w) of the levels (L, 2).
        """
        states, anchors = self.gen_encoder_output_proposals(memory, memory_mask, spatial_shapes)
        stage = self.decoder.num_layers
        logits = self.bbox_head.cls_branches[stage](states)
        unbounded = self.bbox_head.reg_branches[stage](states) + anchors  # infinite where the token is invalid
        boxes = unbounded.sigmoid()
        sizes = spatial_shapes.prod(1).tolist()
        rules: dict[str, Any] = dict(nms_pre=self.nms_pre, iou_threshold=self.nms_iou_threshold)
        images = zip(boxes.detach(), logits[..., 0].detach(), strict=True)
        chosen = torch.stack([select_proposals(*image, sizes, number=self.num_queries, **rules) for image in images])
        chosen = chosen[..., None]  # (B, Q, 1)
        unbounded, tokens = (x.detach().take_along_dim(chosen, dim=1) for x in (unbounded, states))
        position = self.get_proposal_pos_embed(unbounded, num_pos_feats=self.embed_dims // 2)  # (B, Q, 2 C)
        query_pos, query = self.pos_trans_norm(self.pos_trans_fc(position)).chunk(2, dim=-1)
        query = query + self.pix_trans_norm(self.pix_trans_fc(tokens))
        reference = unbounded.sigmoid()
        proposals = dict(anchors=anchors.sigmoid(), init_reference=reference, enc_logits=logits, enc_boxes=boxes)
        queries = dict(query=query, query_pos=query_pos, memory=memory, reference_points=reference)
        return queries, dict(proposals=proposals)


def select_proposals(
    boxes: Tensor, logits: Tensor, sizes: Sequence[int], *, number: int, nms_pre: int = 1000, iou_threshold: float = 0.9
) -> Tensor:
    """Return the tokens (number,) whose proposals become queries, best first.

    NMS is applied to the best proposals of each level. Each level then gets an equal number of queries, and the best of
    the others fill the rest. If fewer than `number` survive the NMS, the best of all are taken without it.

    A level with fewer than `nms_pre` tokens enters with all of them. The reference adds arbitrary tokens of other
    levels, which only matters where fewer than `number` better ones survive.

    Args:
        boxes, logits: boxes (N, 4) and objectness (N,) of all tokens of an image.
        sizes: number of tokens in each level.
        number: number of queries; ConfigError if there are fewer tokens.
        nms_pre, iou_threshold: as `nms_pre` and `nms_iou_threshold` in `DETA`.
    """
    if len(logits) < number:
        raise ConfigError(
            f"num_queries is {number}, but an image has only {len(logits)} tokens in its {len(sizes)} levels; "
            "lower model.num_queries or enlarge the images (model.data_preprocessor.pad_size_divisor)"
        )
    level_of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(logits.device)
    scores = logits.sigmoid()
    starts = [sum(sizes[:level]) for level in range(len(sizes))]
    levels = zip(starts, scores.split(list(sizes)), strict=True)
    best = torch.cat([start + level.topk(min(nms_pre, len(level))).indices for start, level in levels])
    corners = bbox_cxcywh_to_xyxy(boxes[best].float()).clamp(0, 1)
    kept = best[batched_nms(corners, logits[best].float(), level_of[best], iou_threshold)]
    if len(kept) < number:
        return logits.topk(number).indices
    ranks = F.one_hot(level_of[kept], len(sizes)).cumsum(0)  # (K, L): rank of each within its level
    within = ranks.gather(1, level_of[kept, None])[:, 0] <= number // len(sizes)
    fill = ~within & ((~within).cumsum(0) <= number - within.sum())
    return kept[within | fill]


def _float32(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context without autocast: neither deformable attention's kernel nor NMS on CPUs supports bfloat16."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)  # 'meta' has no autocast
