"""Learned positions and patch kernels at other sizes."""

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import read_arrays
from torch.testing import assert_close

from pe_spatial.encoder.resize import POS_EMBED_MODES, resize_patch_kernel, resize_pos_embed


@pytest.mark.parametrize("mode", POS_EMBED_MODES)
def test_pretraining_grid_is_untouched(mode):
    positions = torch.randn(1, 4, 4, 6)
    assert resize_pos_embed(positions, (4, 4), mode=mode) is positions


@pytest.mark.parametrize("grid", [(8, 8), (4, 12), (7, 5), (3, 2), (4, 5)])
def test_tile_repeats_and_crops(grid):
    positions = torch.randn(1, 4, 4, 6)
    tiled = resize_pos_embed(positions, grid, mode="tile")
    rows, cols = (torch.arange(n) % 4 for n in grid)
    assert_close(tiled, positions[:, rows][:, :, cols], rtol=0, atol=0)


@pytest.mark.parametrize("grid", [(8, 8), (6, 3), (2, 7)])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "bicubic_antialias"])
def test_resizing_keeps_axes_apart(mode, grid):
    """Positions that depend on the row alone still do, and stay in their channel."""
    positions = torch.zeros(1, 4, 4, 2)
    positions[..., 0] = torch.arange(4.0)[None, :, None]
    resized = resize_pos_embed(positions, grid, mode=mode)
    assert resized.shape == (1, *grid, 2)
    assert_close(resized[..., 0], resized[:, :, :1, 0].expand(1, *grid))
    assert resized[0, -1, 0, 0] - resized[0, 0, 0, 0] > 1.5
    assert_close(resized[..., 1], torch.zeros(1, *grid))


def test_modes_differ():
    positions = torch.randn(1, 8, 8, 4)
    resized = [resize_pos_embed(positions, (5, 5), mode=mode) for mode in POS_EMBED_MODES]
    assert all((a - b).abs().max() > 0.1 for i, a in enumerate(resized) for b in resized[:i])


@pytest.mark.parametrize("case", ["keep_pe", "output_pixel_96", "output_pixel_128_same_grid"])
def test_patch_kernel_equals_released_converter(golden, case):
    values = read_arrays(golden / "maskrcnn" / "convert.npz")
    kernel = torch.from_numpy(values["in/module.visual.conv1.weight"])
    assert_close(
        resize_patch_kernel(kernel, 16), torch.from_numpy(values[f"{case}/conv1.weight"]), rtol=1e-4, atol=1e-5
    )
    assert resize_patch_kernel(kernel, 14) is kernel
    assert resize_patch_kernel(kernel.bfloat16(), 16).dtype == torch.bfloat16


def test_bicubic_positions_equal_released_converter(golden):
    values = read_arrays(golden / "maskrcnn" / "convert.npz")
    positions = torch.from_numpy(values["in/module.visual.positional_embedding"]).view(1, 8, 8, 6)
    expected = torch.from_numpy(values["output_pixel_96/positional_embedding"]).view(1, 6, 6, 6)
    found = {m: (resize_pos_embed(positions, (6, 6), mode=m) - expected).abs().max() for m in POS_EMBED_MODES}
    assert min(found, key=found.get) == "bicubic"
    assert found["bicubic"] < 1e-5


def test_gradient_reaches_positions_once_for_each_use():
    positions = torch.zeros(1, 4, 4, 1, requires_grad=True)
    resize_pos_embed(positions, (8, 6), mode="tile").sum().backward()
    assert_close(positions.grad.sum(), torch.tensor(48.0))
    assert F.relu(positions.grad - 4).sum() == 0
