"""`compile` of a config: the same run, checkpoints and sizes as without."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("mmengine")
from helpers import encoders
from helpers.tiny_run import tiny_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn
from torch._dynamo.utils import counters
from torch.testing import assert_close

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.errors import ConfigError

TINY = replace(encoders.TINY, depth=2)


@MODELS.register_module()
class OfManySizes(BaseModel):
    """An encoder and a head on stripes, which are wider from step to step."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = MODELS.build(backbone), nn.Linear(TINY.embed_dim, 1)
        self.register_buffer("width", torch.tensor(32))  # a resumed run goes on with it

    def forward(self, inputs, **_):
        self.width += 16
        width = int(self.width)
        stripes = torch.stack(list(inputs)).repeat(1, 1 + width // 4)[:, :width] / 20
        maps = self.backbone(stripes[:, None, None].expand(-1, 3, 64, -1))[0]
        return dict(loss=self.head(maps.mean((2, 3))).square().mean())


def run(folder, resume=None, **changes):
    backbone = dict(type="PerceptionEncoder", variant=TINY.__dict__, geometry="vitdet", window_size=2)
    backbone |= dict(global_attn_indexes=[1], grad_checkpointing="selective")
    cfg = tiny_config(folder, **{"model": dict(type="OfManySizes", backbone=backbone), **changes})
    cfg.custom_imports = dict(imports=["pe_spatial.integrations.openmmlab"])
    prepare_training(cfg, resume=resume, deterministic=True)
    return train(cfg)


@pytest.fixture(autouse=True)
def start_anew():
    torch._dynamo.reset()
    counters.clear()


def weights(path):
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.slow
def test_compiled_training_equals_training(tmp_path):
    """Resumed in the middle, compiled, while sizes change in every step, a run ends with the same checkpoint."""
    halves = {"default_hooks.checkpoint.interval": 5}
    run(tmp_path / "plain", **halves)
    middle = str(tmp_path / "plain" / "iter_5.pth")
    run(tmp_path / "compiled", resume=middle, compile=dict(backend="aot_eager"), **halves)
    expected, compiled = (weights(tmp_path / name / "iter_10.pth") for name in ("plain", "compiled"))
    assert list(compiled) == list(expected)  # no name of a wrapper
    assert_close(compiled, expected, rtol=1e-5, atol=1e-6)
    assert 1 <= counters["stats"]["unique_graphs"] <= 4
    assert (compiled["head.weight"] - weights(middle)["head.weight"]).abs().max() > 1e-3  # it did train
    PerceptionEncoder(TINY, geometry="vitdet", window_size=2, global_attn_indexes=[1]).load_state_dict(
        {name.removeprefix("backbone."): x for name, x in compiled.items() if name.startswith("backbone.")}
    )


def test_nothing_to_compile(tmp_path):
    with pytest.raises(ConfigError, match="no PerceptionEncoder to compile"):
        run(tmp_path, model=dict(type="Line"), compile=True)
