"""Colors of features, similarity and attention have the properties that make them readable."""

import math

import numpy as np
import pytest
import torch
from helpers.encoders import TINY, TINY_NO_CLASS
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder
from pe_spatial.features.patches import attention_map, attention_weights, recorded_attention, similarity
from pe_spatial.features.pca import Basis, lch_to_rgb, shared_over_layers, smooth
from pe_spatial.features.sheet import Strip, draw_strips

WINDOWS = {"window_size": 3, "global_attn_indexes": (1, 3), "rope_mode": "interpolate", "pos_embed_mode": "tile"}


def maps(*shape, seed=0):
    """Return maps whose variances differ by channel and whose components are skewed, as those of encoders."""
    x = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) ** 3
    return x * torch.logspace(0, -2, shape[1])[:, None, None]


def rotation(dim):
    return torch.linalg.qr(torch.randn(dim, dim, generator=torch.Generator().manual_seed(1)))[0]


def test_titles_have_letters_of_other_languages():
    cell = ("", np.zeros((4, 4, 3), np.uint8))
    missing = draw_strips([Strip("\ue000", [cell])], columns=1, width=60)
    for letter in "äßéñłøЖΩ":
        assert (draw_strips([Strip(letter, [cell])], columns=1, width=60) != missing).any(), letter


def test_smooth_is_half_of_torchvisions_blur_inside():
    blur = pytest.importorskip("torchvision.transforms.functional").gaussian_blur
    x = maps(2, 5, 7, 9)
    inside = (..., slice(1, -1), slice(1, -1))
    assert_close(smooth(x)[inside], (0.5 * x + 0.5 * blur(x, [3, 3], [1.0, 1.0]))[inside])
    assert_close(smooth(torch.full((1, 2, 1, 4), 3.0)), torch.full((1, 2, 1, 4), 3.0))


def test_components_do_not_depend_on_the_axes_of_the_features():
    x = maps(2, 8, 6, 10)
    turned = torch.einsum("bchw,cd->bdhw", x, rotation(8)) * 5 + 3
    assert_close(Basis.fit([turned]).components(turned), Basis.fit([x]).components(x), rtol=1e-3, atol=1e-4)
    assert Basis.fit([x]).colors(x).shape == (2, 6, 10, 3)


def test_axes_are_the_principal_ones_of_all_maps_together():
    first, second = maps(1, 8, 6, 10), maps(2, 8, 4, 5, seed=7) + 1
    basis = Basis.fit([first, second])
    x = torch.cat([m.movedim(1, -1).flatten(0, 2) for m in (first, second)])
    _, _, v = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    assert_close((basis.axes.T @ v[:3].T).abs(), torch.eye(3), rtol=0, atol=1e-4)
    skewness = ((x - x.mean(0)) @ basis.axes).pow(3).sum(0)
    assert (skewness > 0).all()


def test_layers_that_differ_in_mean_and_scale_alone_get_the_same_colors():
    x = maps(1, 8, 6, 10)
    first, second = shared_over_layers([[x], [9 * x - 4]])
    assert_close(first.components(x), second.components(9 * x - 4), rtol=1e-3, atol=1e-4)


def test_constant_features_get_one_color():
    x = torch.ones(1, 4, 3, 3)
    colors = Basis.fit([x]).colors(x)
    assert (colors == colors[0, 0, 0]).all()


def test_known_colors_of_lch():
    known = {  # L, C, h in degrees: from CSS Color 4's examples and the definition
        (100, 0, 0): (255, 255, 255), (0, 0, 0): (0, 0, 0), (53.24, 104.55, 40.0): (255, 0, 0),
        (87.73, 119.78, 136.02): (0, 255, 0), (32.30, 133.81, 306.28): (0, 0, 255), (53.585, 0, 0): (128, 128, 128),
    }  # fmt: skip
    lch = torch.tensor([(lightness, chroma, math.radians(hue)) for lightness, chroma, hue in known])
    assert_close(lch_to_rgb(lch).int(), torch.tensor(list(known.values())).int(), rtol=0, atol=1)


def test_a_patch_is_most_similar_to_itself():
    x = torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(0))
    values = similarity(x, (2, 3))
    assert_close(values[2, 3], torch.tensor(1.0))
    assert values.argmax() == 2 * 5 + 3
    assert_close(similarity(3 * x, (2, 3)), values)
    assert (values.abs() <= 1 + 1e-6).all()


def encoder(config, **options):
    torch.manual_seed(0)
    return PerceptionEncoder(config, out_indices=range(config.depth), **options).eval()


@pytest.mark.parametrize(
    ("config", "options"),
    [(TINY, {}), (TINY_NO_CLASS, {}), (TINY, WINDOWS), (TINY, {**WINDOWS, "mask_window_padding": True})],
    ids=["class", "no class", "windows", "masked windows"],
)
@torch.no_grad()
def test_weights_times_values_are_the_output_of_the_attention(config, options):
    model, outputs = encoder(config, **options), {}
    for i, block in enumerate(model.blocks):
        block.attn.register_forward_hook(lambda *args, i=i: outputs.update({i: args[-1]}))
    with recorded_attention(model, range(4)) as recorded:
        model(torch.randn(1, 3, 64, 80))
    assert recorded.keys() == {0, 1, 2, 3}
    for i, inputs in recorded.items():
        attn = model.blocks[i].attn
        queries = range(inputs[0].shape[1])
        weights = torch.stack([attention_weights(attn, inputs, query) for query in queries], dim=2)  # (B, H, N, N)
        values = attn.heads(*inputs[:2])[2]
        assert_close(attn.proj((weights @ values).transpose(1, 2).flatten(2)), outputs[i], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_maps_of_attention_are_where_the_patches_are():
    model = encoder(TINY, **WINDOWS)
    with recorded_attention(model, range(4)) as recorded:
        model(torch.randn(1, 3, 64, 80))  # 4 x 5 patches in four windows of 3 x 3
    windowed = attention_map(model, 0, recorded[0], (4, 5), (3, 1))
    assert (windowed[3, :3] > 0).all()
    assert windowed[:3].sum() == windowed[:, 3:].sum() == 0
    assert attention_map(model, 0, recorded[0], (4, 5), None).min() > 0
    whole = attention_map(model, 1, recorded[1], (4, 5), (2, 3))
    row = attention_weights(model.blocks[1].attn, recorded[1], 1 + 2 * 5 + 3)[0].mean(0)
    assert_close(whole, row[1:].view(4, 5))


def test_recording_leaves_no_trace():
    model = encoder(TINY)
    with recorded_attention(model, [1]):
        pass
    assert not any(block.attn._forward_pre_hooks for block in model.blocks)
