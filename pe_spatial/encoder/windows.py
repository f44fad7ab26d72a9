"""Window partition and its inverse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import sizes_of


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into (B * n, window * window, C), n windows an image in row-major order.

    Where the window does not divide the grid, zeros are added at the bottom and on the right.
    """
    _, h, w, c = sizes_of(x)
    rows, cols = -(-h // window), -(-w // window)
    x = F.pad(x, (0, 0, 0, cols * window - w, 0, rows * window - h))
    x = x.view(-1, rows, window, cols, window, c)
    return x.transpose(2, 3).reshape(-1, window * window, c)


def window_unpartition(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`: (B * n, window * window, C) to (B, H, W, C) for `grid` = (H, W), without the padding."""
    rows, cols = -(-grid[0] // window), -(-grid[1] // window)
    c = windows.shape[-1]
    x = windows.view(-1, rows, cols, window, window, c)
    x = x.transpose(2, 3).reshape(-1, rows * window, cols * window, c)
    return x[:, : grid[0], : grid[1]]


def valid_tokens(grid: tuple[int, int], window: int, device: torch.device) -> Tensor | None:
    """Return which tokens of the windows are not padding, (n, window * window) bool; None if all of them are valid."""
    if grid[0] % window + grid[1] % window == 0:  # one condition, so that a compiled model meets two cases, not three
        return None
    return window_partition(torch.ones(1, *grid, 1, device=device), window)[..., 0] > 0
