"""What people pass to an encoder: accepted, or said in one sentence."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.encoders import TINY, TINY_NO_CLASS
from helpers.versions import COMPILE
from torch.testing import assert_close

from pe_spatial import (
    EncoderConfig,
    Geometry,
    PerceptionEncoder,
    PerceptionEncoderPyramid,
    SimpleFeaturePyramid,
    from_pretrained,
)


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return PerceptionEncoder(TINY).eval()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_images_that_are_not_normalized_are_said(encoder, dtype):
    with pytest.raises(TypeError, match=rf"images are {str(dtype)[6:]}.*normalize"):
        encoder(torch.zeros(1, 3, 64, 64, dtype=dtype))


@pytest.mark.parametrize(("images", "weights"), [
    (torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
    (torch.float16, torch.float32), (torch.bfloat16, torch.float16),
])  # fmt: skip
def test_images_of_another_dtype_than_the_weights_are_said(encoder, images, weights):
    a, b = (str(dtype)[6:] for dtype in (images, weights))
    with pytest.raises(TypeError, match=rf"images are {a} and the weights {b}"):
        encoder.to(weights)(torch.zeros(1, 3, 64, 64, dtype=images))


def test_autocast_takes_either_dtype(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.bfloat16):
            encoder(torch.zeros(1, 3, 64, 64, dtype=dtype))


def test_pyramid_says_the_same():
    model = PerceptionEncoderPyramid(TINY, pyramid=dict(strides=(16,), out_channels=8))
    with pytest.raises(TypeError, match=r"images are uint8.*normalize"):
        model(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))


@pytest.mark.parametrize("images", [np.zeros((1, 3, 64, 64), np.float32), [torch.zeros(3, 64, 64)], None])
def test_what_is_not_a_tensor_is_said(encoder, images):
    with pytest.raises(TypeError, match=r"images are a .*; pass a tensor \(B, 3, H, W\)"):
        encoder(images)


def test_one_image_without_a_batch_axis_and_channels_last_are_said(encoder):
    with pytest.raises(ValueError, match=r"images are \(3, 64, 64\); expected \(B, 3, H, W\)"):
        encoder(torch.zeros(3, 64, 64))
    with pytest.raises(
        ValueError, match=r"images are \(1, 64, 64, 3\); expected \(B, 3, H, W\).*permute\(0, 3, 1, 2\)"
    ):
        encoder(torch.zeros(1, 64, 64, 3))


@pytest.mark.parametrize("value", [3, -1, np.int64(3), [3], (3,), range(3, 4), np.array([3])])
def test_one_index_is_a_tuple_of_one(value):
    assert PerceptionEncoder(TINY, out_indices=value).out_indices == (3,)


@pytest.mark.parametrize("value", [2, np.int64(2), [2]])
def test_one_index_elsewhere_too(value):
    assert PerceptionEncoder(TINY, grad_checkpointing=[2]).grad_checkpointing == {2: "full"}
    geometry = PerceptionEncoder(TINY, window_size=2, global_attn_indexes=value).geometry
    assert geometry.global_attn_indexes == (2,)


@pytest.mark.parametrize("value", [3.0, "3", (3.0,), ("3",), None, (True,)])
def test_an_index_of_another_type_is_said(value):
    with pytest.raises((TypeError, ValueError), match=r"out_indices is .*; give block numbers"):
        PerceptionEncoder(TINY, out_indices=value)


FIELDS = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "in_chans")


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("convert", [float, str, lambda n: n + 0.5])
def test_sizes_that_are_not_integers_are_said(field, convert):
    fields = {name: getattr(TINY, name) for name in FIELDS}
    value = convert(fields[field])
    with pytest.raises(TypeError, match=rf"{field} is {re.escape(repr(value))}; give an integer"):
        EncoderConfig(**{**fields, field: value})


@pytest.mark.parametrize("field", ["patch_size", "pos_grid", "window_size", "rope_grid"])
@pytest.mark.parametrize("value", [16.0, "16", 2.5])
def test_sizes_of_the_geometry_too(field, value):
    more = {"rope_mode": "interpolate"} if field == "rope_grid" else {}
    more |= {"global_attn_indexes": ()} if field == "window_size" else {}
    with pytest.raises((TypeError, ValueError), match=rf"{field} is {re.escape(repr(value))}; "):
        PerceptionEncoder(TINY, **{field: value}, **more)


@pytest.mark.parametrize("value", [2.0, "2", True])
def test_frozen_stages_too(value):
    with pytest.raises((TypeError, ValueError), match=rf"frozen_stages is {value!r}"):
        PerceptionEncoder(TINY, frozen_stages=value)


def test_numpy_sizes_are_sizes():
    config = EncoderConfig(**{name: np.int64(getattr(TINY, name)) for name in FIELDS})
    assert config == TINY
    assert all(type(getattr(config, name)) is int for name in FIELDS)
    PerceptionEncoder(config, window_size=np.int64(2), global_attn_indexes=())


@pytest.mark.parametrize("value", [256.0, "256", (8.0,)])
def test_channels_of_the_pyramid_too(value):
    with pytest.raises((TypeError, ValueError), match=r"out_channels is .*; give"):
        SimpleFeaturePyramid(32, out_channels=value, strides=(16,))


# --- tracing


GEOMETRIES = {
    "release": dict(), "timm": dict(geometry="timm"), "resized": dict(img=96),
    "windows": dict(geometry="vitdet", window_size=3, global_attn_indexes=(1, 3)),
}  # fmt: skip


@pytest.mark.parametrize("config", [TINY, TINY_NO_CLASS], ids=["class token", "no class token"])
@COMPILE
@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_trace_and_export_equal_eager(config, geometry):
    options = dict(GEOMETRIES[geometry])
    side = options.pop("img", 64)
    torch.manual_seed(0)
    model = PerceptionEncoder(config, out_indices=(1, -1), **options).eval()
    images = torch.randn(1, 3, side, side)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)  # it says that a number may be wrong for other images
        expected = model(images)
        traced = torch.jit.trace(model, images)
        assert "view_as_complex" not in str(traced.inlined_graph)
        other = torch.randn(1, 3, side, side)
        assert_close(traced(images), expected, rtol=0, atol=1e-6)
        several = torch.cat((other, images))  # the size is that of the trace, the batch is not
        assert_close(traced(several), model(several), rtol=0, atol=1e-6)
    with torch.no_grad():
        program = torch.export.export(model, (images,))
        assert "complex" not in str(program.graph)
        # a graph resizes positions by matrix products
        assert_close(program.module()(other), model(other), rtol=0, atol=2e-6)
        assert_close(model(images), expected, rtol=0, atol=0)  # eager is as before


def test_from_pretrained_says_the_configuration_of_the_shapes(tmp_path):
    from pe_spatial.encoder.files import CheckpointError

    for config in (TINY, TINY_NO_CLASS, replace(TINY, mlp_ratio=3.0)):
        torch.save(PerceptionEncoder(config).state_dict(), tmp_path / "w.pth")
        with pytest.raises(CheckpointError, match="give variant=dict") as error:
            from_pretrained(tmp_path / "w.pth")
        text = re.search(r"variant=(dict\(.*?\))", str(error.value))[1]
        assert "num_heads" in str(error.value)
        found = EncoderConfig(**{**eval(text), "num_heads": config.num_heads})
        assert found == replace(config, init_values=found.init_values)
        assert (found.init_values is None) == (config.init_values is None)
        assert from_pretrained(tmp_path / "w.pth", variant=found).config == found


def test_geometry_given_as_an_object_with_an_override():
    assert PerceptionEncoder(TINY, geometry=Geometry(), window_size=2, global_attn_indexes=()).geometry.window_size == 2
