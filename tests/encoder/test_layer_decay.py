"""Layer-wise learning-rate decay: equal to the released recipe's factors, and what is a norm or a bias."""

import pytest
import torch
from helpers.golden import read_json, read_weights

from pe_spatial import VARIANTS, PerceptionEncoder
from pe_spatial.encoder.checkpoint import to_timm_names
from pe_spatial.encoder.layer_decay import is_norm_or_bias, layer_of, lr_factors


@pytest.mark.parametrize("name", ["vitdet_window4_layerscale", "vitdet_window3_padded"])
def test_equals_released_factors(golden, tiny, name):
    factors = read_json(golden / f"vitdet/{name}.json")["lr_decay"]
    theirs = [key for key in factors if key.startswith("net.")]
    state = read_weights(golden / f"vitdet/{name}.pth")
    ours = to_timm_names({key.removeprefix("net."): state[key] for key in theirs})[0]
    assert len(ours) == len(theirs) > 40
    found = lr_factors(tiny(False), 0.9)
    for new, old in zip(ours, theirs, strict=True):
        assert found[new] == pytest.approx(factors[old], rel=1e-12), (new, old)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_a_layer(variant):
    with torch.device("meta"):
        model = PerceptionEncoder(variant, out_indices=(-2,))
    layers = [layer_of(name, model.depth) for name, _ in model.named_parameters()]
    assert set(layers) == set(range(model.depth + 1))
    assert layers == sorted(layers)
    factors = lr_factors(model, 0.5)
    assert factors["pos_embed"] == 0.5 ** (model.depth + 1)
    assert factors[f"blocks.{model.depth - 1}.norm1.weight"] == 0.5


@pytest.mark.parametrize(
    "name", ["blocks.4.norm1.weight", "blocks.x.norm1.weight", "head.weight", "backbone.pos_embed"]
)
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match="is not a parameter of a PerceptionEncoder of 4 blocks"):
        layer_of(name, 4)


def test_norms_biases_and_positions_are_told_from_weights(tiny):
    for name, parameter in tiny(False).named_parameters():
        weight = name.endswith(("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight"))
        assert is_norm_or_bias(name, parameter) is not weight, name
