"""The notebooks run from top to bottom, offline, and are committed without outputs."""

import json
import os
import sys
from pathlib import Path

import nbformat
import pytest
from helpers.repository import REPO
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
SHORTER = {  # `make test` trains for a few steps, without the AP that they do not reach; -m long as it stands
    "own_data_to_detector": {
        "'train': 30, 'val': 4": "'train': 4, 'val': 1",
        "--iterations 60": "--iterations 4",
        "assert ap50 > 10": "",
    }
}


@pytest.fixture
def environment(monkeypatch):
    """Let kernels find this repository and its command."""
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def run(notebook, folder):
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}).execute()


@pytest.mark.slow
@pytest.mark.mmdet
@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    ("path", "shorter"),
    [
        *[pytest.param(path, SHORTER.get(path.stem, {}), id=path.stem) for path in NOTEBOOKS],
        *[pytest.param(path, {}, id=f"{path.stem}-complete", marks=pytest.mark.long)
          for path in NOTEBOOKS if path.stem in SHORTER],
    ],
)  # fmt: skip
def test_notebooks_run_and_show_images(path, shorter, tmp_path):
    text = path.read_text()
    for original, short in shorter.items():
        assert text.count(original) == 1
        text = text.replace(original, short)
    notebook = nbformat.reads(text, as_version=4)
    run(notebook, tmp_path)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    texts = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    assert not texts, "noise on stderr"
    assert "OneDL" not in json.dumps(outputs), "OpenMMLab's notices of optional packages"


@pytest.mark.slow
@pytest.mark.usefixtures("environment")
def test_a_cell_that_raises_fails(tmp_path):
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        run(notebook, tmp_path)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_have_no_outputs(path):
    nbformat.validate(json.loads(path.read_text()))
    for cell in nbformat.read(path, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
