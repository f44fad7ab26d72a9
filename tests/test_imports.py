"""Importing costs next to nothing, needs torch alone, and the arrows of the house run one way."""

import ast
import os
import re
import statistics
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers.repository import REPO, shared_folder

PACKAGE = REPO / "pe_spatial"
FRAMEWORKS = ("mmengine", "mmcv", "mmdet", "mmseg", "detectron2", "timm", "sam2")
ENCODER = sorted(f"pe_spatial.encoder.{path.stem}" for path in (PACKAGE / "encoder").glob("[!_]*.py"))
CONVERT = sorted(f"pe_spatial.convert.{path.stem}" for path in (PACKAGE / "convert").glob("[!_]*.py"))
# what a PE-Core is, without its data and evaluation
_TOWERS = ("checkpoint", "image_tower", "model", "text_tower", "tokenizer", "variants")
LANGUAGE = [f"pe_spatial.language.{name}" for name in _TOWERS]
CORE = ("pe_spatial", *ENCODER, *CONVERT, *LANGUAGE, "pe_spatial.errors", "pe_spatial.atomic")

# A room of the package -> the rooms that it may import.
GROUND = {"errors", "atomic", "images", "video"}
SERVICES = {"engine", "integrations", "convert", "planning"}
TASKS = {"detection", "segmentation", "depth", "tracking", "probing", "synthetic"}
ARROWS = {
    "errors": set(),
    "atomic": {"errors"},
    "images": {"errors"},
    "video": {"errors", "atomic", "images"},
    "data": {"data"} | GROUND,
    "encoder": {"encoder", "errors"},
    "convert": {"convert", "encoder"} | GROUND,
    "language": {"language", "encoder"} | GROUND,
    "integrations": {"integrations", "encoder"} | GROUND,
    "planning": {"planning", "integrations", "encoder"} | GROUND,
    "engine": SERVICES | {"encoder", "data"} | GROUND,
    **{room: {room, "encoder", "data"} | SERVICES | GROUND for room in sorted(TASKS)},
    "predict": {"predict", "encoder", "data", "language"} | TASKS | SERVICES | GROUND,
    "runtime": {"runtime", "predict", "tracking"} | GROUND,
    "loading": {"predict", "runtime", "language", "errors"},
    "export": {"export", "runtime", "predict", "encoder", "data"} | TASKS | SERVICES | GROUND,
    "features": {"features", "encoder", "integrations", "language"} | GROUND,
    "alignment": {"alignment", "encoder", "data", "features"} | TASKS | SERVICES | GROUND,
    "analysis": {"analysis", "encoder", "data"} | TASKS | SERVICES | GROUND,
    "multitask": {"multitask", "loading", "predict", "runtime", "export"}
    | {"encoder", "engine", "integrations", "tracking"}
    | GROUND,
    "labeling": {"labeling", "predict", "data", "tracking"} | GROUND,
    "app": {"app", "labeling", "multitask", "loading", "predict", "features", "language"}
    | {"encoder", "depth", "tracking"}
    | GROUND,
    "cli": {"cli", "app", "multitask", "labeling", "predict", "export", "runtime", "features", "alignment", "analysis"}
    | {"data", "encoder", "language"}
    | TASKS
    | SERVICES
    | GROUND,
}


def run(script: str, **environ: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=REPO,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_adds_less_than_50_ms_to_torch(tmp_path):
    """With all public names, and so with all modules that they need; CPU time, the median of three interpreters.

    A first one compiles the modules, as the first run after an installation does; and collecting torch's garbage, which
    any allocation may start, does not count.
    """
    clock = "time.process_time()"
    script = f"import gc, time, torch; gc.disable(); s = {clock}; from pe_spatial import *; print({clock} - s)"
    cached = dict(PYTHONDONTWRITEBYTECODE="", PYTHONPYCACHEPREFIX=str(tmp_path))
    _, *times = (float(run(script, **cached)) for _ in range(4))
    assert statistics.median(times) < 0.05


def test_import_brings_no_framework():
    script = "import sys; before = set(sys.modules); import torch; torch_alone = set(sys.modules);" + (
        "from pe_spatial import *; print(*sorted({name.partition('.')[0] for name in set(sys.modules) - torch_alone}))"
    )
    assert set(run(script).split()) & {*FRAMEWORKS, "torchvision", "safetensors", "huggingface_hub", "PIL"} == set()


def test_exported_models_run_without_torch():
    """With numpy, Pillow and a runtime alone."""
    absent = ("torch", "torchvision", "cv2", "matplotlib", "pycocotools", *FRAMEWORKS)
    modules = sorted(f"pe_spatial.runtime.{path.stem}" for path in (PACKAGE / "runtime").glob("[!_]*.py"))
    script = f"""
import importlib, sys
sys.modules.update(dict.fromkeys({absent}))
for module in {["pe_spatial", *modules, "pe_spatial.cli.main", "pe_spatial.cli.export"]}:
    importlib.import_module(module)
"""
    run(script)


def test_core_modules_import_one_by_one_with_every_framework_blocked():
    script = f"""
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS}:
            raise ModuleNotFoundError(f"{{name}} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
try:
    import timm
except ModuleNotFoundError:
    print("blocked")
import torch
for module in {CORE}:
    for name in [name for name in sys.modules if name.partition(".")[0] == "pe_spatial"]:
        del sys.modules[name]
    importlib.import_module(module)
    print(module)
"""
    assert run(script).split() == ["blocked", *CORE]


def imported(path: Path, top_level: bool = False) -> set[str]:
    """Return the absolute names of the modules that a file imports, in functions too unless `top_level`."""
    tree = ast.parse(path.read_text())
    package = list(path.relative_to(REPO).with_suffix("").parts[:-1])
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{module}.{alias.name}" for alias in node.names}
    return found


def dotted(path: Path) -> set[str]:
    """Return the names of the package's modules that stand in the strings of a file, but for its docstrings."""
    tree = ast.parse(path.read_text())
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    prose = {id(node.body[0].value) for node in ast.walk(tree)
             if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)}  # fmt: skip
    strings = [node.value for node in ast.walk(tree)
               if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose]  # fmt: skip
    return {name for text in strings for name in re.findall(r"pe_spatial(?:\.\w+)+", text)}


def test_arrows_allow_no_circle():
    TopologicalSorter({room: others - {room} for room, others in ARROWS.items()}).prepare()


@pytest.mark.parametrize("room", sorted(ARROWS))
def test_arrows_run_one_way(room):
    files = sorted((PACKAGE / room).rglob("*.py")) or [path for path in [PACKAGE / f"{room}.py"] if path.exists()]
    assert files, f"there is no room {room}"
    for path in files:
        for name in imported(path) | dotted(path):
            root, *rest = name.split(".")
            assert root not in ("tools", "configs", "projects"), f"{path} imports {name}"
            if root == "pe_spatial" and rest:
                assert rest[0] in ARROWS[room], f"{path} names {name}; {room} may import {sorted(ARROWS[room])}"


def test_every_room_has_its_arrows():
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms | {path.stem for path in PACKAGE.glob("[!_]*.py")} == set(ARROWS)
    assert imported(PACKAGE / "encoder" / "vit.py") > {"pe_spatial.encoder.rope.apply_rope", "torch.Tensor"}


@pytest.mark.parametrize("module", ENCODER)
def test_encoder_needs_torch_alone(module):
    path = REPO / Path(*module.split(".")).with_suffix(".py")
    roots = {name.partition(".")[0] for name in imported(path, top_level=True)}
    assert roots <= {*sys.stdlib_module_names, "torch", "pe_spatial"}
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert "print" not in calls


def test_unknown_name_lists_the_public_ones():
    import pe_spatial

    with pytest.raises(AttributeError, match="PerceptionEncoder, EncoderConfig"):
        pe_spatial.Encoder  # noqa: B018
    assert set(pe_spatial.__all__) <= set(dir(pe_spatial))
    assert all(getattr(pe_spatial, name).__name__ == name for name in pe_spatial.__all__ if name != "VARIANTS")


def test_absent_images_skip_a_test_but_fail_it_in_ci(tmp_path):
    absent = {"PE_SPATIAL_SHARED": str(tmp_path / "absent")}
    with pytest.raises(pytest.skip.Exception, match=r"needs the real images of ../shared/data"):
        shared_folder(absent)
    with pytest.raises(pytest.fail.Exception, match=r"needs the real images of ../shared/data"):
        shared_folder({**absent, "CI": "1"})
    assert shared_folder({"PE_SPATIAL_SHARED": str(tmp_path)}) == tmp_path
