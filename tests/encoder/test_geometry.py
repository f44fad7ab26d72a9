"""Geometry: what each preset is in numbers, overrides, and the warning for sizes that the released one is bad at."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from helpers.versions import COMPILE

from pe_spatial import VARIANTS, Geometry, PerceptionEncoder
from pe_spatial.encoder import vit
from pe_spatial.encoder.geometry import PRESETS, get_geometry
from pe_spatial.encoder.variants import VITDET_RECIPES, vitdet_recipe

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
        model = PerceptionEncoder(name, geometry=preset)
    assert model.geometry.resolve(config) == model.geometry
    said = "custom" if detector and config.depth not in VITDET_RECIPES else preset
    assert f"geometry={said}" in repr(model)
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
        ({"window_size": "all"}, ValueError, "window_size is 'all'; allowed are a number of tokens from 1"),
        ({"patch_size": 0}, ValueError, "patch_size is 0 pixels; give at least 1"),
    ],
)
def test_bad_geometries_are_named(tiny, options, error, words):
    with pytest.raises(error, match=words):
        tiny(**options)


def test_another_depth_takes_the_nearest_recipe_and_says_so_once(caplog):
    vitdet_recipe.cache_clear()
    with torch.device("meta"):
        for _ in range(2):
            model = PerceptionEncoder("pe_synthetic_xs8_192", geometry="vitdet", drop_path_rate="vitdet")
    assert model.geometry.global_attn_indexes == (0, 1, 2, 4)
    assert model.blocks[-1].drop_path == 0.1
    assert [record.getMessage() for record in caplog.records] == [
        "no ViTDet recipe is published for 5 blocks: blocks [0, 1, 2, 4] get global attention (with geometry "
        "'vitdet'), and drop path and layer decay are those of 12 blocks: 0.1 and 0.7"
    ]


@COMPILE
def test_one_warning_where_the_released_geometry_meets_large_images(tiny, monkeypatch, caplog):
    monkeypatch.setattr(vit, "_warned", False)
    caplog.set_level("WARNING", logger=vit.__name__)
    release, windowed = tiny(), tiny(geometry="vitdet", global_attn_indexes=[3])
    large, twice = torch.zeros(1, 3, 144, 144), torch.zeros(1, 3, 128, 256)
    with torch.no_grad():
        release(large)  # not a released variant, so the advice does not apply
        monkeypatch.setitem(vit.VARIANTS, "tiny", release.config)
        release(twice)
        windowed(large)
        tiny(geometry="timm")(large)
        torch.compile(release, backend="eager", fullgraph=True)(large)
        assert not caplog.records
        release(large)
        release(large)
    assert [record.getMessage() for record in caplog.records] == [
        "images of 9x9 patches are more than 2 times the pretraining grid of 4x4, and the geometry is 'release', with "
        "which PE-Spatial gets worse at such sizes; use geometry='vitdet' (windows of the pretraining grid) or smaller "
        "images"
    ]
