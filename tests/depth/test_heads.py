"""Bins and linear probes: equal to the references' values, and what each option means."""


import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("mmengine")
from helpers.golden import read_arrays, read_json

from pe_spatial.depth.heads import BinsDepthHead, Level, bin_depths, expected_depth
from pe_spatial.errors import ConfigError

RANGES = {"nyu": (1e-3, 10.0), "driving": (1e-3, 80.0)}


@pytest.fixture(scope="module")
def reference(golden):
    arrays = read_arrays(golden / "depth/linear_bins_head.npz")
    return {name: torch.from_numpy(arrays[name]) for name in arrays}


@pytest.mark.parametrize("limits", RANGES)
@pytest.mark.parametrize("weighting", ["linear", "softmax", "sigmoid"])
@pytest.mark.parametrize("spacing", ["uniform", "log"])
def test_expectation_equals_the_reference(reference, limits, weighting, spacing):
    expected = reference[f"bins/{limits}/{weighting}{'_log_spaced' if spacing == 'log' else ''}"]
    depths = bin_depths(256, *RANGES[limits], spacing)
    depth = expected_depth(reference["bins/logits"], depths, weighting)
    torch.testing.assert_close(depth, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layers", [1, 4])
@pytest.mark.parametrize("grid", ["4x6", "5x7"])
def test_linear_probe_equals_the_reference(reference, golden, layers, grid):
    head = BinsDepthHead([8] * layers, token="class", upsample=4)
    head.conv.load_state_dict(
        {name: reference[f"linear{layers}/weights/conv_depth.{name}"] for name in ("weight", "bias")}
    )
    case = f"linear{layers}_{grid}"
    maps = [reference[f"{case}/patch_{i}"] for i in range(layers)]
    depth = head(maps, [reference[f"{case}/cls_{i}"] for i in range(layers)])
    torch.testing.assert_close(depth, reference[f"{case}/head_output"], rtol=1e-5, atol=1e-5)
    size = read_json(golden / "depth/heads.json")["cases"][case]["image_size"]
    resized = F.interpolate(depth.clamp(1e-3, 10.0), size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, reference[f"{case}/resized_output"], rtol=1e-5, atol=1e-5)


def test_log_bins_hold_both_limits_and_a_constant_ratio():
    depths = bin_depths(5, 0.01, 100.0, "log")
    torch.testing.assert_close(depths, torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]))


def test_expectation_is_float32_under_autocast():
    logits = torch.randn(1, 256, 3, 4)
    depths = bin_depths(256, 1e-3, 10.0, "uniform")
    with torch.autocast("cpu", torch.bfloat16):
        depth = expected_depth(logits, depths, "softmax")
    torch.testing.assert_close(depth, expected_depth(logits, depths, "softmax"), rtol=0, atol=0)


def test_begins_in_the_middle_of_the_range():
    torch.manual_seed(0)
    depth = BinsDepthHead([16], norm="batch")([torch.randn(2, 16, 4, 5) * 30])
    assert depth.shape == (2, 1, 4, 5)
    assert (depth - 5).abs().max() < 0.5


def test_batch_norm_makes_the_scale_of_a_layer_irrelevant():
    torch.manual_seed(0)
    head = BinsDepthHead([8, 8], norm="batch").train()
    maps = [torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)]
    torch.testing.assert_close(head([maps[0] * 50 + 3, maps[1]]), head(maps), rtol=1e-4, atol=1e-4)
    plain = BinsDepthHead([8, 8]).train()
    assert (plain([maps[0] * 50 + 3, maps[1]]) - plain(maps)).abs().max() > 1e-3


def test_layer_norm_needs_no_other_image():
    head = BinsDepthHead([8], norm="layer").train()
    x = torch.randn(3, 8, 4, 4)
    torch.testing.assert_close(head([x])[:1], head([x[:1] * 7]), rtol=1e-3, atol=1e-3)


def test_mean_token_is_the_mean_of_the_patches():
    x = torch.randn(2, 8, 3, 4)
    joined = Level(8, token="mean", norm=None)(x, None)
    assert joined.shape == (2, 16, 3, 4)
    torch.testing.assert_close(joined[:, :8], x)
    torch.testing.assert_close(joined[:, 8:], x.mean((2, 3), keepdim=True).expand_as(x))
    added = Level(8, token="class", join="add", norm=None)(x, torch.ones(2, 8))
    torch.testing.assert_close(added, x + 1)


def test_norm_is_that_of_the_tokens_and_the_class_token_is_one_of_them():
    x, token = torch.randn(2, 8, 3, 4) * 5, torch.randn(2, 8) + 7
    layer = Level(8, token="class", norm="layer")(x, token)
    torch.testing.assert_close(layer[:, :8], F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer[:, 8:, 1, 2], F.layer_norm(token, (8,)), rtol=1e-4, atol=1e-4)
    batch = Level(8, token="class", norm="batch").train()
    batch(x, token)
    everything = torch.cat((x.flatten(2), token[..., None]), 2)
    torch.testing.assert_close(batch.norm.running_mean, 0.1 * everything.mean((0, 2)))


def test_maps_of_other_sizes_are_brought_to_the_first():
    head = BinsDepthHead([4, 6])
    assert head([torch.randn(1, 4, 8, 10), torch.randn(1, 6, 4, 5)]).shape == (1, 1, 8, 10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(token="cls"), "token is 'cls'; allowed are None, 'class', 'mean'"),
        (dict(norm="SyncBN"), "norm is 'SyncBN'; allowed are None, 'batch', 'layer'"),
        (dict(spacing="UD"), "spacing is 'UD'; allowed are 'uniform', 'log'"),
        (dict(weighting="relu"), "weighting is 'relu'; allowed are 'linear', 'softmax', 'sigmoid'"),
        (dict(min_depth=0.0), "min_depth is 0.0 and max_depth 10.0; 0 < min"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        BinsDepthHead([8], **options)
