"""Geometry: what each preset is in numbers, overrides, and the warning for sizes that the released one is bad at."""

import warnings
from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from pe_spatial import VARIANTS, Geometry, PerceptionEncoder
from pe_spatial.encoder import vit
from pe_spatial.encoder.geometry import GLOBAL_BLOCKS, PRESETS, get_geometry, preset_name

# In the order of the fields, for pe_core_b16_224 and pe_spatial_g14_448.
RESOLVED = {
    "release": [
        (16, "bilinear", 14, "extrapolate", None, None, (), False),
        (14, "bilinear", 32, "extrapolate", None, None, (), False),
    ],
    "timm": [
        (16, "bicubic_antialias", 14, "interpolate", (14, 14), None, (), False),
        (14, "bicubic_antialias", 32, "interpolate", (32, 32), None, (), False),
    ],
    "vitdet": [
        (16, "tile", 14, "interpolate", (14, 14), 14, (2, 5, 8, 11), False),
        (16, "tile", 32, "interpolate", (32, 32), 32, (12, 24, 36, 49), False),
    ],
    "deta": [
        (16, "tile", 24, "interpolate", (16, 16), 24, (2, 5, 8, 11), False),
        (16, "tile", 24, "interpolate", (16, 16), 24, (12, 24, 36, 49), False),
    ],
}


def numbers(geometry):
    return tuple(getattr(geometry, name) for name in geometry.__dataclass_fields__)


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_in_numbers(preset):
    for name, expected in zip(("pe_core_b16_224", "pe_spatial_g14_448"), RESOLVED[preset], strict=True):
        assert numbers(PRESETS[preset].resolve(VARIANTS[name])) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_presets_build_every_variant_and_say_so(preset, name):
    config = VARIANTS[name]
    detector = preset in ("vitdet", "deta")
    with torch.device("meta"):
        if detector and config.depth not in GLOBAL_BLOCKS:
            words = f"no global blocks are published for {config.depth} blocks, only for 12, 24, 50; give global_attn_"
            with pytest.raises(ValueError, match=words):
                PerceptionEncoder(name, geometry=preset)
            return
        model = PerceptionEncoder(name, geometry=preset)
    assert model.geometry.resolve(config) == model.geometry
    assert preset_name(model.geometry, config) == preset
    assert f"geometry={preset}" in repr(model)
    assert {block.drop_path for block in model.blocks} == {0.0}
    if detector:  # windowed blocks alternate with four global blocks, and the last block is global
        assert [window is not None for window, _ in model._block_groups] == [True, False] * 4


def test_overrides_change_single_fields(tiny):
    geometry = tiny(geometry="timm", window_size="pretraining", global_attn_indexes=[-1]).geometry
    assert numbers(geometry) == (16, "bicubic_antialias", 4, "interpolate", (4, 4), 4, (3,), False)
    assert get_geometry({"rope_mode": "interpolate", "rope_grid": [2, 3]}) == Geometry(
        rope_mode="interpolate", rope_grid=[2, 3]
    )
    assert get_geometry(PRESETS["deta"], pos_grid=None) == replace(PRESETS["deta"], pos_grid=None)
    assert tiny(geometry=geometry).geometry == geometry
    assert "geometry=custom" in repr(tiny(geometry=geometry))
    with pytest.raises(FrozenInstanceError):
        geometry.patch_size = 8


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"geometry": "vit"}, ValueError, "geometry is 'vit'; allowed are 'release', 'timm', 'vitdet', 'deta'"),
        ({"geometry": None}, ValueError, "geometry is None; allowed are a Geometry, its fields and release"),
        ({"norm_layer": "LN"}, TypeError, "unknown option norm_layer; the fields of a geometry are patch_size, pos_"),
        ({"geometry": {"window": 3}}, TypeError, "unknown option window;"),
        ({"window_size": 3}, ValueError, r"no global blocks are published for 4 blocks.* \[\] for windows everywhere"),
        ({"window_size": "all"}, ValueError, "window_size is 'all'; allowed are a number of tokens from 1"),
        ({"patch_size": 0}, ValueError, "patch_size is 0 pixels; give at least 1"),
    ],
)
def test_bad_geometries_are_named(tiny, options, error, words):
    with pytest.raises(error, match=words):
        tiny(**options)


def test_one_warning_where_the_released_geometry_meets_large_images(tiny, monkeypatch):
    monkeypatch.setattr(vit, "_warned", False)
    release, windowed = tiny(), tiny(geometry="vitdet", global_attn_indexes=[3])
    large, twice = torch.zeros(1, 3, 144, 144), torch.zeros(1, 3, 128, 256)
    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        release(twice)
        windowed(large)
        tiny(geometry="timm")(large)
        torch.compile(release, backend="eager", fullgraph=True)(large)
        assert not caught
        release(large)
        release(large)
    assert [str(warning.message) for warning in caught] == [
        "images of 9x9 patches are more than 2 times the pretraining grid of 4x4, and the geometry is 'release', with "
        "which PE-Spatial gets worse at such sizes; use geometry='vitdet' (windows of the pretraining grid) or smaller "
        "images"
    ]
