"""Learned positions and patch kernels at other sizes than the pretraining one."""

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

POS_EMBED_MODES = ("bilinear", "bicubic", "bicubic_antialias", "tile")


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], *, mode: str) -> Tensor:
    """Bring learned positions (1, G, G, C) to (1, h, w, C).

    - 'bilinear': the released encoder (perception_models@3e352cc:core/vision_encoder/pe.py, `_sample_abs_posemb`).
    - 'bicubic': detectron2's `get_abs_pos`, used by the released detectors that do not tile.
    - 'bicubic_antialias': timm's `resample_abs_pos_embed`.
    - 'tile': repeat the pretraining grid and crop, the released detectors.

    On the pretraining grid itself every mode returns `pos_embed` unchanged.
    """
    side = sizes_of(pos_embed)[1]
    if is_exporting():
        return _resized_in_graph(pos_embed[0], grid, mode)[None]
    if grid == (side, side):
        return pos_embed
    if mode == "tile":
        repeats = [-(-n // side) for n in grid]
        return pos_embed.repeat(1, *repeats, 1)[:, : grid[0], : grid[1]]
    kernel, _, antialias = mode.partition("_")
    maps = pos_embed.permute(0, 3, 1, 2).contiguous()
    resized = F.interpolate(maps, size=grid, mode=kernel, align_corners=False, antialias=bool(antialias))
    return resized.permute(0, 2, 3, 1)


def resize_patch_kernel(kernel: Tensor, size: int) -> Tensor:
    """Bring a patch kernel (C, in, p, p) to (C, in, size, size), bicubically.

    Neither antialiased nor rescaled: perception_models@3e352cc:apps/detection/tools/convert_d2.py.
    """
    if kernel.shape[-1] == size:
        return kernel
    resized = F.interpolate(kernel.to(torch.float32), size=(size, size), mode="bicubic", align_corners=False)
    return resized.to(kernel.dtype)


def _resized_in_graph(pos_embed: Tensor, grid: tuple[int, int], mode: str) -> Tensor:
    """(G, G, C) -> (h, w, C) by operators that know no size in advance, for a graph that takes images of any size."""
    side = pos_embed.shape[0]
    if mode == "tile":
        rows, columns = (torch.arange(n, device=pos_embed.device) % side for n in grid)
        return pos_embed[rows][:, columns]
    rows, columns = (interpolation_matrix(n, side, mode, device=pos_embed.device) for n in grid)
    width = pos_embed.shape[2]
    resized = (rows.to(pos_embed) @ pos_embed.flatten(1)).unflatten(1, (side, width))  # (h, G, C)
    return columns.to(pos_embed) @ resized


def interpolation_matrix(size: int, side: int, mode: str, *, device: torch.device) -> Tensor:
    """Return the weights (size, side), float32, with which `F.interpolate` brings `side` values to `size` of them.

    `mode` is 'bilinear', 'bicubic' or 'bicubic_antialias', without `align_corners`. `size` may be symbolic.
    """
    scale = side / size
    cells = torch.arange(side, device=device, dtype=torch.float32)
    centers = (torch.arange(size, device=device, dtype=torch.float32)[:, None] + 0.5) * scale - 0.5
    if mode == "bilinear":
        return (1 - (centers.clamp(0, side - 1) - cells).abs()).clamp(min=0)
    if mode == "bicubic":  # the cells beyond the border repeat its values
        first = centers.floor()
        weights = torch.zeros_like(centers - cells)
        for step in (-1, 0, 1, 2):
            cell = (first + step).clamp(0, side - 1)
            weights = weights + _cubic(centers - (first + step), -0.75) * (cell == cells)
        return weights
    stretch = torch.sym_max(scale, 1.0)
    distance = (cells - centers).abs() / stretch
    weights = torch.where(distance < 2, _cubic(distance, -0.5), 0.0)
    return weights / weights.sum(1, keepdim=True)


def _cubic(x: Tensor, a: float) -> Tensor:
    """The kernel of cubic convolution, which is 0 at distances from 2."""
    x = x.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))


# torch before 2.3 does not have it: compiling an encoder there breaks the graph at complex numbers
is_compiling: Callable[[], bool] = getattr(torch.compiler, "is_compiling", bool)


# torch before 2.7 does not have it
is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", bool)


_BEFORE_2_4 = not hasattr(torch.amp, "is_autocast_available")  # autocast has a function for each type of devices


def is_autocast(device_type: str) -> bool:
    """Return whether torch.autocast is on for a type of devices; 'meta' has none."""
    if device_type == "meta":
        return False
    if _BEFORE_2_4:
        return torch.is_autocast_cpu_enabled() if device_type == "cpu" else torch.is_autocast_enabled()
    return torch.is_autocast_enabled(device_type)


def is_tracing() -> bool:
    """Return whether torch.jit.trace, and with it the older ONNX exporter, records what is computed."""
    return not is_compiling() and torch._C._is_tracing()


def sizes_of(x: Tensor) -> tuple[int, ...]:
    """Return the shape of `x`, in numbers even where torch.jit.trace would follow it: a trace is of one image size."""
    if not is_tracing():
        return tuple(x.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return tuple(map(int, x.shape))
