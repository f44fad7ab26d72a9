"""From a module to the files of a format: ONNX, OpenVINO, torch.export and AOTInductor."""

from __future__ import annotations

import io
import logging
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pe_spatial.atomic import atomic_folder
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.export.onnx_file import keep_outputs
from pe_spatial.export.precision import check_precision, quantize
from pe_spatial.runtime.manifest import FORMATS, GRAPHS, Manifest, write_manifest
from pe_spatial.runtime.sessions import COMPILED, STAGES, require

PACKAGES = ("pe_spatial", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "openvino", "numpy")
_NEEDED = {"onnx": ("onnx", "onnxscript"), "openvino": ("onnx", "onnxscript", "openvino"), "torch": ()}
_NEEDED["tensorrt"] = _NEEDED["onnx"]


@dataclass(kw_only=True)
class Exportable:
    """A module, and what a manifest says about it; the other fields are those of `Manifest`.

    Args:
        module: takes the inputs by position and returns a tuple: the outputs, then the stages.
        inputs: name -> an example, of batch 2 or more, and of sizes that are not special.
        dynamic: name -> dimension -> its name, for the dimensions that are free.
        torch_minimum: smallest height and width, in pixels, for torch.export, which checks how memory is laid out.
        cases: inputs on which the certificate compares, for a module that does not take images.
        translations: operators of ours -> how ONNX writes them, see `custom_translation_table` of torch.onnx.export.
    """

    module: nn.Module
    task: str
    inputs: Mapping[str, Tensor]
    dynamic: Mapping[str, Mapping[int, str]]
    outputs: Sequence[str]
    stages: Sequence[str] = ()
    multiple: int = 1
    torch_minimum: int = 1
    sizes: Sequence[Sequence[int]] = ()
    class_names: Sequence[str] = ()
    model: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    translations: Mapping[Any, Any] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Tensor]] = ()

    def manifest(self, form: str, precision: str) -> Manifest:
        """Return the manifest, without the hashes of the files."""
        shapes = {
            name: dict(
                dtype=str(value.dtype).removeprefix("torch."),
                shape=[self.dynamic.get(name, {}).get(i, size) for i, size in enumerate(value.shape)],
            )
            for name, value in self.inputs.items()
        }
        return Manifest(
            task=self.task, format=form, precision=precision, inputs=shapes, outputs=list(self.outputs),
            stages=list(self.stages), multiple=self.multiple,
            minimum=self.torch_minimum if form == "torch" else 1, sizes=[list(size) for size in self.sizes],
            class_names=list(self.class_names), model=dict(self.model), options=dict(self.options),
            versions=versions(),
        )  # fmt: skip


def export(
    exportable: Exportable, out: str | Path, *, form: str = "onnx", precision: str = "fp32",
    calibration: Sequence[Mapping[str, np.ndarray]] = (),
) -> Manifest:  # fmt: skip
    """Write the folder `out`: the graph and manifest.json.

    Args:
        exportable: the model.
        out: a new folder.
        form: 'onnx', 'openvino', 'torch' or 'tensorrt'.
        precision: one of `precision.PRECISIONS`.
        calibration: inputs for 'int8-static'.

    Raises ConfigError for a format that is not known, a package that is missing, an operator that the format does not
    have, and a folder that is not empty.
    """
    one_of("format", form, FORMATS)
    check_precision(form, precision, calibration)
    if form == "torch" and exportable.translations:
        raise ConfigError(f"format torch is for encoders, and this is for {exportable.task}; use onnx or openvino")
    for package in _NEEDED[form]:
        require(package)
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder")
    manifest = exportable.manifest(form, precision)
    with atomic_folder(out) as folder, _quiet():
        if form == "torch":
            write_torch(exportable, folder / GRAPHS[form])
        else:
            write_onnx(exportable, folder / GRAPHS["onnx"])
        if precision.startswith("int8"):
            quantize(folder, exportable.outputs, precision, calibration)
        if form == "openvino":
            write_openvino(exportable, folder, compress=precision == "fp16")
        write_manifest(folder, manifest)
    return manifest


def trace(exportable: Exportable) -> Any:
    """Return the `torch.export.ExportedProgram`; ConfigError if the module cannot be traced."""
    free = torch.export.Dim.DYNAMIC
    shapes = tuple(dict.fromkeys(exportable.dynamic.get(name, {}), free) for name in exportable.inputs)
    module, inputs = exportable.module.eval(), tuple(exportable.inputs.values())
    try:
        with torch.no_grad():
            # Some conditions on sizes decide only how memory is laid out; they become checks, which ONNX omits.
            return torch.export.export(
                module, inputs, dynamic_shapes=shapes if any(shapes) else None, strict=False,
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:  # torch raises almost anything here
        raise ConfigError(f"{type(module).__name__} cannot be traced: {_first_line(error)}") from error


def write_onnx(exportable: Exportable, path: Path) -> None:
    """Write `path` and its weights beside it; with stages, also stages.onnx, which shares the weights."""
    import onnx

    names = [*exportable.outputs, *exportable.stages]
    try:
        with torch.no_grad():
            program: Any = torch.onnx.export(
                trace(exportable), dynamo=True, input_names=list(exportable.inputs), output_names=names, verbose=False,
                custom_translation_table=dict(exportable.translations) or None, opset_version=20, optimize=True,
            )  # fmt: skip
    except torch.onnx.errors.OnnxExporterError as error:
        raise ConfigError(f"ONNX cannot express this model: {_first_line(error)}") from error
    program.save(str(path), external_data=True)
    model = onnx.load(str(path), load_external_data=False)
    _name_dimensions(model, exportable)
    if exportable.stages:
        onnx.save(model, str(path.with_name(STAGES)))
        keep_outputs(model, exportable.outputs)
    onnx.save(model, str(path))


def _name_dimensions(model: Any, exportable: Exportable) -> None:
    """Give the free dimensions of the inputs their names, and remove the tracer's from the outputs."""
    for value in model.graph.input:
        for i, name in exportable.dynamic.get(value.name, {}).items():
            value.type.tensor_type.shape.dim[i].dim_param = name


def write_openvino(exportable: Exportable, folder: Path, *, compress: bool = False) -> None:
    """Convert model.onnx (or stages.onnx) in `folder` to model.xml, and remove it; `compress` stores 16 bits."""
    openvino = require("openvino")
    source = folder / (STAGES if exportable.stages else GRAPHS["onnx"])
    model = openvino.convert_model(str(source))
    # the stages stay inside as named tensors; the session asks for them when it needs them
    names = set(exportable.outputs)
    for output in list(model.outputs):
        if not names & output.get_names():
            model.remove_result(output.get_node())
    openvino.save_model(model, str(folder / GRAPHS["openvino"]), compress_to_fp16=compress)
    for path in folder.glob("*.onnx*"):
        path.unlink()


def write_torch(exportable: Exportable, path: Path) -> None:
    """Write the program of torch.export, and beside it its AOTInductor package where a C++ compiler is installed."""
    program = trace(exportable)
    torch.export.save(program, str(path))
    if shutil.which("g++") or shutil.which("clang++"):
        options = {"cpp.dynamic_threads": True}  # else the number of threads is that of the export
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(path.with_name(COMPILED)), inductor_configs=options
            )


def versions() -> dict[str, str]:
    """Return the versions of the packages that take part."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _first_line(error: BaseException) -> str:
    causes = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    lines = [line.strip() for line in str(causes[-1]).splitlines() if line.strip()]
    return f"{type(causes[-1]).__name__}: {lines[0][:200] if lines else ''}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what the exporters print and log about their own work."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
