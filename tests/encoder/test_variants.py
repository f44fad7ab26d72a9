"""The table of variants, their names, and the published recipe by depth."""

from dataclasses import FrozenInstanceError, asdict, replace

import pytest
import torch
from helpers.golden import read_json

from pe_spatial import VARIANTS, EncoderConfig, PerceptionEncoder
from pe_spatial.encoder.variants import RELEASED_NAMES, get_config, recipe_rate

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


def test_pixels_are_normalized_as_in_the_released_transform():
    assert {(config.mean, config.std) for config in VARIANTS.values()} == {((127.5,) * 3, (127.5,) * 3)}
    config = EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=1, num_heads=2, mean=[1, 2, 3])
    assert (config.mean, hash(config)) == ((1, 2, 3), hash(replace(config)))
    with pytest.raises(ValueError, match=r"std is \(1,\); give three numbers, for R, G and B"):
        replace(config, std=[1])


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


def test_recipe_is_the_published_one_and_numbers_stay():
    assert [recipe_rate("drop_path_rate", "vitdet", depth) for depth in (12, 24, 50)] == [0.1, 0.4, 0.5]
    assert [recipe_rate("layer_decay_rate", "vitdet", depth) for depth in (12, 24, 50)] == [0.7, 0.8, 0.9]
    assert recipe_rate("drop_path_rate", 0.3, 7) == 0.3
    with torch.device("meta"):
        blocks = PerceptionEncoder("pe_spatial_l14_448", drop_path_rate="vitdet", out_indices=(-2,)).blocks
    assert [round(block.drop_path, 6) for block in blocks] == [round(0.4 * i / 23, 6) for i in range(23)]


def test_other_recipes_are_refused():
    with pytest.raises(ValueError, match="drop_path_rate is 'vit'; allowed are a number and 'vitdet'"):
        PerceptionEncoder("pe_lang_l14_448", drop_path_rate="vit")
