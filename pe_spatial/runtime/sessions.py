"""The runtimes that execute an exported graph, behind one call: a dict of arrays in, a dict of arrays out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pe_spatial.errors import ConfigError
from pe_spatial.runtime.manifest import GRAPHS, Manifest

STAGES = "stages.onnx"
"""The graph of `model.onnx` with the stages as outputs; it reads the same weights."""

COMPILED = "model.aoti.pt2"
"""The AOTInductor package beside `model.pt2`, compiled for the processor that exported it."""


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""


def open_session(
    folder: Path, manifest: Manifest, *, backend: str | None = None, stages: bool = False, threads: int | None = None
) -> Session:
    """Load the graph of a folder.

    Args:
        folder, manifest: the folder and its manifest.
        backend: 'onnxruntime' or 'openvino' for ONNX files, 'aotinductor' or 'torch' for torch's; None is the first of
            these that the folder has.
        stages: return the stages too.
        threads: threads of one call; None leaves it to the runtime.

    Raises ConfigError for a runtime that is not installed, or that does not read the folder's format.
    """
    kinds: dict[str, Any] = {
        "onnxruntime": OnnxRuntimeSession, "openvino": OpenVinoSession, "aotinductor": AOTInductorSession,
        "torch": TorchSession,
    }  # fmt: skip
    compiled = (folder / COMPILED).is_file()
    allowed = {"openvino": ("openvino",), "torch": ("aotinductor", "torch") if compiled else ("torch",)}
    choices = allowed.get(manifest.format, ("onnxruntime", "openvino"))
    backend = backend or choices[0]
    if backend not in choices:
        raise ConfigError(f"{folder} is for {manifest.format}, which {', '.join(choices)} runs, and not {backend}")
    names = [*manifest.outputs, *(manifest.stages if stages else ())]
    graph = STAGES if stages and manifest.stages and manifest.format != "openvino" else GRAPHS[manifest.format]
    return kinds[backend](folder / graph, names, precision=manifest.precision, threads=threads)


class OnnxRuntimeSession:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, outputs: Sequence[str], *, precision: str, threads: int | None) -> None:  # noqa: ARG002
        runtime = require("onnxruntime")
        options = runtime.SessionOptions()
        options.log_severity_level = 3
        if threads:
            options.intra_op_num_threads = threads
        self.outputs = list(outputs)
        self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        return dict(zip(self.outputs, self.session.run(self.outputs, dict(inputs)), strict=True))


class OpenVinoSession:
    """OpenVINO on the CPU; it computes in float32 unless the folder says 'bf16' ('fp16' stores weights)."""

    def __init__(self, path: Path, outputs: Sequence[str], *, precision: str, threads: int | None) -> None:
        openvino = require("openvino")
        core = openvino.Core()
        model = core.read_model(str(path))
        known = {name for output in model.outputs for name in output.get_names()}
        model.add_outputs([name for name in outputs if name not in known])
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32"}
        if threads:
            options["INFERENCE_NUM_THREADS"] = threads
        self.outputs = list(outputs)
        self.model = core.compile_model(model, "CPU", options)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        results = self.model(dict(inputs), share_inputs=True)
        return {name: np.array(results[name]) for name in self.outputs}


class TorchSession:
    """A program of torch.export."""

    def __init__(self, path: Path, outputs: Sequence[str], *, precision: str, threads: int | None) -> None:  # noqa: ARG002
        torch = require("torch")
        self.outputs = list(outputs)
        if threads:
            torch.set_num_threads(threads)
        self.module = self._load(path)

    def _load(self, path: Path) -> Any:
        return require("torch").export.load(str(path)).module()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        torch = require("torch")
        with torch.no_grad():
            values = self.module(*(torch.from_numpy(value) for value in inputs.values()))
        values = values if isinstance(values, tuple | list) else (values,)
        return {name: value.numpy() for name, value in zip(self.outputs, values, strict=False)}


class AOTInductorSession(TorchSession):
    """The compiled package beside a program of torch.export."""

    def _load(self, path: Path) -> Any:
        return require("torch")._inductor.aoti_load_package(str(path.with_name(COMPILED)))


def require(package: str) -> Any:
    """Import a runtime; ConfigError if it is not installed."""
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError:
        raise ConfigError(
            f"this folder needs {package}, which is not installed: pip install {package}, or export for another runtime"
        ) from None
