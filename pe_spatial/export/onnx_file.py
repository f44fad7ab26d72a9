"""Small changes to ONNX files; needs onnx and no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def keep_outputs(model: Any, names: Sequence[str]) -> None:
    """Remove the other outputs of an ONNX model."""
    kept = [output for output in model.graph.output if output.name in names]
    del model.graph.output[:]
    model.graph.output.extend(kept)
