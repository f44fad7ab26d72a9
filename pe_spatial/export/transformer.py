"""DETR, Deformable DETR, DINO and their kind as one graph: pixels in; boxes, scores and labels out.

The transformer's code is the model's own, on shapes of levels that are numbers or symbols instead of a tensor, with
deformable attention as `grid_sample`. Images are padded as in a batch of images of one size.
B images, L levels, Q queries, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.dense_heads import DETRHead
from mmdet.models.detectors import DDQDETR, DETR, DINO, DeformableDETR, GroundingDINO
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor

from pe_spatial.errors import ConfigError
from pe_spatial.export.deformable import attended, cells, inside, proposals
from pe_spatial.export.detections import DetectorGraph, clipped, corners, rescaled
from pe_spatial.export.pixels import Pixels


class SampledAttention(MultiScaleDeformableAttention):
    """`MultiScaleDeformableAttention` on shapes of levels that are numbers or symbols."""

    def forward(
        self, query: Tensor, value: Tensor | None = None, query_pos: Tensor | None = None, *, identity: Any = None,
        key_padding_mask: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]], **_: Any,
    ) -> Tensor:  # fmt: skip
        assert self.batch_first
        assert identity is None
        position = torch.zeros_like(query) if query_pos is None else query_pos
        value = query if value is None else value
        return attended(self, query, position, value, key_padding_mask, reference_points, spatial_shapes)


class TransformerGraph(DetectorGraph):
    """A `DetectionTransformer`; ConfigError for one that selects its queries or results in a way of its own."""

    def __init__(self, model: Any, pixels: Pixels) -> None:
        check_parts(model)
        super().__init__(model, pixels)
        for module in self.model.modules():
            if type(module) is MultiScaleDeformableAttention:
                module.__class__ = SampledAttention
        self.model.bbox_head.predict_by_feat = lambda *outputs, **_: outputs  # the last layer's, without a selection
        self.deformable = isinstance(model, DeformableDETR)
        if isinstance(model, DINO):
            self.model.forward_decoder = self._decode

    def stages(self) -> list[str]:
        """Return the names of what `forward` returns after the results."""
        count = self.model.num_feature_levels if self.deformable else 1
        return [*self.layers, *(f"level_{i}" for i in range(count)), "logits", "boxes_of_queries"]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, 3) uint8 RGB -> boxes (B, D, 4) in pixels, scores, labels and valid (B, D), and stages."""
        images, size = self.pixels(pixels)
        maps, levels = self.levels(images)
        prepare = self._deformable if self.deformable else self._plain
        self.model.pre_transformer = lambda features, _: prepare(features, images, size)
        hidden = self.model.forward_transformer(levels, None)
        logits, boxes = (x[-1] for x in self.model.bbox_head.predict(**hidden, batch_data_samples=()))
        found = self._select(logits, boxes, size, (pixels.shape[1], pixels.shape[2]))
        return (*found, *maps, *(levels if self.deformable else levels[-1:]), logits, boxes)

    def _plain(self, levels: Sequence[Tensor], images: Tensor, size: tuple[int, int]) -> Any:
        """As `DETR.pre_transformer`."""
        level = levels[-1]
        padding = self._padding(level, images, size)
        positions = self.model.positional_encoding(padding).flatten(2).transpose(1, 2)
        padding = padding.flatten(1)
        tokens = dict(feat=level.flatten(2).transpose(1, 2), feat_mask=padding, feat_pos=positions)
        return tokens, dict(memory_mask=padding, memory_pos=positions)

    def _deformable(self, levels: Sequence[Tensor], images: Tensor, size: tuple[int, int]) -> Any:
        """As `DeformableDETR.pre_transformer`, with shapes that are no tensors."""
        model = self.model
        paddings = [self._padding(level, images, size) for level in levels]
        positions = [
            model.positional_encoding(padding).flatten(2).transpose(1, 2) + embed
            for padding, embed in zip(paddings, model.level_embed, strict=True)
        ]
        model.encoder.get_encoder_reference_points = lambda shapes, ratios, **_: cells(shapes, ratios)
        model.gen_encoder_output_proposals = lambda memory, mask, _: proposals(model, memory, mask, paddings)
        shapes = dict(
            spatial_shapes=[(level.shape[2], level.shape[3]) for level in levels], level_start_index=None,
            valid_ratios=torch.stack([model.get_valid_ratio(padding) for padding in paddings], dim=1),
        )  # fmt: skip
        padding = torch.cat([part.flatten(1) for part in paddings], dim=1)
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        inputs = dict(feat=tokens, feat_mask=padding, feat_pos=torch.cat(positions, dim=1), **shapes)
        return inputs, dict(memory_mask=padding, **shapes)

    def _decode(self, memory: Tensor, memory_mask: Tensor, dn_mask: None, **inputs: Any) -> dict[str, Any]:
        """As `DINO.forward_decoder`, which asks for the length of a batch, and so fixes it."""
        branches = self.model.bbox_head.reg_branches
        states, references = self.model.decoder(
            value=memory, key_padding_mask=memory_mask, self_attn_mask=dn_mask, reg_branches=branches, **inputs
        )
        return dict(hidden_states=states, references=list(references))

    @staticmethod
    def _padding(level: Tensor, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return which cells of a level are padding, (B, h, w)."""
        return ~inside(level.shape[-2:], images, size).expand(level.shape[0], -1, -1)

    def _select(self, logits: Tensor, boxes: Tensor, size: tuple[int, int], original: tuple[int, int]) -> Any:
        """As `DETRHead._predict_by_feat_single`."""
        head = self.model.bbox_head
        number = head.test_cfg.get("max_per_img", logits.shape[1])
        if head.loss_cls.use_sigmoid:
            scores, index = logits.sigmoid().flatten(1).topk(number)
            labels, index = index % head.num_classes, index // head.num_classes
        else:
            scores, classes = logits.softmax(-1)[..., :-1].max(-1)
            scores, index = scores.topk(number)
            labels = classes.gather(1, index)
        chosen = bbox_cxcywh_to_xyxy(boxes.gather(1, index[..., None].expand(-1, -1, 4)))
        found = clipped(chosen * corners(chosen, size), size)
        return rescaled(found, size, original), scores, labels, torch.ones_like(labels, dtype=torch.bool)


def check_parts(model: Any) -> None:
    """Raise ConfigError for a transformer that this graph does not write."""
    head, name = model.bbox_head, type(model).__name__
    if isinstance(model, DDQDETR | GroundingDINO) or not isinstance(model, DETR | DeformableDETR):
        raise ConfigError(f"a {name} selects its queries by a method of its own, which is not exported")
    if type(head)._predict_by_feat_single is not DETRHead._predict_by_feat_single:
        raise ConfigError(f"{type(head).__name__} selects its results by a method of its own, which is not exported")
