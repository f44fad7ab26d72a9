"""The table of variants, their names, and the presets of geometry."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from helpers.golden import read_json

from pe_spatial import VARIANTS, EncoderConfig, PerceptionEncoder
from pe_spatial.encoder.variants import PRESETS, RELEASED_NAMES, get_config, preset_options, vitdet_recipe

# Counted from the released configurations (class token, positions and all blocks; no pooling, no projection).
PARAMETERS = {
    "pe_spatial_t16_512": 5_683_200,
    "pe_spatial_s16_512": 21_983_232,
    "pe_spatial_b16_512": 86_433_792,
    "pe_spatial_l14_448": 303_964_160,
    "pe_spatial_g14_448": 1_851_887_104,
}


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in PerceptionEncoder(name).parameters()) == count


def test_every_released_name_is_known_in_both_spellings(golden):
    released = read_json(golden / "encoder/release_state_dicts.json")
    assert set(RELEASED_NAMES.values()) == set(released)
    for ours, theirs in RELEASED_NAMES.items():
        assert get_config(ours) is get_config(theirs) is VARIANTS[ours]
        assert get_config(asdict(VARIANTS[ours])) == VARIANTS[ours]


def test_name_is_kept_for_loading_released_weights():
    with torch.device("meta"):
        assert PerceptionEncoder("PE-Spatial-T16-512").variant == "pe_spatial_t16_512"
        assert PerceptionEncoder(VARIANTS["pe_spatial_t16_512"]).variant is None


@pytest.mark.parametrize("name", ["pe_spatial_b16_224", "vit_base", ""])
def test_unknown_variant_lists_the_known(name):
    with pytest.raises(ValueError, match="unknown variant") as error:
        PerceptionEncoder(name)
    assert all(known in str(error.value) for known in VARIANTS)


def test_config_is_frozen_and_checked():
    config = VARIANTS["pe_core_l14_336"]
    assert config.grid_size == 24
    with pytest.raises(FrozenInstanceError):
        config.depth = 3
    with pytest.raises(ValueError, match="multiple of 4"):
        replace(config, num_heads=512)
    with pytest.raises(ValueError, match="smaller than patch_size"):
        replace(config, img_size=8)
    with pytest.raises(TypeError):
        EncoderConfig(224, 16, 192, 12, 3)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", VARIANTS)
def test_presets_build_every_variant(preset, name):
    config = VARIANTS[name]
    detector = preset in ("vitdet", "deta")
    if detector and config.depth not in (12, 24, 50):
        with pytest.raises(ValueError, match=r"no ViTDet recipe is published for (23|47) blocks"):
            preset_options(preset, name)
        return
    with torch.device("meta"):
        model = PerceptionEncoder(name, **preset_options(preset, name))
    assert model.patch_size == (16 if detector else config.patch_size)
    assert model.rope_grid == ((16, 16) if preset == "deta" else (config.grid_size, config.grid_size))
    assert model.pos_grid == (24 if preset == "deta" else config.grid_size)
    if detector:
        assert model.window_size == model.pos_grid
        # Every run of windowed blocks ends in one of four global blocks, the last of them the last block.
        assert [kind for kind, _ in model._runs] == [True, False] * 4
        assert model.blocks[-1].drop_path == vitdet_recipe(config.depth).drop_path_rate


def test_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="release, timm, vitdet, deta"):
        preset_options("vit", "pe_spatial_b16_512")
