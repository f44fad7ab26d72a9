"""Rotary positions on a 2-D grid (perception_models@3e352cc:core/vision_encoder/rope.py, `Rope2D`).

Pairs of the head dimension are interleaved; the first half is rotated by the column (x), the second by the row (y);
theta is 10000. Only differences of positions matter between patches; the class token is at position 0.
"""

import torch
from torch import Tensor

from .resize import is_compiling, is_tracing

_THETA = 10000.0
_MAX_TABLES = 64
_NO_COMPLEX = ("mps",)  # devices without complex numbers: macOS before 14
_tables: dict[tuple[object, ...], Tensor] = {}


def _build(
    grid: tuple[int, int],
    head_dim: int,
    scale: tuple[float, float],
    offset: int,
    num_prefix_tokens: int,
    device: torch.device,
) -> Tensor:
    pairs = head_dim // 4  # pairs for each axis
    freqs = _THETA ** (-torch.arange(pairs, device=device, dtype=torch.float32) / pairs)
    rows, cols = (
        ((torch.arange(n, device=device, dtype=torch.float32) + offset) * s)[:, None] * freqs
        for n, s in zip(grid, scale, strict=True)
    )
    cells = (cols.expand(grid[0], -1, -1), rows[:, None].expand(-1, grid[1], -1))
    angles = torch.cat(cells, dim=-1).flatten(0, 1)  # (h * w, head_dim / 2)
    angles = torch.cat((angles.new_zeros(num_prefix_tokens, head_dim // 2), angles))
    return torch.stack((angles.cos(), angles.sin()), dim=-1)


def rope_table(
    grid: tuple[int, int],
    head_dim: int,
    *,
    scale: tuple[float, float] = (1.0, 1.0),
    offset: int = 0,
    num_prefix_tokens: int = 0,
    device: torch.device,
) -> Tensor:
    """Return cosines and sines, (num_prefix_tokens + h * w, head_dim / 2, 2) in float32, for tokens in row-major order.

    `grid` is (h, w) in tokens and `head_dim` a multiple of 4. Token i of an axis has the position
    `(i + offset) * scale`, with `scale` (y, x) and an `offset` of 1 where the encoder has a class token, else 0. The
    `num_prefix_tokens` tokens before the grid are not rotated.

    A table depends on its arguments alone: it is computed once and cached outside of any module, so that it is never
    saved, copied or synchronized with a model.
    """
    key = (grid, head_dim, scale, offset, num_prefix_tokens, device)
    if is_compiling() or is_tracing():
        return _build(*key)
    table = _tables.get(key)
    if table is None:
        with torch.inference_mode(False), torch.no_grad():
            table = _build(*key)
        if type(table) is Tensor:  # a fake or otherwise wrapped tensor belongs to its tracer, not to us
            while len(_tables) >= _MAX_TABLES:
                _tables.pop(next(iter(_tables)), None)
            _tables[key] = table
    return table


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the pairs of `x` (B, N, ..., D) by `table` (N, D / 2, 2); computed in float32, returned in x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (B, N, ..., D / 2, 2)
    table = table.view(table.shape[0], *(1,) * (x.ndim - 3), *table.shape[1:])
    if is_compiling() or is_tracing() or x.device.type in _NO_COMPLEX:
        # Compilers fuse the real form, and neither they nor ONNX have complex numbers; in eager mode one complex
        # product is far faster.
        (even, odd), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))
    return rotated.flatten(-2).type_as(x)
