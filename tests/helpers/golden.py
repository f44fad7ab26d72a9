"""How tests read the reference values of tests/golden; its README says how they were made."""

import functools
import json
import lzma
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read a .npz of tests/golden; a member NAME.same names the file and the array that holds the values of NAME."""
    values: dict[str, np.ndarray] = {}
    files: dict[str, Any] = {path.name: values}
    shared: dict[tuple[str, str], np.ndarray] = {}
    with np.load(path) as file:
        for member in file.files:
            if member.endswith(".same"):
                other, name = file[member].decode().split("\n")
                if other not in files:
                    files[other] = np.load(path.with_name(other))
                if (other, name) not in shared:
                    shared[other, name] = files[other][name]
                values[member.removesuffix(".same")] = shared[other, name]
            elif member != "checkpoint.json":
                values[member] = file[member]
    return values


def read_json(path: Path) -> Any:
    """Read a .json of tests/golden; a large one stands there as .json.xz."""
    return json.loads(path.read_text() if path.exists() else lzma.open(path.with_name(f"{path.name}.xz")).read())


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a checkpoint such as tests/golden/deta/deta.pth, which stands there as deta.pth.npz."""
    shared: dict[int, torch.Tensor] = {}  # the tensors that one checkpoint holds under two names are one tensor
    values = read_arrays(path.with_name(f"{path.name}.npz"))
    return {name: shared.setdefault(id(value), torch.from_numpy(value)) for name, value in values.items()}


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="golden")


@functools.cache
def checkpoint_file(path: Path) -> Path:
    """Write a checkpoint such as tests/golden/deta/deta.pth as the released code saves it, and return where it is."""
    content: Any = read_weights(path)
    with zipfile.ZipFile(path.with_name(f"{path.name}.npz")) as file:
        if "checkpoint.json" in file.namelist():
            facts = json.loads(file.read("checkpoint.json"))
            content = {facts["state"]: content, **facts["rest"]}
    written = Path(_folder().name) / path.parent.name / path.name
    written.parent.mkdir(exist_ok=True)
    torch.save(content, written)
    return written
