"""Encoder and pyramid in one, on torch alone: adapters, sizes, dtypes, and the options that frameworks share."""

import inspect

import pytest
import torch
from helpers.encoders import TINY
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder, PerceptionEncoderPyramid, SimpleFeaturePyramid
from pe_spatial.errors import ConfigError


def images(h, w):
    return torch.randn(2, 3, h, w, generator=torch.Generator().manual_seed(0))


def test_is_an_encoder_and_a_pyramid():
    torch.manual_seed(0)
    model = PerceptionEncoderPyramid(TINY, pyramid=dict(out_channels=8), geometry="timm", drop_path_rate=0.1).eval()
    encoder, pyramid = PerceptionEncoder(TINY, geometry="timm").eval(), SimpleFeaturePyramid(32, out_channels=8)
    encoder.load_state_dict(model.encoder.state_dict())
    pyramid.load_state_dict(model.pyramid.state_dict())
    x = images(128, 64)
    levels = model(x)
    assert_close(levels, pyramid(encoder(x)), rtol=0, atol=0)
    assert all(level.is_contiguous() for level in levels)
    assert (model.strides, model.out_channels) == ((4, 8, 16, 32, 64), (8,) * 5)
    assert model.encoder.blocks[-1].drop_path == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("adapter", "layers", "strides"),
    [("simple", (3,), (8, 16)), ("fused", (1, 3), (8, 16)), ("single", (1, 3), (8, 16)), ("deta", (3,), None)],
)
def test_adapters_take_any_size_and_give_float32(adapter, layers, strides):
    pyramid = {} if strides is None else dict(strides=strides, out_channels=4)
    model = PerceptionEncoderPyramid(
        TINY, adapter=adapter, out_indices=layers, pyramid=pyramid, any_size=True, eval_level=1
    )
    with torch.autocast("cpu", torch.bfloat16):
        levels = model(images(50, 70))
        assert model.eval()(images(50, 70)).shape == levels[1].shape
    expected = [(-(-50 // s), -(-70 // s)) for s in model.strides]
    assert [(level.shape[-2:], level.dtype) for level in levels] == [(size, torch.float32) for size in expected]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(adapter="fpn"), "adapter is 'fpn'; allowed are 'simple', 'fused', 'single', 'deta'"),
        (dict(adapter="deta", out_indices=(1, 2)), "'deta' reads one layer but out_indices names 2"),
    ],
)
def test_bad_adapters_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        PerceptionEncoderPyramid(TINY, **options)


@pytest.mark.parametrize("framework", ["openmmlab", "detectron2"])
def test_frameworks_take_the_same_options(framework):
    pytest.importorskip({"openmmlab": "mmdet"}.get(framework, framework))
    module = __import__(f"pe_spatial.integrations.{framework}", fromlist=["PerceptionEncoderPyramid"])
    registered = module.PerceptionEncoderPyramid
    assert issubclass(registered, PerceptionEncoderPyramid)
    taken = inspect.signature(registered).parameters.values()
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken)  # all of the core's go through
    pyramid = dict(strides=(8, 16), out_channels=4)
    model = registered(TINY, pyramid=pyramid, adapter="fused", out_indices=(1, 3), any_size=True, eval_level=0)
    assert (model.any_size, model.eval_level, model.strides) == (True, 0, (8, 16))
