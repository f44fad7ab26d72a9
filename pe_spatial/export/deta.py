"""DETA as one graph: pixels of at most the canvas in; boxes, scores and labels out. The layers are the trained model's.

Deformable attention samples with `grid_sample`. The canvas is square and fixed, and so are all numbers of tokens.
B images, N tokens of all levels, L levels, Q queries, D detections. Boxes inside are (cx, cy, w, h) in 0..1 of the
image without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from pe_spatial.errors import ConfigError
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import LOWEST, best, kept_by_nms, separated, suppressed

OUTPUTS = ("boxes", "scores", "labels", "valid")
_VANILLA = 1000  # boxes from which torchvision's `batched_nms` suppresses class by class on a CPU


class DETAGraph(nn.Module):
    """A `DETA`; ConfigError for a suppression other than plain NMS."""

    groups: Tensor

    def __init__(self, model: Any, pixels: Pixels) -> None:
        super().__init__()
        self.model, self.pixels = copy.deepcopy(model).eval(), pixels
        self.options = dict(model.bbox_head.test_cfg)
        method = self.options.pop("method", "nms")
        if method != "nms":
            raise ConfigError(f"test_cfg.method is {method!r}; DETA is exported with 'nms'")
        self.layers = [f"layer_{i}" for i in model.backbone.encoder.out_indices]
        classes = model.bbox_head.cls_out_channels
        groups = self.options.get("class_ids") or range(classes)
        self.register_buffer("groups", torch.tensor(list(groups), dtype=torch.float32), persistent=False)

    def outputs(self) -> list[str]:
        """Return the names of the results."""
        return list(OUTPUTS)

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
        padding = [self._padding(images, shape, size) for shape in shapes]  # (1, h, w), True on padding
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

    def _padding(self, images: Tensor, shape: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Return which cells of a level are padding, (1, h, w), as nearest resizing of the image's mask has it."""
        inside = []
        for cells, length, canvas in zip(shape, size, images.shape[-2:], strict=True):
            pixels = torch.arange(cells, device=images.device) * canvas // cells
            inside.append(pixels < length)
        return ~(inside[0][:, None] & inside[1])[None]

    def _encode(
        self, x: Tensor, positions: Tensor, mask: Tensor, shapes: Sequence[tuple[int, int]], ratios: Tensor
    ) -> Tensor:
        references = []
        for level, (h, w) in enumerate(shapes):
            y = (torch.arange(h, device=x.device, dtype=torch.float32) + 0.5) / (ratios[:, level, 1:] * h)  # (1, h)
            z = (torch.arange(w, device=x.device, dtype=torch.float32) + 0.5) / (ratios[:, level, :1] * w)
            grid = torch.stack((z[:, None].expand(-1, h, -1), y[..., None].expand(-1, -1, w)), dim=-1)
            references.append(grid.flatten(1, 2))
        reference = torch.cat(references, dim=1)[:, :, None] * ratios[:, None]  # (1, N, L, 2)
        for layer in self.model.encoder.layers:
            x = layer.norms[0](_deformable(layer.self_attn, x, positions, x, mask, reference, shapes))
            x = layer.norms[1](layer.ffn(x))
        return x

    def _propose(
        self, memory: Tensor, mask: Tensor, shapes: Sequence[tuple[int, int]], padding: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return queries and their positions (B, Q, C), boxes (B, Q, 4), and the objectness of all tokens (B, N)."""
        model = self.model
        states, anchors = self._proposals(memory, mask, padding)
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

    def _proposals(self, memory: Tensor, mask: Tensor, padding: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """As `gen_encoder_output_proposals`, for levels of known shapes; invalid anchors are at a large number."""
        parts = []
        for level, part in enumerate(padding):
            h, w = part.shape[1:]
            valid_h, valid_w = ((~line).sum(1).float() for line in (part[:, :, 0], part[:, 0]))
            y = (torch.arange(h, device=memory.device) + 0.5) / valid_h
            x = (torch.arange(w, device=memory.device) + 0.5) / valid_w
            grid = torch.stack((x.expand(h, -1), y[:, None].expand(-1, w)), dim=-1).flatten(0, 1)
            parts.append(torch.cat((grid, torch.full_like(grid, 0.05 * 2.0**level)), dim=-1))
        boxes = torch.cat(parts)[None]
        valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~mask[..., None]
        inside = torch.where(valid, boxes, 0.5)
        anchors = torch.where(valid, torch.log(inside / (1 - inside)), 1e4)  # its sigmoid is 1, as that of infinity
        states = self.model.memory_trans_fc(torch.where(valid, memory, 0.0))
        return self.model.memory_trans_norm(states), anchors

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
            x = layer.norms[1](_deformable(layer.cross_attn, x, position, memory, mask, places, shapes))
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
        one = torch.ones(1, device=boxes.device)
        corners = bbox_cxcywh_to_xyxy(boxes) * torch.cat((one * size[1], one * size[0])).repeat(2)
        corners = corners.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        threshold = float(self.options.get("iou_threshold") or 0.7)
        if count > _VANILLA:
            each = torch.arange(classes, device=labels.device)[:, None] == labels[:, None]  # (B, classes, N)
            kept = kept_by_nms(corners, torch.where(each, scores[:, None], LOWEST), threshold).any(1)
        else:
            apart = separated(corners, self.groups[labels], scores > LOWEST)
            kept = suppressed(apart, scores, scores > LOWEST, threshold)
        number = min(self.options.get("max_per_img", 100) or count, count)
        scores, valid, corners, labels = best(scores, kept, number, corners, labels)
        zero = torch.where(valid[..., None], corners, 0.0)
        return zero, torch.where(valid, scores, 0.0), torch.where(valid, labels, 0), valid


def _inverse_sigmoid(x: Tensor, eps: float = 1e-5) -> Tensor:
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def _deformable(
    attention: Any, query: Tensor, position: Tensor, value: Tensor, mask: Tensor, reference: Tensor,
    shapes: Sequence[tuple[int, int]],
) -> Tensor:  # fmt: skip
    """Multi-scale deformable attention (mmcv's `MultiScaleDeformableAttention`) with levels of known shapes.

    `reference` is (B or 1, Q, L, 2) points or (B, Q, L, 4) boxes, relative to the levels.
    """
    heads, points, levels = attention.num_heads, attention.num_points, len(shapes)
    moved = query + position
    values = attention.value_proj(value).masked_fill(mask[..., None], 0.0)
    offsets = attention.sampling_offsets(moved).unflatten(-1, (heads, levels, points, 2))  # (B, Q, heads, L, P, 2)
    weights = attention.attention_weights(moved).unflatten(-1, (heads, levels * points)).softmax(-1)
    centers = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        sides = torch.tensor([[w, h] for h, w in shapes], device=query.device, dtype=query.dtype)
        places = centers + offsets / sides[:, None]
    else:
        places = centers + offsets / points * reference[:, :, None, :, None, 2:] * 0.5
    grids = 2 * places - 1
    sampled, start = [], 0
    for level, (h, w) in enumerate(shapes):
        part = values[:, start : start + h * w].unflatten(-1, (heads, -1))  # (B, h * w, heads, C)
        part = part.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, (h, w))
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # (B * heads, Q, P, 2)
        sampled.append(F.grid_sample(part, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
        start += h * w
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # (B * heads, 1, Q, L * P)
    out = (torch.cat(sampled, dim=-1) * weights).sum(-1)  # (B * heads, C, Q)
    out = out.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2)
    return attention.output_proj(out) + query
