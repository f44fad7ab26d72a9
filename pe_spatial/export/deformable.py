"""Deformable convolution and attention as `grid_sample`, which every runtime has, for levels of free sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.ops import ModulatedDeformConv2d, ModulatedDeformConv2dPack
from torch import Tensor


def deformed(
    x: Tensor, offset: Tensor, weight: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None,
    stride: int = 1, padding: int = 0, dilation: int = 1, groups: int = 1,
) -> Tensor:  # fmt: skip
    """Return mmcv's `deform_conv2d` (or, with a mask, `modulated_deform_conv2d`).

    Args:
        x: (B, C, h, w).
        offset: (B, G * kernel cells * 2, H, W), y and x, for G groups of channels.
        weight: (O, C / groups, kh, kw).
        mask: (B, G * kernel cells, H, W).
        bias: (O,).
        stride, padding, dilation, groups: as in a convolution.
    """
    (h, w), (kh, kw), (rows, columns) = x.shape[-2:], weight.shape[-2:], offset.shape[-2:]
    offset = offset.unflatten(1, (-1, kh * kw, 2))  # (B, G, cells, 2, H, W)
    deform_groups = offset.shape[1]
    taps = torch.arange(kh * kw, device=x.device)
    y = _places(rows, taps // kw, stride, padding, dilation)[..., None] + offset[:, :, :, 0]
    z = _places(columns, taps % kw, stride, padding, dilation)[:, None] + offset[:, :, :, 1]
    grid = torch.stack(((2 * z + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)  # (B, G, cells, H, W, 2)
    maps = x.unflatten(1, (deform_groups, -1)).flatten(0, 1)
    sampled = F.grid_sample(maps, grid.flatten(0, 1).flatten(1, 2), padding_mode="zeros", align_corners=False)
    sampled = sampled.unflatten(2, (kh * kw, rows)).unflatten(0, (-1, deform_groups))  # (B, G, C / G, cells, H, W)
    if mask is not None:
        sampled = sampled * mask.unflatten(1, (deform_groups, 1, kh * kw))
    read = sampled.flatten(1, 2).unflatten(1, (groups, -1)).flatten(2, 3).flatten(-2)  # (B, groups, cells, HW)
    out = weight.unflatten(0, (groups, -1)).flatten(2) @ read  # (B, groups, O / groups, HW)
    out = out.flatten(1, 2).unflatten(-1, (rows, columns))
    return out if bias is None else out + bias[:, None, None]


def _places(length: int, tap: Tensor, stride: int, padding: int, dilation: int) -> Tensor:
    """Return where each cell of a kernel reads without its offset, (cells, length)."""
    return torch.arange(length, device=tap.device) * stride - padding + tap[:, None] * dilation


class FromSamples:
    """Deformable convolutions of mmcv with the forward of this file."""

    @classmethod
    def of(cls, kind: type) -> type:
        """Return the class `kind` with another forward."""
        forward = _modulated if issubclass(kind, ModulatedDeformConv2d) else _plain
        return type(kind.__name__, (kind,), {"forward": forward})


def _plain(self: Any, x: Tensor, offset: Tensor | None = None) -> Tensor:
    offset = self.conv_offset(x) if offset is None else offset
    return deformed(x, offset, self.weight, **_options(self))


def _modulated(self: Any, x: Tensor, offset: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    if isinstance(self, ModulatedDeformConv2dPack):
        y, z, mask = self.conv_offset(x).chunk(3, dim=1)
        offset, mask = torch.cat((y, z), dim=1), mask.sigmoid()
    assert offset is not None
    return deformed(x, offset, self.weight, mask=mask, bias=self.bias, **_options(self))


def _options(conv: Any) -> dict[str, Any]:
    sides = (getattr(conv, name) for name in ("stride", "padding", "dilation"))
    stride, padding, dilation = (side[0] if isinstance(side, Sequence) else side for side in sides)
    return dict(stride=stride, padding=padding, dilation=dilation, groups=conv.groups)


def inside(shape: Sequence[int], images: Tensor, size: tuple[int, int]) -> Tensor:
    """Return which cells (1, h, w) of a level hold the image, as nearest resizing of its mask has it.

    `images` (B, 3, H, W) are padded, and their content is `size`, on the left and at the top.
    """
    axes = []
    for cells, length, side in zip(shape, size, images.shape[-2:], strict=True):
        axes.append(torch.arange(cells, device=images.device) * side // cells < length)
    return (axes[0][:, None] & axes[1])[None]


def attended(
    attention: Any, query: Tensor, position: Tensor, value: Tensor, padding: Tensor, reference: Tensor,
    shapes: Sequence[tuple[int, int]],
) -> Tensor:  # fmt: skip
    """Return mmcv's `MultiScaleDeformableAttention` on levels whose shapes (h, w) are numbers or symbols.

    Args:
        attention: the module.
        query, position: (B, Q, C).
        value, padding: (B, N, C), and (B or 1, N) bool.
        reference: (B or 1, Q, L, 2) points or (B, Q, L, 4) boxes, relative to the levels.
        shapes: of the L levels.
    """
    heads, points, levels = attention.num_heads, attention.num_points, len(shapes)
    moved = query + position
    values = attention.value_proj(value).masked_fill(padding[..., None], 0.0)
    offsets = attention.sampling_offsets(moved).unflatten(-1, (heads, levels, points, 2))  # (B, Q, heads, L, P, 2)
    weights = attention.attention_weights(moved).unflatten(-1, (heads, levels * points)).softmax(-1)
    centers = reference[:, :, None, :, None, :2]
    if reference.shape[-1] == 2:
        one = torch.ones(1, device=query.device, dtype=query.dtype)
        sides = torch.stack([torch.cat((one * w, one * h)) for h, w in shapes])
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


def cells(shapes: Sequence[tuple[int, int]], ratios: Tensor) -> Tensor:
    """Return the centers of all cells relative to each level, (B or 1, N, L, 2): `get_encoder_reference_points`.

    `ratios` (B or 1, L, 2) are the shares of the width and the height of each level that hold the image.
    """
    references = []
    for level, (h, w) in enumerate(shapes):
        y = (torch.arange(h, device=ratios.device, dtype=torch.float32) + 0.5) / (ratios[:, level, 1:] * h)  # (B, h)
        x = (torch.arange(w, device=ratios.device, dtype=torch.float32) + 0.5) / (ratios[:, level, :1] * w)
        grid = torch.stack((x[:, None].expand(-1, h, -1), y[..., None].expand(-1, -1, w)), dim=-1)
        references.append(grid.flatten(1, 2))
    return torch.cat(references, dim=1)[:, :, None] * ratios[:, None]


def proposals(model: Any, memory: Tensor, mask: Tensor, padding: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """As `gen_encoder_output_proposals`, for levels of known shapes; invalid anchors are at a large number.

    Args:
        model: a `DeformableDETR` of two stages.
        memory, mask: (B, N, C), and (B or 1, N), True on padding.
        padding: the mask of each level, (B or 1, h, w).

    Returns states (B, N, C) and anchors (B or 1, N, 4) before the sigmoid.
    """
    parts = []
    for level, part in enumerate(padding):
        h, w = part.shape[1:]
        valid_h, valid_w = ((~line).sum(1, keepdim=True).float() for line in (part[:, :, 0], part[:, 0]))
        y = (torch.arange(h, device=memory.device) + 0.5) / valid_h  # (B, h)
        x = (torch.arange(w, device=memory.device) + 0.5) / valid_w
        grid = torch.stack((x[:, None].expand(-1, h, -1), y[..., None].expand(-1, -1, w)), dim=-1).flatten(1, 2)
        parts.append(torch.cat((grid, torch.full_like(grid, 0.05 * 2.0**level)), dim=-1))
    boxes = torch.cat(parts, dim=1)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True) & ~mask[..., None]
    bounded = torch.where(valid, boxes, 0.5)
    anchors = torch.where(valid, torch.log(bounded / (1 - bounded)), 1e4)  # its sigmoid is 1, as that of infinity
    states = model.memory_trans_fc(torch.where(valid, memory, 0.0))
    return model.memory_trans_norm(states), anchors
