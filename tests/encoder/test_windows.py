"""Windowed attention: released reference values, partition and inverse, what windows and padding may and may not do."""


import pytest
import torch
from helpers.golden import read_arrays, read_json, read_weights
from torch.testing import assert_close

from pe_spatial import EncoderConfig, PerceptionEncoder
from pe_spatial.encoder.checkpoint import load_state
from pe_spatial.encoder.windows import valid_tokens, window_partition, window_unpartition

EXACT = {"rtol": 1e-4, "atol": 1e-5}
layouts = pytest.mark.parametrize("class_token", [True, False])


def images(h: int, w: int) -> torch.Tensor:
    return torch.randn(2, 3, 16 * h, 16 * w, generator=torch.Generator().manual_seed(0))


# --- released reference values


def released_detector_encoder(folder, name, **options) -> tuple[PerceptionEncoder, dict[str, torch.Tensor]]:
    kw = read_json(folder / f"{name}.json")["backbone"]
    config = EncoderConfig(
        img_size=kw["pretrain_img_size"],
        patch_size=kw["patch_size"],
        embed_dim=kw["embed_dim"],
        depth=kw["depth"],
        num_heads=kw["num_heads"],
        mlp_ratio=kw["mlp_ratio"],
        class_token=kw["pretrain_use_cls_token"],
        init_values=kw["init_values"],
    )
    geometry = {
        "window_size": kw["window_size"],
        "global_attn_indexes": sorted(set(range(kw["depth"])) - set(kw["window_block_indexes"])),
        "pos_embed_mode": "tile" if kw["tile_posemb"] else "bicubic",
        "rope_mode": "interpolate",
        "rope_grid": kw["pt_hw_seq_len"],
    }
    model = PerceptionEncoder(config, **{**geometry, **options}).eval()
    state = read_weights(folder / f"{name}.pth")
    report = load_state(model, {k.removeprefix("net."): v for k, v in state.items() if k.startswith("net.")})
    assert set(report.omitted.values()) == {"rotary constants, computed here"}
    return model, {k: torch.from_numpy(v) for k, v in read_arrays(folder / f"{name}.npz").items()}


@pytest.mark.parametrize("name", ["vitdet_window4_layerscale", "vitdet_window3_padded"])
def test_equals_released_detection_encoder(golden, name):
    model, values = released_detector_encoder(golden / "vitdet", name)
    with torch.no_grad():
        assert_close(model(values["input"])[0], values["last_feat"], **EXACT)


def test_padding_takes_part_in_the_released_detector(golden):
    masked, values = released_detector_encoder(golden / "vitdet", "vitdet_window3_padded", mask_window_padding=True)
    with torch.no_grad():
        assert (masked(values["input"])[0] - values["last_feat"]).abs().max() > 0.01


# --- partition


@pytest.mark.parametrize("grid", [(6, 9), (7, 5), (2, 3), (3, 3)])
def test_partition_and_its_inverse(grid):
    x = torch.arange(2.0 * grid[0] * grid[1]).view(2, *grid, 1) + 1
    windows = window_partition(x, 3)
    rows, cols = -(-grid[0] // 3), -(-grid[1] // 3)
    assert windows.shape == (2 * rows * cols, 9, 1)
    assert_close(window_unpartition(windows, 3, grid), x, rtol=0, atol=0)
    by_hand = [
        [x[b, y, z, 0].item() if y < grid[0] and z < grid[1] else 0.0 for y in range(r, r + 3) for z in range(c, c + 3)]
        for b in range(2)
        for r in range(0, 3 * rows, 3)
        for c in range(0, 3 * cols, 3)
    ]
    assert windows[..., 0].tolist() == by_hand
    real = valid_tokens(grid, 3, x.device)
    assert (
        real is None
        if grid in ((6, 9), (3, 3))
        else real.tolist() == [[v > 0 for v in w] for w in by_hand[: rows * cols]]
    )


# --- what windows mean


@layouts
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((4, 4), {"window_size": 4, "global_attn_indexes": ()}),
        ((4, 4), {"window_size": 4, "global_attn_indexes": (), "mask_window_padding": True}),
        ((4, 4), {"window_size": 4, "global_attn_indexes": (), "rope_mode": "interpolate", "rope_grid": (7, 7)}),
        ((5, 3), {"window_size": 5, "global_attn_indexes": (), "mask_window_padding": True}),
        ((3, 6), {"window_size": 8, "global_attn_indexes": (), "mask_window_padding": True}),
    ],
)
def test_one_window_over_the_grid_is_global_attention(tiny, class_token, grid, options):
    x, layers = images(*grid), (0, 3)
    same = {key: options[key] for key in ("rope_mode", "rope_grid") if key in options}
    with torch.no_grad():
        windowed, whole = (tiny(class_token, out_indices=layers, **o)(x) for o in (options, same))
    assert_close(windowed, whole, **EXACT)


def test_unmasked_padding_does_take_part(tiny):
    with torch.no_grad():
        windowed = tiny(False, window_size=5, global_attn_indexes=())(images(5, 3))[0]
        assert (windowed - tiny(False)(images(5, 3))[0]).abs().max() > 0.01


@pytest.mark.parametrize("mask_window_padding", [True, False])
@pytest.mark.parametrize("grid", [(6, 6), (7, 5), (2, 8)])
def test_groups_equal_partitioning_in_every_block(tiny, grid, mask_window_padding):
    """The reference cuts the map anew for each block, as the released code does; the same where no class token is."""
    options = {"window_size": 3, "global_attn_indexes": (2,), "out_indices": (0, 1, 2, 3)}
    model = tiny(False, mask_window_padding=mask_window_padding, **options)
    x = images(*grid)
    with torch.no_grad():
        maps = model(x)
        tokens = model._embed(x, grid).unflatten(1, grid)
        for i, block in enumerate(model.blocks):
            window = 3 if i != 2 else None
            rope = model._rope(window, grid, x.device)
            if window:
                valid, mask = model._padding(window, grid, tokens)
                tokens = window_unpartition(block(window_partition(tokens, 3), rope, valid, mask, 2), 3, grid)
            else:
                tokens = block(tokens.flatten(1, 2), rope, None, None, 2).unflatten(1, grid)
            assert_close(maps[i], tokens.permute(0, 3, 1, 2), **EXACT)


@layouts
def test_windows_see_only_themselves_until_a_global_block(tiny, class_token):
    x = images(6, 6)
    changed = x.clone()
    changed[:, :, :16, :16] += 1  # the first patch, in the first of four windows
    model = tiny(class_token, window_size=3, global_attn_indexes=(2,), out_indices=(1, 2))
    with torch.no_grad():
        (windowed, whole), (windowed_too, whole_too) = model(x), model(changed)
    differs = (windowed != windowed_too).any(1)[0]
    assert differs[:3, :3].all()
    assert not differs[3:].any()
    assert not differs[:, 3:].any()
    assert (whole != whole_too).any(1).all()


@layouts
@pytest.mark.parametrize("mode", ["masked", "takes part", "nothing done"])
def test_content_of_padding_never_reaches_valid_tokens(tiny, class_token, mode):
    """Where padding takes part it does so as zeros, whatever the blocks before made of it."""
    grid, x = (4, 5), images(4, 5)
    model = tiny(class_token, window_size=3, global_attn_indexes=(), mask_window_padding=mode == "masked")
    rope, is_valid = model._rope(3, grid, x.device), valid_tokens(grid, 3, x.device).repeat(2, 1)
    valid, mask = (None, None) if mode == "nothing done" else model._padding(3, grid, x)
    assert [valid is None, mask is None] == [mode != "takes part", mode != "masked"]
    with torch.no_grad():
        tokens = model._enter_windows(model._embed(x, grid), 3, grid)
        dirty = tokens.clone()
        dirty[:, int(class_token) :][~is_valid] += 10 * torch.randn(int((~is_valid).sum()), 32)
        outputs = (model.blocks[0](t, rope, valid, mask, 2) for t in (tokens, dirty))
        clean_out, dirty_out = (out[:, int(class_token) :] for out in outputs)
    assert (clean_out[is_valid] - dirty_out[is_valid]).abs().max().gt(1e-5).item() is (mode == "nothing done")


def test_class_token_leaves_windows_as_the_mean_over_them(tiny):
    model = tiny(window_size=2, global_attn_indexes=(1,))
    windows = torch.randn(2 * 6, 5, 32)
    left = model._leave_windows(windows, 2, (4, 6))
    assert_close(left[:, 0], windows[:, 0].view(2, 6, 32).mean(1))
    entered = model._enter_windows(left, 2, (4, 6))
    assert_close(entered[:, 1:], windows[:, 1:], rtol=0, atol=0)
    assert_close(entered[:, 0], left[:, 0].repeat_interleave(6, 0), rtol=0, atol=0)


@layouts
def test_rotary_positions_of_windows_and_grid_scale_apart(tiny, class_token):
    options = {"window_size": 3, "global_attn_indexes": (1, 3), "rope_mode": "interpolate"}
    model = tiny(class_token, rope_grid=(6, 4), **options)
    cpu, offset = torch.device("cpu"), int(class_token)
    frequency = 10000.0 ** -(torch.arange(4) / 4)
    for window, side, target in ((3, 3, 6), (None, 9, 4)):
        table = model._rope(window, (9, 9), cpu)[offset:].view(side, side, 8, 2)
        positions = (torch.arange(side) + offset) * target / side
        assert_close(table[0, :, :4, 0], (positions[:, None] * frequency).cos())
        assert_close(table[:, 0, 4:, 1], (positions[:, None] * frequency).sin())
