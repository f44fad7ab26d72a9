"""Weights that a run starts from: what fits is counted, what does not is said, and code never runs, whoever reads."""

import os
import pathlib
import zipfile

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
from helpers.golden import checkpoint_file
from helpers.repository import CONFIGS
from helpers.tiny_run import tiny_config
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import CheckpointLoader
from torch import nn
from torch.testing import assert_close

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.configs import config_in
from pe_spatial.engine.evaluation import test as evaluate
from pe_spatial.engine.runner import build_runner
from pe_spatial.engine.training import prepare_training, train
from pe_spatial.engine.weights import load_from_file, load_weights_of_any_layout
from pe_spatial.errors import ConfigError


@MODELS.register_module()
class Stack(BaseModel):
    """Four layers."""

    def __init__(self, init_cfg=None):
        super().__init__(init_cfg=init_cfg)
        self.backbone = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 4)

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


@pytest.mark.parametrize(
    ("container", "prefix"),
    [("state_dict", ""), ("model", "module."), ("model_state_dict", "_orig_mod."), (None, "module._orig_mod."),
     ("state_dict", "model."), (None, "model._orig_mod."), ("model", "_fsdp_wrapped_module."), (None, "module.")],
)  # fmt: skip
def test_load_from_takes_weights_as_trainers_wrap_them(tmp_path, weights, prefix, container):
    named = {prefix + name: value for name, value in weights.items()}
    state = started(tmp_path, {container: named} if container else named)
    assert_close(state, weights, rtol=0, atol=0)


@pytest.mark.parametrize(
    "rename",
    [lambda n: f"student_net.{n}", lambda n: f"backbone.{n}",
     lambda n: n.replace("backbone", "encoder").replace("head", "decoder")],
)  # fmt: skip
def test_load_from_is_refused_where_less_than_half_fits(tmp_path, weights, rename):
    with pytest.raises(CheckpointError, match=r"^0 of 8 tensors .*w\.pth.*load_from_share") as error:
        started(tmp_path, {"state_dict": {rename(name): value for name, value in weights.items()}})
    assert "\n" not in str(error.value)
    before = started(tmp_path, None, load_from_share=0.0)  # on purpose
    assert before.keys() == weights.keys()


def test_load_from_counts_what_fits(tmp_path, weights):
    """Another number of classes is the usual case: the head starts anew, and this is said."""
    weights["head.weight"], weights["head.bias"] = torch.zeros(7, 4), torch.zeros(7)
    weights["extra"] = torch.zeros(1)
    state = started(tmp_path, {"state_dict": weights}, log_level="INFO")
    for name in ("backbone.0.weight", "backbone.2.bias"):
        assert_close(state[name], weights[name], rtol=0, atol=0)
    log = next((tmp_path / "run").rglob("*.log")).read_text()
    assert "6 of 8 tensors of the model, 75% of the values" in log
    assert "head.weight (7, 4) in the file, (4, 4) in the model" in log
    assert "unknown to the model: extra" in log


def test_load_from_part_of_the_values_is_refused(tmp_path, weights):
    weights = {name: value for name, value in weights.items() if name.startswith("backbone.0")}
    with pytest.raises(CheckpointError, match=r"2 of 8 tensors.*25% of the values"):
        started(tmp_path, {"state_dict": weights})


@pytest.mark.parametrize("detector", ["maskrcnn/maskrcnn.pth", "deta/deta.pth"])
def test_a_released_detector_is_converted_before_it_is_counted(tmp_path, golden, detector):
    cfg = tiny_config(tmp_path / "run", model=dict(type="Stack"), load_from=str(checkpoint_file(golden / detector)))
    prepare_training(cfg)
    with pytest.raises(CheckpointError, match=r"0 of 8 tensors.*unknown to the model: backbone\.encoder\.blocks"):
        train(cfg)


class Payload:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def read_by_load_from(path, cfg):
    cfg.load_from = str(path)
    prepare_training(cfg)
    train(cfg)


def read_by_init_cfg(path, cfg):
    cfg.model.init_cfg = dict(type="Pretrained", checkpoint=str(path))
    prepare_training(cfg)
    train(cfg)


def read_by_test(path, cfg):
    cfg.load_from = str(path)
    cfg.update(test_cfg=dict(type="TestLoop"), test_dataloader=cfg.train_dataloader, test_evaluator=[])
    evaluate(cfg)


def read_by_consolidate(path, _):
    pytest.importorskip("torch", minversion="2.7")
    from pe_spatial.engine.fsdp import consolidate

    consolidate(path, path.with_name("out.pth"))


READERS = {
    "load_from": read_by_load_from,
    "resume": lambda path, cfg: prepare_training(cfg, resume=str(path)),
    "test": read_by_test,
    "init_cfg of mmengine": read_by_init_cfg,
    "consolidate": read_by_consolidate,
    "config_in": lambda path, _: config_in(str(path)),
}


@pytest.mark.parametrize("place", ["beside", "in the state", "in the meta"])
@pytest.mark.parametrize("reader", READERS)
def test_code_in_a_checkpoint_never_runs(tmp_path, weights, reader, place):
    mark, path = tmp_path / "it-ran", tmp_path / "w.pth"
    bad = Payload(mark)
    meta = {"iter": 1, "epoch": 0} | ({"x": bad} if place == "in the meta" else {})
    state = weights | ({"x": bad} if place == "in the state" else {})
    torch.save({"state_dict": state, "meta": meta} | ({"x": bad} if place == "beside" else {}), path)
    with pytest.raises((CheckpointError, ConfigError), match=r"it could run code"):
        READERS[reader](path, tiny_config(tmp_path / "run", model=dict(type="Stack")))
    assert not mark.exists()


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_logs_are_read_from_checkpoints_of_numpy_1_and_2(tmp_path, module):
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    torch.save({"loss": history, "best": np.float64(0.5)}, tmp_path / "own.pth")
    with zipfile.ZipFile(tmp_path / "own.pth") as own, zipfile.ZipFile(tmp_path / "other.pth", "w") as other:
        for name in own.namelist():
            data = own.read(name)
            if name.endswith("data.pkl"):  # GLOBAL names the module as text
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                data = data.replace(b"numpy.core.multiarray", module.encode())
                assert module.encode() in data
            other.writestr(name, data)
    read = load_from_file(str(tmp_path / "other.pth"))
    assert read["best"] == 0.5
    assert read["loss"].data[0].tolist() == [1.0, 2.0]


def test_paths_and_namespaces_do_not_hinder_a_run(tmp_path, weights):
    import argparse

    args = argparse.Namespace(output=pathlib.Path("/x"))
    assert_close(started(tmp_path, {"model": weights, "args": args}), weights, rtol=0, atol=0)
    for reader in (CheckpointLoader.load_checkpoint,):
        assert reader(str(tmp_path / "w.pth"))["model"].keys() == weights.keys()


@pytest.mark.parametrize("prefix", PREFIXES)
def test_test_takes_weights_as_trainers_wrap_them(tmp_path, weights, prefix):
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
    with pytest.raises(CheckpointError, match=r"w\.pth holds a config with names of code .*--config"):
        config_in(checkpoint_with(tmp_path, text + "\n"))


def test_a_base_in_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="--config"):
        config_in(checkpoint_with(tmp_path, "_base_ = ['/etc/x.py']\n"))


def test_values_of_a_config_come_back(tmp_path):
    values = dict(
        a=dict(b=[1, -2.5, 1e-5, (3, None), (True,)], c={"d e": "f", 1: 2}, e=()), f="it's", g=float("inf"), h=dict(),
        i="multi\nline", j="back\\slash", k=(), l=[], m=-float("inf"), n="long " * 60, o={0, 1},
        model=dict(type="mmdet.CascadeRCNN", x=dict(type="pe_spatial.Thing")),
    )  # fmt: skip
    cfg = Config(values)
    assert config_in(checkpoint_with(tmp_path, cfg.pretty_text)).to_dict() == cfg.to_dict()


@pytest.mark.parametrize("name", ["pe_spatial_sam2_davis", "pe_demo_cascade_synthetic"])
def test_a_shipped_config_comes_back(tmp_path, name):
    cfg = Config.fromfile(CONFIGS / f"{name}.py")
    assert config_in(checkpoint_with(tmp_path, cfg.pretty_text)).to_dict() == cfg.to_dict()
