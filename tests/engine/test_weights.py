"""Weights that a run starts from: what fits is counted, what does not is said, and code never runs, whoever reads."""

import os
import pathlib

import pytest
import torch

pytest.importorskip("mmengine")
from helpers.tiny_run import tiny_config
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import CheckpointLoader
from torch import nn
from torch.testing import assert_close

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.configs import config_in
from pe_spatial.engine.evaluation import test as evaluate
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.errors import ConfigError


@MODELS.register_module()
class Stack(BaseModel):
    """Four layers, of which a head may have another number of classes."""

    def __init__(self, classes=4):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, classes)

    def forward(self, inputs, **_):
        return dict(loss=self.head(self.backbone(torch.stack(list(inputs)) / 20)).square().mean())


START = {}


@HOOKS.register_module()
class KeepStart(Hook):
    def before_train(self, runner):
        START.clear()
        START.update({name: value.clone() for name, value in runner.model.state_dict().items()})


def started(tmp_path, content, **changes):
    """Train for one step from a file of `content`; return the weights before the step."""
    path = tmp_path / "w.pth"
    if content is not None:
        torch.save(content, path)
    cfg = tiny_config(tmp_path / "run", model=dict(type="Stack"), load_from=str(path), **changes)
    cfg.custom_hooks = [dict(type="KeepStart")]
    cfg.train_cfg.max_iters = 1
    prepare_training(cfg)
    train(cfg)
    return dict(START)


@pytest.fixture
def weights():
    torch.manual_seed(5)
    return dict(Stack().state_dict())


PREFIXES = ["", "module.", "_orig_mod.", "module._orig_mod.", "model.", "model._orig_mod.", "_fsdp_wrapped_module."]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict", None])
def test_load_from_takes_weights_as_trainers_wrap_them(tmp_path, weights, prefix, container):
    named = {prefix + name: value for name, value in weights.items()}
    state = started(tmp_path, {container: named} if container else named)
    assert_close(state, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rename",
    [lambda n: f"student_net.{n}", lambda n: n.replace(".", "_"), lambda n: n.upper(), lambda n: f"backbone.{n}",
     lambda n: n.replace("backbone", "encoder").replace("head", "decoder"), lambda n: n[1:]],
)  # fmt: skip
def test_load_from_is_refused_where_less_than_half_fits(tmp_path, weights, rename):
    with pytest.raises(CheckpointError, match=r"w\.pth.* 0 of 8 .*load_from_share") as error:
        started(tmp_path, {"state_dict": {rename(name): value for name, value in weights.items()}})
    assert "\n" not in str(error.value)
    before = started(tmp_path, None, load_from_share=0.0)  # on purpose
    assert before.keys() == weights.keys()


def test_load_from_counts_what_fits(tmp_path, weights, caplog):
    """Another number of classes is the usual case: the head starts anew, and this is said."""
    weights["head.weight"], weights["head.bias"] = torch.zeros(7, 4), torch.zeros(7)
    weights["extra"] = torch.zeros(1)
    state = started(tmp_path, {"state_dict": weights}, log_level="INFO")
    for name in ("backbone.0.weight", "backbone.2.bias"):
        assert_close(state[name], weights[name], rtol=0, atol=0)
    log = next((tmp_path / "run").rglob("*.log")).read_text()
    assert "6 of 8 tensors" in log
    assert "75 % of the values" in log
    assert "head.weight (7, 4) in the file, (4, 4) in the model" in log
    assert "unknown to the model: extra" in log


def test_load_from_part_of_the_values_is_refused(tmp_path, weights):
    weights = {name: value for name, value in weights.items() if name.startswith("backbone.0")}
    with pytest.raises(CheckpointError, match=r"2 of 8 tensors.*25 % of the values"):
        started(tmp_path, {"state_dict": weights})


@pytest.mark.parametrize("detector", ["maskrcnn/maskrcnn.pth", "deta/deta.pth"])
def test_load_from_a_released_detector_names_the_command(tmp_path, golden, detector):
    from helpers.golden import checkpoint_file

    path = checkpoint_file(golden / detector)
    with pytest.raises(CheckpointError, match=r"convert_checkpoint .*\.pth OUT --to mmdet"):
        started(tmp_path, torch.load(path, weights_only=False))


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


@pytest.mark.parametrize("place", ["beside", "in the state", "in the meta"])
@pytest.mark.parametrize("reader", ["load_from", "resume", "test", "init_cfg of mmengine", "consolidate", "config_in"])
def test_code_in_a_checkpoint_never_runs(tmp_path, weights, reader, place):
    mark, path = tmp_path / "it-ran", tmp_path / "w.pth"
    bad = Payload(mark)
    meta = {"iter": 1, "epoch": 0} | ({"x": bad} if place == "in the meta" else {})
    state = weights | ({"x": bad} if place == "in the state" else {})
    torch.save({"state_dict": state, "meta": meta} | ({"x": bad} if place == "beside" else {}), path)
    cfg = tiny_config(tmp_path / "run", model=dict(type="Stack"))
    with pytest.raises((CheckpointError, ConfigError), match=r"it could run code|cannot be used"):
        if reader == "config_in":
            config_in(str(path))
        elif reader == "consolidate":
            from pe_spatial.engine.fsdp import consolidate

            consolidate(path, tmp_path / "out.pth")
        elif reader == "test":
            cfg.load_from = str(path)
            cfg.update(test_cfg=dict(type="TestLoop"), test_dataloader=cfg.train_dataloader, test_evaluator=[])
            evaluate(cfg)
        else:
            if reader == "init_cfg of mmengine":
                cfg.model.init_cfg = dict(type="Pretrained", checkpoint=str(path))
            else:
                cfg.load_from = str(path)
            prepare_training(cfg, resume=str(path) if reader == "resume" else None)
            train(cfg)
    assert not mark.exists()


def test_paths_and_namespaces_do_not_hinder_a_run(tmp_path, weights):
    import argparse

    args = argparse.Namespace(output=pathlib.Path("/x"))
    assert_close(started(tmp_path, {"model": weights, "args": args}), weights, rtol=0, atol=0)
    for reader in (CheckpointLoader.load_checkpoint,):
        assert reader(str(tmp_path / "w.pth"))["model"].keys() == weights.keys()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_test_takes_weights_as_trainers_wrap_them(tmp_path, weights, prefix):
    from pe_spatial.engine.runner import build_runner, load_weights_of_any_layout

    path = tmp_path / "w.pth"
    torch.save({"state_dict": {prefix + name: value for name, value in weights.items()}}, path)
    runner = build_runner(tiny_config(tmp_path / "run", model=dict(type="Stack")))
    load_weights_of_any_layout(runner)
    runner.load_checkpoint(str(path))
    assert_close(dict(runner.model.state_dict()), weights, rtol=0, atol=0)


# --- the config in a checkpoint is data


def checkpoint_with(tmp_path, text):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "meta": {"cfg": text}}, tmp_path / "w.pth")
    return str(tmp_path / "w.pth")


CODE = {
    "import": "import os\nos.mkdir({mark!r})\nmodel = dict(type='x')\n",
    "call": "model = dict(type=__import__('os').mkdir({mark!r}))\n",
    "comprehension": "model = [__import__('os').mkdir({mark!r}) for _ in [0]]\n",
    "lambda": "model = (lambda: __import__('os').mkdir({mark!r}))()\n",
    "f-string": "model = f'{{__import__(\"os\").mkdir({mark!r})}}'\n",
    "function": "def f(x=__import__('os').mkdir({mark!r})): pass\n",
    "decorator": "@__import__('os').mkdir\nclass A: pass\n",
    "for": "for x in [__import__('os').mkdir({mark!r})]: pass\n",
    "expression": "__import__('os').mkdir({mark!r})\n",
    "with": "with open({mark!r}, 'w'): pass\n",
    "dict call with a star": "model = dict(**__import__('os').mkdir({mark!r}))\n",
    "subscript": "a = [0]\na[__import__('os').mkdir({mark!r})] = 1\n",
    "annotation": "a: __import__('os').mkdir({mark!r}) = 1\n",
    "dict of another name": "dict = __import__('os').mkdir\nmodel = dict({mark!r})\n",
}


@pytest.mark.parametrize("kind", CODE)
def test_a_config_in_a_checkpoint_is_never_run(tmp_path, kind):
    mark = tmp_path / "it-ran"
    path = checkpoint_with(tmp_path, CODE[kind].format(mark=str(mark)))
    with pytest.raises(CheckpointError, match=r"w\.pth holds a config with more than plain values.*--config"):
        config_in(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text",
    ["model = dict(type='os.system', command='x')", "model = dict(a=[dict(type='torch.hub.load')])",
     "hook = dict(type='subprocess.run')", "model = {'type': 'builtins.exec'}",
     "custom_imports = dict(imports=['os', 'antigravity'])", "custom_imports = dict(imports='evil')",
     "custom_imports = dict(imports=['pe_spatial.x', 'evil.pe_spatial'])"],
)  # fmt: skip
def test_a_config_in_a_checkpoint_names_no_code_of_other_packages(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"w\.pth holds a config that names .*--config"):
        config_in(checkpoint_with(tmp_path, text + "\n"))


def test_a_base_in_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="--config"):
        config_in(checkpoint_with(tmp_path, "_base_ = ['/etc/x.py']\n"))


def test_values_of_a_config_come_back(tmp_path):
    from mmengine.config import Config

    values = dict(
        a=dict(b=[1, -2.5, 1e-5, (3, None), (True,)], c={"d e": "f", 1: 2}, e=()), f="it's", g=float("inf"), h=dict(),
        i="multi\nline", j="back\\slash", k=(), l=[], m=-float("inf"), n="long " * 60, o={0, 1},
        model=dict(type="mmdet.CascadeRCNN", x=dict(type="pe_spatial.Thing")),
    )  # fmt: skip
    cfg = Config(values)
    assert config_in(checkpoint_with(tmp_path, cfg.pretty_text)).to_dict() == cfg.to_dict()


def test_every_shipped_config_comes_back(tmp_path):
    from helpers.repository import CONFIGS
    from mmengine.config import Config

    files = sorted(CONFIGS.glob("*.py"))
    assert len(files) > 5
    for file in files:
        cfg = Config.fromfile(file)
        assert config_in(checkpoint_with(tmp_path, cfg.pretty_text)).to_dict() == cfg.to_dict(), file.name
