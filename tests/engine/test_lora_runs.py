"""Runs with adapters: what is saved, resumed, evaluated and merged; another base is refused, a random one is saved."""

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.encoders import TINY
from helpers.tiny_run import tiny_config
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from torch import nn
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder
from pe_spatial.convert.converter import convert
from pe_spatial.encoder.files import CheckpointError, read_checkpoint
from pe_spatial.engine.configs import config_in
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.engine.weights import load_weights, merge_checkpoint


@MODELS.register_module()
class Adapted(BaseModel):
    """An encoder and a head on stripes."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = MODELS.build(backbone), nn.Linear(TINY.embed_dim, 1)

    def forward(self, inputs, **_):
        stripes = torch.stack(list(inputs)).repeat(1, 16) / 20  # (B, 64)
        return dict(loss=self.head(self.backbone(stripes[:, None, None].expand(-1, 3, 64, -1))[0].mean((2, 3))).mean())


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    torch.save(PerceptionEncoder(TINY).state_dict(), path)
    return path


def config(folder, base, *, lora=None, **changes):
    init = base and dict(type="Pretrained", checkpoint=str(base))
    options = dict(rank=2, dropout=0.1) if lora is None else lora
    backbone = dict(type="PerceptionEncoder", variant=TINY.__dict__, lora=options, init_cfg=init)
    changes = {"default_hooks.checkpoint.max_keep_ckpts": -1, "optim_wrapper.optimizer.lr": 0.01, **changes}
    cfg = tiny_config(folder, model=dict(type="Adapted", backbone=backbone), **changes)
    cfg.custom_imports = dict(imports=["pe_spatial.integrations.openmmlab"])
    return cfg


def run(folder, base, *, resume=None, **changes):
    """Train with the same random numbers, also after resuming."""
    cfg = config(folder, base, **changes)
    prepare_training(cfg, resume=resume and str(resume), deterministic=True)
    return train(cfg)


def read(path):
    return torch.load(path, weights_only=False)


AVERAGED = dict(custom_hooks=[dict(type="EMAHook", momentum=0.3, update_buffers=True)])
DECAY = {
    "optim_wrapper.constructor": "LayerDecayOptimWrapperConstructor",
    "optim_wrapper.paramwise_cfg": dict(layer_decay_rate=0.5),
}


@pytest.mark.parametrize("changes", [{}, AVERAGED | DECAY], ids=["plain", "averaged"])
def test_a_resumed_run_equals_one_that_was_not_interrupted(tmp_path, base, changes):
    run(tmp_path / "a", base, **changes)
    run(tmp_path / "b", base, resume=tmp_path / "a" / "iter_4.pth", **changes)
    ours, theirs = read(tmp_path / "b" / "iter_10.pth"), read(tmp_path / "a" / "iter_10.pth")
    for part in ("state_dict", *(["ema_state_dict"] if changes else [])):
        assert_close(dict(ours[part]), dict(theirs[part]), rtol=0, atol=0)
        names = {name.removeprefix("module.").rpartition(".")[2] for name in ours[part]}
        assert names - {"steps"} == {"lora_a", "lora_b", "weight", "bias"}
        assert {name for name in ours[part] if not name.endswith(("lora_a", "lora_b", "steps"))} == {
            f"{'module.' * (part != 'state_dict')}head.{name}" for name in ("weight", "bias")
        }
    assert_close(ours["optimizer"]["state"], theirs["optimizer"]["state"], rtol=0, atol=0)
    assert ours["meta"]["lora"]["backbone"]["source"] == str(base)
    moved = [
        not torch.equal(x, read(tmp_path / "a" / "iter_4.pth")["state_dict"][n]) for n, x in ours["state_dict"].items()
    ]
    assert all(moved)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, base):
    """The checkpoint of a run with DoRA."""
    folder = tmp_path_factory.mktemp("trained")
    run(folder, base, lora=dict(rank=2, dora=True))
    return folder / "iter_10.pth"


def test_a_checkpoint_is_small_and_merges_into_plain_weights(trained, base, tmp_path):
    assert trained.stat().st_size < 0.7 * base.stat().st_size  # with the states of Adam and of the run
    cfg = config_in(str(trained))
    model = MODELS.build(cfg.model)
    load_weights(model, trained)
    assert merge_checkpoint(cfg, str(trained), tmp_path / "merged.pth") == len(PerceptionEncoder(TINY).state_dict()) + 2
    merged = MODELS.build(config_in(str(tmp_path / "merged.pth")).model)
    assert merged.backbone.lora is None
    load_weights(merged, tmp_path / "merged.pth")
    images = torch.rand(2, 3, 64, 64)
    expected = model.eval().backbone(images)[0]
    assert_close(merged.eval().backbone(images)[0], expected, rtol=1e-5, atol=1e-5)
    plain = PerceptionEncoder(TINY).eval()
    plain.load_state_dict(torch.load(base))
    assert not torch.allclose(plain(images)[0], expected)
    with pytest.raises(CheckpointError, match=r"merged\.pth holds no LoRA adapters: .* merged already"):
        merge_checkpoint(cfg, str(tmp_path / "merged.pth"), tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match=r"holds LoRA adapters, which have no other layout"):
        convert(read_checkpoint(trained), "timm")
    with pytest.raises(CheckpointError, match=r"has none; give .* lora=dict\(rank=2, dora=True\) .*merge_lora"):
        load_weights(MODELS.build({**cfg.model, "backbone": {**cfg.model.backbone, "lora": None}}), trained)


def test_another_base_is_refused_when_resuming(trained, base, tmp_path):
    torch.save({name: x + 1 for name, x in torch.load(base).items()}, tmp_path / "other.pt")
    with pytest.raises(
        CheckpointError, match=r"iter_10\.pth holds LoRA adapters for the weights .*base\.pt .*set init_cfg"
    ) as error:
        run(tmp_path / "b", tmp_path / "other.pt", lora=dict(rank=2, dora=True), resume=trained)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("replaced", [False, True], ids=["random", "load_from"])
def test_a_base_that_no_file_gives_again_is_saved(base, tmp_path, replaced, monkeypatch):
    said = []
    monkeypatch.setattr("mmengine.logging.MMLogger.warning", lambda _, text, *__: said.append(text))
    changes = {}
    if replaced:
        torch.save({f"backbone.{name}": x + 1 for name, x in torch.load(base).items()}, tmp_path / "detector.pth")
        changes["load_from"] = str(tmp_path / "detector.pth")
    run(tmp_path / "a", base if replaced else None, **changes)
    assert any(
        "checkpoints hold the complete encoder, because no file gives its weights again" in line for line in said
    )
    run(tmp_path / "b", base if replaced else None, resume=tmp_path / "a" / "iter_4.pth")
    ours, theirs = (read(tmp_path / name / "iter_10.pth")["state_dict"] for name in "ab")
    assert "backbone.blocks.0.mlp.fc1.weight" in ours
    assert_close(dict(ours), dict(theirs), rtol=0, atol=0)


def test_a_new_run_starts_from_adapters(trained, base, tmp_path):
    runner = run(tmp_path, base, lora=dict(rank=2, dora=True), load_from=str(trained), **{"train_cfg.max_iters": 1})
    state = read(trained)["state_dict"]
    change = (runner.model.backbone.blocks[0].mlp.fc1.lora_b - state["backbone.blocks.0.mlp.fc1.lora_b"]).abs().max()
    assert 0 < change <= 0.0101  # one step of Adam
