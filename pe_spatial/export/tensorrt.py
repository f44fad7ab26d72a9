"""TensorRT builds its engine from the same ONNX file; without it, the file is checked against what TensorRT takes."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_spatial.errors import ConfigError
from pe_spatial.runtime.manifest import Manifest

# onnx/onnx-tensorrt@96e7811:docs/operators.md (TensorRT 10.0, opset 9 to 20)
OPERATORS = frozenset(
    """Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast CastLike Ceil Celu
    Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace DequantizeLinear Div
    Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm
    GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid
    HardSwish Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu
    Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean MeanVarianceNormalization Min
    Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad ParametricSoftplus Pow QuantizeLinear RNN
    RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize
    ReverseSequence RoiAlign Round ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin
    Sinh Size Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor""".split()
)
"""The operators of ONNX that TensorRT takes."""
MAX_TOPK = 3839


def check(path: Path) -> list[str]:
    """Return what in an ONNX file TensorRT does not take, one sentence each."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    known = {function.name for function in model.functions}
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    found = sorted({node.op_type for node in nodes} - OPERATORS - known)
    problems = [f"TensorRT has no operator {name}" for name in found]
    counts = {
        tensor.name: int(numpy_helper.to_array(tensor).max(initial=0))
        for tensor in model.graph.initializer
        if tensor.data_type == onnx.TensorProto.INT64 and not tensor.external_data
    }
    largest = max((counts.get(node.input[1], 0) for node in nodes if node.op_type == "TopK"), default=0)
    return problems + [f"TopK of {largest} is above TensorRT's {MAX_TOPK}"] * (largest > MAX_TOPK)


def build_command(folder: Path, manifest: Manifest) -> list[str]:
    """Return the trtexec command for the inputs of a folder: batch 1 to 8, sizes around the example's."""
    (name, facts), *_ = manifest.inputs.items()
    shapes = {}
    for option, (batch, side) in dict(min=(1, 1), opt=(1, 2), max=(8, 4)).items():
        step = max(manifest.multiple, 224 // max(manifest.multiple, 1) * max(manifest.multiple, 1))
        sizes = [
            batch if size == "batch" else side * step if isinstance(size, str) else size for size in facts["shape"]
        ]
        shapes[option] = f"{name}:{'x'.join(map(str, sizes))}"
    files = [f"--onnx={folder / 'model.onnx'}", f"--saveEngine={folder / 'model.plan'}"]
    return ["trtexec", *files, *(f"--{option}Shapes={shape}" for option, shape in shapes.items())]


def build(folder: Path, manifest: Manifest) -> Mapping[str, Any]:
    """Check the file, build the engine where trtexec is installed, and return what a command prints.

    Raises ConfigError if TensorRT does not take the file, or its build fails.
    """
    problems = check(folder / "model.onnx")
    if problems:
        raise ConfigError(f"{folder / 'model.onnx'} is not for TensorRT: {'; '.join(problems)}; export it as onnx")
    command = build_command(folder, manifest)
    installed = shutil.which("trtexec") is not None
    if installed:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise ConfigError(f"trtexec failed: {' '.join(last)}; run it by hand: {' '.join(command)}")
    return dict(built=installed, command=" ".join(command))
