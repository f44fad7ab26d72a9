"""pe-spatial doctor in environments that lack something, and guards for systems that do."""

import builtins
import importlib
import sys
from importlib import metadata

import pytest
import torch
from torch.testing import assert_close

from pe_spatial.cli.main import main
from pe_spatial.encoder import rope, unpickling
from pe_spatial.encoder.files import CheckpointError, read_checkpoint
from pe_spatial.integrations import environment


@pytest.fixture
def packages(monkeypatch):
    """Return a function that makes exactly these distributions installed, and their modules importable."""

    def choose(versions, broken=()):
        owners = {**environment.OPENMMLAB, **environment.OTHERS}
        modules = {module for module, names in owners.items() if set(names) & {*versions}}

        def version(name):
            if name in versions:
                return versions[name]
            raise metadata.PackageNotFoundError(name)

        def load(name):
            root = name.partition(".")[0]
            if name in broken:
                raise ImportError("libGL.so.1: cannot open shared object file\nmore")
            if root in (*environment.OPENMMLAB, *environment.OTHERS) and root not in modules:
                raise ModuleNotFoundError(f"No module named {root!r}", name=root)
            return sys.modules["torch"] if root == "torch" else builtins

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(environment.importlib, "import_module", load)
        return list(environment.report())

    return choose


UPSTREAM = {"torch": "2.2.2", "mmengine": "0.10.7", "mmcv": "2.1.0", "mmdet": "3.3.0", "mmsegmentation": "1.2.2"}


def test_report_of_torch_alone(packages):
    lines = packages({"torch": "2.9.0"})
    assert "works    encoder, pyramids, checkpoints" in lines
    at = lines.index("missing  detection, segmentation, depth, swap: mmengine is not installed")
    assert lines[at + 1].strip() == "pip install --no-build-isolation 'pe_spatial[openmmlab]'"
    assert "missing  timm models: timm is not installed" in lines


def test_report_beside_upstream_never_advises_the_extra(packages):
    lines = packages({name: version for name, version in UPSTREAM.items() if name != "mmsegmentation"})
    text = "\n".join(lines)
    assert "mmdet        mmdet 3.3.0" in lines
    assert "pip install --no-build-isolation mmsegmentation" in text
    assert "[openmmlab]" not in text
    assert "onedl" not in text


def test_two_distributions_of_one_module_are_named(packages):
    lines = packages({**UPSTREAM, "onedl-mmdetection": "3.5.1"})
    assert "warning  mmdet and onedl-mmdetection both install the module mmdet" in lines[-1]
    with pytest.warns(UserWarning, match="mmdet and onedl-mmdetection both install the module mmdet: uninstall both"):
        environment.warn_of_conflicts()


@pytest.mark.parametrize("broken", ["torch", "mmcv.ops", "cv2"])
def test_broken_packages_are_a_line(packages, broken):
    lines = packages({**UPSTREAM, "opencv-python": "4.12"}, broken=[broken])
    assert any(f"{broken} does not load (libGL.so.1: cannot open shared object file)" in line for line in lines)


def test_doctor_runs_here(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert torch.__version__.partition("+")[0] in out
    assert "works    encoder" in out
    assert len(out.splitlines()) < 40


def test_rotation_without_complex_numbers(monkeypatch):
    x = torch.randn(2, 9, 3, 16, generator=torch.Generator().manual_seed(0))
    table = rope.rope_table((3, 3), 16, device=x.device)
    expected = rope.apply_rope(x, table)
    monkeypatch.setattr(rope, "_NO_COMPLEX", ("cpu",))
    monkeypatch.delattr(torch, "view_as_complex")
    assert_close(rope.apply_rope(x, table), expected)


def test_depth_is_evaluated_on_the_cpu_where_float64_is_missing(monkeypatch):
    pytest.importorskip("mmengine")
    from pe_spatial.depth import metrics

    moved = []
    monkeypatch.setattr(metrics, "_NO_FLOAT64", ("cpu",))
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: moved.append(self.shape) or self)
    metrics.CheckedDepthMetric().evaluate_image(torch.ones(8, 8), torch.ones(8, 8), max_depth=10.0)
    assert moved[0] == (8, 8)


def test_check_swap_without_fork(monkeypatch):
    pytest.importorskip("mmengine")
    from pe_spatial.errors import ConfigError
    from pe_spatial.integrations.swap import check

    monkeypatch.setattr(check.multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    with pytest.raises(ConfigError, match="check_swap forks processes, which Windows does not offer"):
        check.check_in_process("mmdet", "atss")


@pytest.mark.parametrize("name", ["torch.distributed.fsdp.fully_shard", "torch.utils.serialization"])
def test_sharded_training_with_old_torch(monkeypatch, name):
    pytest.importorskip("mmengine")
    pytest.importorskip("torch", minversion="2.7")  # older ones lack it already
    from pe_spatial.errors import ConfigError

    home, _, last = name.rpartition(".")
    if home == "torch.utils":
        monkeypatch.setitem(sys.modules, name, None)
    else:
        monkeypatch.delattr(sys.modules[home] if home in sys.modules else importlib.import_module(home), last)
    monkeypatch.delitem(sys.modules, "pe_spatial.engine.fsdp", raising=False)
    with pytest.raises(ConfigError, match=r"needs torch 2\.7 or later, and this is torch"):
        importlib.import_module("pe_spatial.engine.fsdp")


class Code:
    def __reduce__(self):
        return (print, ("code of the file runs",))


@pytest.mark.skipif(not hasattr(torch.serialization, "safe_globals"), reason="tests/encoder/test_files.py tests it")
def test_checkpoints_with_torch_before_2_5(tmp_path, monkeypatch, capsys):
    allowed = {f"torch._utils.{name}": getattr(torch._utils, name) for name in ("_rebuild_tensor_v2",)}
    from torch import _weights_only_unpickler

    allowed["collections.OrderedDict"] = dict
    monkeypatch.setattr(_weights_only_unpickler, "_get_allowed_globals", lambda: allowed, raising=False)
    monkeypatch.delattr(torch.serialization, "safe_globals")
    import argparse

    weights, code = tmp_path / "weights.pth", tmp_path / "code.pth"
    torch.save({"model": {"w": torch.arange(3)}, "args": argparse.Namespace(lr=1), "seen": {1}}, weights)
    torch.save({"model": {"w": torch.arange(3)}, "code": Code()}, code)
    assert read_checkpoint(weights).state["w"].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match=r"code\.pth holds more than tensors and plain data \(builtins\.print\)"):
        read_checkpoint(code)
    assert "runs" not in capsys.readouterr().out
    assert unpickling.unpickle(weights)["seen"] == {1}
