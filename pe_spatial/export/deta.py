"""DETA as one graph: pixels of at most the canvas in; boxes, scores and labels out. The layers are the trained model's.

The canvas is square and fixed, and so are all numbers of tokens.
B images, N tokens of all levels, L levels, Q queries, D detections. Boxes inside are (cx, cy, w, h) in 0..1 of the
image without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor

from pe_spatial.errors import ConfigError
from pe_spatial.export.deformable import attended, cells, inside, proposals
from pe_spatial.export.detections import DetectorGraph, blanked, corners
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import LOWEST, best, kept_by_nms, separated, suppressed

_VANILLA = 1000  # boxes from which torchvision's `batched_nms` suppresses class by class on a CPU


class DETAGraph(DetectorGraph):
    """A `DETA`; ConfigError for a suppression other than plain NMS."""

    groups: Tensor

    def __init__(self, model: Any, pixels: Pixels) -> None:
        super().__init__(model, pixels)
        self.options = dict(model.bbox_head.test_cfg)
        method = self.options.pop("method", "nms")
        if method != "nms":
            raise ConfigError(f"test_cfg.method is {method!r}; DETA is exported with 'nms'")
        self.layers = [f"layer_{i}" for i in model.backbone.encoder.out_indices]
        classes = model.bbox_head.cls_out_channels
        groups = self.options.get("class_ids") or range(classes)
        self.register_buffer("groups", torch.tensor(list(groups), dtype=torch.float32), persistent=False)

    def stages(self) -> list[str]:
        """Return the names of what `forward` returns after the results."""
        return [*self.layers, *(f"level_{i}" for i in range(self.model.num_feature_levels)), "memory", "objectness"]

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, 3) uint8 RGB -> boxes (B, D, 4) in pixels, scores, labels and valid (B, D), and stages."""
        images, size = self.pixels(pixels)
        model = self.model
        maps = model.backbone.encoder(model.backbone.normalize(images))
        levels = model.neck(tuple(model.backbone.pyramid(maps)))
        shapes = [(int(level.shape[2]), int(level.shape[3])) for level in levels]
        padding = [~inside(shape, images, size) for shape in shapes]  # (1, h, w), True on padding
        tokens = torch.cat([level.flatten(2).transpose(1, 2) for level in levels], dim=1)
        positions = torch.cat(
            [model.positional_encoding(mask).flatten(2).transpose(1, 2) + embed
             for mask, embed in zip(padding, model.level_embed, strict=True)], dim=1
        )  # fmt: skip
        mask = torch.cat([part.flatten(1) for part in padding], dim=1)
        ratios = torch.stack([model.get_valid_ratio(part) for part in padding], dim=1)  # (1, L, 2)
        memory = self._encode(tokens, positions, mask, shapes, ratios)
        query, query_pos, reference, objectness = self._propose(memory, mask, shapes, padding)
        logits, boxes = self._decode(query, query_pos, reference, memory, mask, shapes, ratios)
        results = self._select(logits, boxes, (pixels.shape[1], pixels.shape[2]))
        return (*results, *maps, *levels, torch.where(mask[..., None], 0.0, memory), objectness)

    def _encode(
        self, x: Tensor, positions: Tensor, mask: Tensor, shapes: Sequence[tuple[int, int]], ratios: Tensor
    ) -> Tensor:
        reference = cells(shapes, ratios)
        for layer in self.model.encoder.layers:
            x = layer.norms[0](attended(layer.self_attn, x, positions, x, mask, reference, shapes))
            x = layer.norms[1](layer.ffn(x))
        return x

    def _propose(
        self, memory: Tensor, mask: Tensor, shapes: Sequence[tuple[int, int]], padding: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries and their positions (B, Q, C), boxes (B, Q, 4), and the objectness of all tokens (B, N)."""
        model = self.model
        states, anchors = proposals(model, memory, mask, padding)
        stage = model.decoder.num_layers
        objectness = model.bbox_head.cls_branches[stage](states)[..., 0]
        unbounded = model.bbox_head.reg_branches[stage](states) + anchors
        chosen = self._chosen(unbounded.sigmoid(), objectness, [h * w for h, w in shapes])[..., None]
        unbounded = unbounded.gather(1, chosen.expand(-1, -1, 4))
        states = states.gather(1, chosen.expand(-1, -1, states.shape[2]))
        position = model.get_proposal_pos_embed(unbounded, num_pos_feats=model.embed_dims // 2)
        query_pos, query = model.pos_trans_norm(model.pos_trans_fc(position)).chunk(2, dim=-1)
        query = query + model.pix_trans_norm(model.pix_trans_fc(states))
        return query, query_pos, unbounded.sigmoid(), objectness

    def _chosen(self, boxes: Tensor, objectness: Tensor, sizes: Sequence[int]) -> Tensor:
        """Return the tokens (B, Q) of the proposals that become queries, as `select_proposals`."""
        model, number = self.model, self.model.num_queries
        corners = bbox_cxcywh_to_xyxy(boxes).clamp(0, 1)
        if sum(min(model.nms_pre, size) for size in sizes) < number:
            return objectness.topk(number).indices
        starts = [sum(sizes[:level]) for level in range(len(sizes))]
        tokens, levels, kept = [], [], []
        for level, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            index = objectness[:, start : start + size].topk(min(model.nms_pre, size)).indices + start
            box = corners.gather(1, index[..., None].expand(-1, -1, 4))
            score = objectness.gather(1, index)
            kept.append(suppressed(box, score, score > LOWEST, model.nms_iou_threshold))
            tokens.append(index)
            levels.append(torch.full_like(index, level))
        token, level_of, keep = (torch.cat(part, dim=1) for part in (tokens, levels, kept))
        order = torch.where(keep, objectness.gather(1, token), LOWEST).topk(token.shape[1]).indices
        token, level_of, keep = (part.gather(1, order) for part in (token, level_of, keep))
        own = F.one_hot(level_of, len(sizes)) * keep[..., None].long()
        ranks = own.cumsum(1).gather(2, level_of[..., None])[..., 0]
        within = keep & (ranks <= number // len(sizes))
        rest = keep & ~within
        fill = rest & (rest.long().cumsum(1) <= number - within.long().sum(1, keepdim=True))
        places = torch.arange(token.shape[1], device=token.device)
        first = torch.where(within | fill, -places, -places - token.shape[1]).topk(number).indices
        enough = keep.long().sum(1, keepdim=True) >= number
        return torch.where(enough, token.gather(1, first), objectness.topk(number).indices)

    def _decode(
        self, x: Tensor, position: Tensor, reference: Tensor, memory: Tensor, mask: Tensor,
        shapes: Sequence[tuple[int, int]], ratios: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Return the logits (B, Q, classes) and boxes (B, Q, 4) of the last layer."""
        head = self.model.bbox_head
        logits = boxes = reference
        for index, layer in enumerate(self.model.decoder.layers):
            x = layer.norms[0](layer.self_attn(query=x, key=x, value=x, query_pos=position, key_pos=position))
            places = reference[:, :, None] * torch.cat((ratios, ratios), dim=-1)[:, None]
            x = layer.norms[1](attended(layer.cross_attn, x, position, memory, mask, places, shapes))
            x = layer.norms[2](layer.ffn(x))
            boxes = (head.reg_branches[index](x) + _inverse_sigmoid(reference)).sigmoid()
            logits, reference = head.cls_branches[index](x), boxes
        return logits, boxes

    def _select(self, logits: Tensor, boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, ...]:
        """As `postprocess` with plain NMS."""
        classes = logits.shape[2]
        total = logits.shape[1] * classes
        count = min(self.options.get("candidates") or 10000, total)
        scores, index = logits.sigmoid().flatten(1).topk(count)
        labels = index % classes
        placed = bbox_cxcywh_to_xyxy(boxes) * corners(boxes, size)
        placed = placed.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        threshold = float(self.options.get("iou_threshold") or 0.7)
        if count > _VANILLA:
            each = torch.arange(classes, device=labels.device)[:, None] == labels[:, None]  # (B, classes, N)
            kept = kept_by_nms(placed, torch.where(each, scores[:, None], LOWEST), threshold).any(1)
        else:
            apart = separated(placed, self.groups[labels], scores > LOWEST)
            kept = suppressed(apart, scores, scores > LOWEST, threshold)
        number = min(self.options.get("max_per_img", 100) or count, count)
        scores, valid, placed, labels = best(scores, kept, number, placed, labels)
        return blanked(placed, scores, labels, valid)


def _inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))
