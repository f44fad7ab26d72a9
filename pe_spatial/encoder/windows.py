"""Window partition and its inverse."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .resize import is_exporting, sizes_of


def window_partition(x: Tensor, window: int) -> Tensor:
    """Cut (B, H, W, C) into (B * n, window * window, C), n windows an image in row-major order.

    Where the window does not divide the grid, zeros are added at the bottom and on the right.
    """
    b, h, w, c = sizes_of(x)
    rows, cols = _windows((h, w), window)
    x = F.pad(x, (0, 0, 0, cols * window - w, 0, rows * window - h))
    x = x.view(_batch(b), rows, window, cols, window, c)
    return x.transpose(2, 3).reshape(_batch(b * rows * cols), window * window, c)


def window_unpartition(windows: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
    """Undo `window_partition`: (B * n, window * window, C) to (B, H, W, C) for `grid` = (H, W), without the padding."""
    rows, cols = _windows(grid, window)
    count, _, c = sizes_of(windows)
    x = windows.view(_batch(count // (rows * cols)), rows, cols, window, window, c)
    x = x.transpose(2, 3).reshape(-1, rows * window, cols * window, c)
    return x[:, : grid[0], : grid[1]]


def _batch(size: int) -> int:
    """Return the number of images for an exported graph, which needs it, and -1 for a trace, which would keep it."""
    return size if is_exporting() else -1


def _windows(grid: tuple[int, int], window: int) -> tuple[int, int]:
    """Return the rows and columns of windows that cover a grid (rounded up without negative numbers, for graphs)."""
    return (grid[0] + window - 1) // window, (grid[1] + window - 1) // window


def valid_tokens(grid: tuple[int, int], window: int, device: torch.device) -> Tensor | None:
    """Return which tokens of the windows are not padding, (n, window * window) bool; None if all of them are valid."""
    rest = grid[0] % window + grid[1] % window  # one condition, so that a compiled model meets two cases, not three
    if _is_known(rest == 0) if is_exporting() else rest == 0:
        return None
    return window_partition(torch.ones(1, *grid, 1, device=device), window)[..., 0] > 0


def _is_known(condition: bool) -> bool:
    """Return whether a condition on sizes holds for all sizes that an exported graph takes."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)
