"""`manifest.json`: what an exported folder holds, and the check that its files belong together."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pe_spatial.atomic import write_json
from pe_spatial.errors import ConfigError, listed

NAME = "manifest.json"
VERSION = 1
FORMATS = ("onnx", "openvino", "torch", "tensorrt")
GRAPHS = {"onnx": "model.onnx", "openvino": "model.xml", "torch": "model.pt2", "tensorrt": "model.onnx"}
"""Format -> the file of the graph."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What an exported folder holds.

    Args:
        task: 'encoder', 'detection', 'segmentation', 'depth' or 'tracking'; 'multitask' for a folder of those.
        format: 'onnx', 'openvino', 'torch' or 'tensorrt'.
        precision: 'fp32', 'fp16', 'bf16', 'int8' (weights) or 'int8-static' (weights and activations).
        inputs: name -> dict(dtype=, shape=); named dimensions are free. `pixels` are uint8 RGB (B, H, W, 3), `images`
            normalized float32 (B, 3, H, W).
        outputs: names of the results, in the order of the graph.
        stages: names of intermediate results, which only the certificate asks for.
        multiple: height and width of the input are multiples of it, in pixels; 1 for any size.
        minimum: smallest height and width of the input, in pixels.
        sizes: the only sizes (h, w) in pixels; () for all multiples.
        class_names: names of the classes.
        model: facts for the reader: variant, geometry, layers, mean, std, where the weights came from.
        options: what the runtime must know of the task besides.
        versions: versions of the packages that wrote the folder.
        files: name of each file -> its SHA-256.
    """

    task: str
    format: str
    precision: str = "fp32"
    inputs: dict[str, dict[str, Any]]
    outputs: list[str]
    stages: list[str] = field(default_factory=list)
    multiple: int = 1
    minimum: int = 1
    sizes: list[list[int]] = field(default_factory=list)
    class_names: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    version: int = VERSION


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json with the hashes of all files in `folder` and its folders, the certificate excepted."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files = {name: sha256(folder / name) for name in names if not is_report(name)}
    write_json(folder / NAME, {**asdict(manifest), "files": files})


def is_report(name: str) -> bool:
    """Return whether a file is about the model and not a part of it."""
    return name == NAME or name.startswith("certificate") or name == "reference.npz"


def is_exported(source: str | Path) -> bool:
    """Return whether `source` is an exported folder."""
    return (Path(source) / NAME).is_file()


def read_manifest(folder: str | Path) -> Manifest:
    """Read and check manifest.json; ConfigError for a folder without one, and for files that it does not describe."""
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise ConfigError(f"{folder} is not an exported model (it has no {NAME}); write one with pe-spatial export")
    try:
        values = json.loads(path.read_text())
        known = {entry.name for entry in fields(Manifest)}
        manifest = Manifest(**{key: value for key, value in values.items() if key in known})
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is not a manifest of an exported model ({error}); export the model again") from None
    if manifest.version != VERSION:
        raise ConfigError(f"{path} has version {manifest.version}, and this is for {VERSION}; export the model again")
    wrong = [name for name, digest in manifest.files.items() if digest != _digest(folder / name)]
    if wrong or not manifest.files:
        raise ConfigError(
            f"{folder} holds files that do not belong together: {listed(wrong) or 'none'} differ from {NAME}; copy the "
            "complete folder again, or export the model again"
        )
    return manifest


def check_complete(folder: Path, manifest: Manifest) -> None:
    """Raise ConfigError for a head alone, whose graph takes maps of an encoder in another folder."""
    if "pixels" not in manifest.inputs:
        raise ConfigError(
            f"{folder} is one head of several on one encoder, and takes its maps; give the folder above it, which "
            "holds the encoder"
        )


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _hash(file)


def _hash(file: Any) -> str:
    digest = hashlib.sha256()  # Python before 3.11
    while block := file.read(2**20):
        digest.update(block)
    return digest.hexdigest()


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
