"""Lower precision through the runtimes' own tools: ONNX Runtime's quantization, OpenVINO's 16 bits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.errors import ConfigError
from pe_spatial.export.onnx_file import keep_outputs
from pe_spatial.runtime.manifest import GRAPHS
from pe_spatial.runtime.sessions import STAGES

PRECISIONS = {
    "onnx": ("fp32", "int8", "int8-static"),
    "openvino": ("fp32", "fp16", "bf16", "int8-static"),
    "torch": ("fp32",),
    "tensorrt": ("fp32",),
}
"""Format -> its precisions. TensorRT lowers precision itself, when it builds."""


def check_precision(form: str, precision: str, calibration: Sequence[Any]) -> None:
    """Raise ConfigError for a precision that the format does not have, and for calibration without use."""
    if precision not in PRECISIONS[form]:
        raise ConfigError(f"format {form} has no {precision}; it has {', '.join(PRECISIONS[form])}")
    if (precision == "int8-static") != bool(calibration):
        state = "needs" if precision == "int8-static" else "takes no"
        raise ConfigError(f"precision {precision} {state} calibration images; int8-static is what they are for")


def quantize(
    folder: Path, outputs: Sequence[str], precision: str, calibration: Sequence[Mapping[str, np.ndarray]]
) -> None:
    """Replace the graph and the weights in `folder` by quantized ones.

    'int8' stores the weights of matrix products in 8 bits, and quantizes activations as they come; 'int8-static' also
    fixes the scales of activations, from `calibration` inputs.
    """
    import onnx
    from onnxruntime import quantization

    stages, plain, data = folder / STAGES, folder / GRAPHS["onnx"], f"{GRAPHS['onnx']}.data"
    source, target = stages if stages.exists() else plain, folder / "quantized.onnx"
    options: dict[str, Any] = dict(per_channel=True, weight_type=quantization.QuantType.QInt8)
    if precision == "int8":
        quantization.quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "Gemm"], **options)
    else:
        quantization.quantize_static(
            source, target, _Reader(calibration), op_types_to_quantize=["MatMul", "Gemm"],
            activation_type=quantization.QuantType.QUInt8, **options,
        )  # fmt: skip
    model = onnx.load(str(target))
    for path in folder.iterdir():
        path.unlink()
    onnx.save_model(model, str(source), save_as_external_data=True, location=data, size_threshold=1024)
    if source != plain:
        model = onnx.load(str(source), load_external_data=False)
        keep_outputs(model, outputs)
        onnx.save(model, str(plain))


class _Reader:
    """The calibration inputs, as ONNX Runtime asks for them."""

    def __init__(self, inputs: Sequence[Mapping[str, np.ndarray]]) -> None:
        self.inputs: Iterator[Mapping[str, np.ndarray]] = iter(inputs)

    def get_next(self) -> Any:
        return next(self.inputs, None)
