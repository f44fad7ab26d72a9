"""Window partition and its inverse."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into (B * n, window * window, C), n windows an image in row-major order.

    Where the window does not divide the grid, zeros are added at the bottom and on the right.
    """
    x = F.pad(x, (0, 0, 0, -x.shape[2] % window, 0, -x.shape[1] % window))
    b, h, w, c = x.shape
    x = x.view(b, h // window, window, w // window, window, c)
    return x.transpose(2, 3).reshape(-1, window * window, c)


def window_unpartition(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`: (B * n, window * window, C) to (B, H, W, C) for `grid` = (H, W), without the padding."""
    rows, cols = -(-grid[0] // window), -(-grid[1] // window)
    x = windows.view(-1, rows, cols, window, window, windows.shape[-1])
    x = x.transpose(2, 3).reshape(-1, rows * window, cols * window, windows.shape[-1])
    return x[:, : grid[0], : grid[1]]


def real_tokens(grid: tuple[int, int], window: int, device: torch.device) -> Tensor | None:
    """Return which tokens of the windows are not padding, (n, window * window) bool; None if all of them are real."""
    if grid[0] % window == 0 and grid[1] % window == 0:
        return None
    return window_partition(torch.ones(1, *grid, 1, device=device), window)[..., 0] > 0
