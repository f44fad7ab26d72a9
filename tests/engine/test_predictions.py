"""Folders of predictions know the model that wrote them."""

import json

import pytest
import torch

from pe_spatial.engine.predictions import record_model
from pe_spatial.errors import ConfigError


@pytest.fixture
def checkpoint(tmp_path):
    torch.save({"x": torch.ones(1)}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


def test_other_options_are_refused_once_there_are_predictions(tmp_path, checkpoint):
    out = tmp_path / "out"
    for size in (None, 192):  # a call that fails at its first image may be repeated with what its error asks for
        record_model(out, checkpoint, overwrite=False, size=size)
    (out / "a.npy").touch()
    record_model(out, checkpoint, overwrite=False, size=192)
    with pytest.raises(ConfigError, match="holds predictions with another size; choose another --out"):
        record_model(out, checkpoint, overwrite=False, size=None)
    record_model(out, checkpoint, overwrite=True, size=None)


@pytest.mark.parametrize("content", [json.dumps({"models": {}}), "[]", "{"])
def test_metadata_of_another_command_is_one_sentence(tmp_path, checkpoint, content):
    (tmp_path / "metadata.json").write_text(content)
    with pytest.raises(ConfigError, match=r"metadata\.json is not of such predictions; choose another --out"):
        record_model(tmp_path, checkpoint, overwrite=False)
