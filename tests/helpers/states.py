"""State dicts as the converter's tests make and compare them."""

from pathlib import Path

import torch

from pe_spatial.encoder.files import CheckpointFile


def file(state, **rest):
    return CheckpointFile(Path("weights.pth"), dict(state), rest)


def shapes_of(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert torch.equal(found[name], value), name
