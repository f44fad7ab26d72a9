"""Pyramids: released reference values, strides and channels, bad input."""

import pytest
import torch
from helpers.golden import read_arrays, read_weights
from torch.testing import assert_close

from pe_spatial import FusedFeaturePyramid, SimpleFeaturePyramid
from pe_spatial.encoder.pyramid import ChannelLayerNorm, DETAFeaturePyramid, PlainFeaturePyramid


@pytest.mark.parametrize("name", ["vitdet_window4_layerscale", "vitdet_window3_padded"])
def test_equals_released_pyramid(golden, name):
    values = {k: torch.from_numpy(v) for k, v in read_arrays(golden / f"vitdet/{name}.npz").items()}
    state = read_weights(golden / f"vitdet/{name}.pth")
    pyramid = SimpleFeaturePyramid(48, out_channels=32)
    # Both list level by level, each in the order of its layers.
    theirs = [value for key, value in state.items() if key.startswith("simfp_")]
    pyramid.load_state_dict(dict(zip(pyramid.state_dict(), theirs, strict=True)))
    with torch.no_grad():
        levels = pyramid((values["last_feat"],))
    for i, level in enumerate(levels):
        assert_close(level, values[f"p{i + 2}"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("strides", "in_stride", "channels"),
    [
        ((4, 8, 16, 32, 64), 16, 256),
        ((4, 8, 16, 32), 16, (96, 192, 384, 768)),
        ((8, 16, 32), 16, 32),
        ((8, 64), 16, 16),
        ((4, 8, 16, 32, 64), 8, (8, 8, 8, 8, 16)),
        ((16, 32, 64, 128), 16, 32),
        ((4, 8, 32, 128), 16, 32),
        ((4, 4), 16, 8),
        ((16, 8, 4, 2, 1), 16, (32, 16, 8, 4, 2)),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_every_level_has_its_stride_and_channels(strides, in_stride, channels, fused):
    maps = tuple(torch.randn(2, 64, 8, 16) for _ in range(2 if fused else 1))
    build, width = (FusedFeaturePyramid, (64, 64)) if fused else (SimpleFeaturePyramid, 64)
    levels = build(width, out_channels=channels, strides=strides, in_stride=in_stride)(maps)
    expected = (channels,) * len(strides) if isinstance(channels, int) else channels
    h, w = 8 * in_stride, 16 * in_stride
    assert [x.shape for x in levels] == [(2, c, h // s, w // s) for c, s in zip(expected, strides, strict=True)]


@pytest.mark.parametrize("kind", ["simple", "fused", "single"])
def test_levels_that_nobody_reads_own_nothing_and_change_nothing(kind):
    build = {"simple": SimpleFeaturePyramid, "fused": FusedFeaturePyramid, "single": PlainFeaturePyramid}[kind]
    width = 32 if kind == "simple" else (32,)
    maps = torch.randn(2, 32, 4, 6)
    whole = build(width, out_channels=(8, 16, 24, 32), strides=(4, 8, 16, 32))
    part = build(width, out_channels=(8, 16, 24, 32), strides=(4, 8, 16, 32), unused=(0, 3))
    missing, unexpected = part.load_state_dict(whole.state_dict(), strict=False)
    assert not missing
    assert {key.split("levels.")[1][0] for key in unexpected} == {"0", "3"}
    levels, expected = part((maps,)), whole((maps,))
    assert_close(levels[1:3], expected[1:3], rtol=0, atol=0)
    for i in (0, 3):
        assert levels[i].shape == expected[i].shape
        assert levels[i].untyped_storage().size() == 4
        assert not levels[i].any()
    sum(level.sum() for level in levels).backward()
    assert all(parameter.grad is not None for parameter in part.parameters())


def test_a_level_after_an_unread_one_is_not_its_subsample():
    pyramid = SimpleFeaturePyramid(16, out_channels=8, strides=(16, 32, 64), unused=(1,))
    assert pyramid(torch.randn(1, 16, 8, 8))[2].any()


def test_wide_levels_cost_a_projection_instead_of_a_square_convolution():
    """ResNet's channels behind a small encoder, as swaps ask for them."""
    strides, channels = (8, 16, 32), (512, 1024, 2048)
    plain, narrow = (
        SimpleFeaturePyramid(192, out_channels=channels, strides=strides, hidden_channels=hidden)
        for hidden in (None, 256)
    )
    sizes = [sum(p.numel() for p in pyramid.parameters()) for pyramid in (plain, narrow)]
    assert sizes[0] > 50e6
    assert sizes[1] < 3.5e6
    levels = narrow(torch.randn(1, 192, 4, 4))
    assert [tuple(level.shape[1:]) for level in levels] == [(512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    ours = SimpleFeaturePyramid(192, out_channels=256, strides=strides, hidden_channels=256).state_dict()
    assert ours.keys() == SimpleFeaturePyramid(192, out_channels=256, strides=strides).state_dict().keys()


def test_plain_pyramid_takes_one_map_for_each_level():
    pyramid = PlainFeaturePyramid((16, 32), out_channels=(4, 8), strides=(8, 32))
    maps = [torch.randn(1, c, 4, 4, requires_grad=True) for c in (16, 32)]
    fine, coarse = pyramid(maps)
    assert (fine.shape, coarse.shape) == ((1, 4, 8, 8), (1, 8, 2, 2))
    fine.square().sum().backward()
    assert maps[0].grad.any()
    assert maps[1].grad is None


def test_deta_pyramid_puts_the_map_between_a_deconvolution_and_a_pooling():
    """Its values against the released ones: test_conversion_deta.py."""
    pyramid, x = DETAFeaturePyramid(16, in_stride=8), torch.randn(2, 16, 4, 6)
    levels = pyramid((x,))
    assert [level.shape[1:] for level in levels] == [(8, 8, 12), (16, 4, 6), (16, 2, 3)]
    assert (pyramid.strides, pyramid.out_channels) == ((4, 8, 16), (8, 16, 16))
    assert_close(levels[1], x, rtol=0, atol=0)
    assert_close(levels[2], x.unflatten(2, (2, 2)).unflatten(4, (3, 2)).amax((3, 5)), rtol=0, atol=0)
    assert list(pyramid.state_dict()) == ["levels.0.weight", "levels.0.bias"]


def test_last_level_is_the_one_before_subsampled():
    levels = SimpleFeaturePyramid(16, out_channels=8)(torch.randn(1, 16, 8, 8))
    assert_close(levels[4], levels[3][:, :, ::2, ::2], rtol=0, atol=0)


def test_channel_layer_norm_is_over_channels():
    norm, x = ChannelLayerNorm(6), torch.randn(2, 6, 3, 4)
    centred = x - x.mean(1, keepdim=True)
    assert_close(norm(x), centred / (centred.square().mean(1, keepdim=True) + 1e-6).sqrt())
    assert_close(ChannelLayerNorm(6, eps=1.0)(x), centred / (centred.square().mean(1, keepdim=True) + 1).sqrt())


def test_fused_pyramid_uses_every_map():
    pyramid = FusedFeaturePyramid((16, 32, 32), out_channels=8)
    maps = [torch.randn(1, c, 4, 4, requires_grad=True) for c in (16, 32, 32)]
    sum(x.square().sum() for x in pyramid(maps)).backward()
    assert all(m.grad.abs().max() > 0 for m in maps)
    scaled = pyramid([maps[0] * 1000, *maps[1:]])
    assert_close(scaled, pyramid(maps), rtol=1e-3, atol=1e-3)  # each map is normalised before they are added


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: SimpleFeaturePyramid(32)([torch.zeros(1, 32, 4, 4)] * 2),
            "SimpleFeaturePyramid takes one map but got 2",
        ),
        (lambda: DETAFeaturePyramid(32)([torch.zeros(1, 32, 4, 4)] * 2), "DETAFeaturePyramid takes one map but got 2"),
        (lambda: FusedFeaturePyramid((32, 32))([torch.zeros(1, 32, 4, 4)]), "got 1 maps for in_channels of 2"),
        (lambda: SimpleFeaturePyramid(32, strides=(8, 12)), "times powers of two"),
        (lambda: SimpleFeaturePyramid(32, strides=(8, 4), unused=(0, 1)), "not all of them"),
        (lambda: SimpleFeaturePyramid(32, strides=(8, 4), unused=(2,)), "places 0 to 1"),
        (lambda: PlainFeaturePyramid((32, 32), strides=(4, 8, 16)), "2 maps for 3 levels"),
        (lambda: PlainFeaturePyramid((32, 32), strides=(4, 8))(torch.zeros(1, 32, 4, 4)), "got 1 maps"),
        (lambda: SimpleFeaturePyramid(32, strides=(4, 8), in_stride=14), "patch_size=16"),
        (lambda: SimpleFeaturePyramid(32, out_channels=(8, 8), strides=(4, 8, 16)), "differ in length"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
