"""Time of a model in PyTorch and in the exported forms, in turns in one process, beside the processor's limit.

python benchmarks/export.py pe_spatial_t16_512 --size 512 --batches 1 4 --folder work_dirs/export_t16
python benchmarks/export.py work_dirs/demo/iter_350.pth --size 192 --folder work_dirs/export_demo --write-only

A variant is measured with random weights, which do not change the time. The forms are written into --folder once, and
read from there afterwards; --write-only does no more. The last column is the share of the rate that one large matrix
product reaches in float32: of the model's own products, so that int8 and bf16 may exceed 100 %.
"""

import argparse
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import pe_spatial
from pe_spatial import PerceptionEncoder
from pe_spatial.export.certificate import interleaved
from pe_spatial.export.detector import detector_graph
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import Exportable, export, write_openvino
from pe_spatial.export.precision import quantize
from pe_spatial.runtime.compare import DETECTION, match
from pe_spatial.runtime.manifest import read_manifest, write_manifest
from pe_spatial.runtime.sessions import open_session
from pe_spatial.runtime.verify import objects

FROM_ONNX = (("onnx", "int8"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8-static"))
NAMES = {"onnx": "ONNX Runtime", "openvino": "OpenVINO", "torch": "AOTInductor"}
Values = dict[str, np.ndarray]


def load(source: str) -> Exportable:
    """Return a variant with random weights, or the detector of a checkpoint."""
    if source in pe_spatial.VARIANTS:
        torch.manual_seed(0)
        return encoder_graph(PerceptionEncoder(source).eval(), whole_windows=True)
    return detector_graph(pe_spatial.load(source))


def pixels(batch: int, size: int) -> np.ndarray:
    """Return images with coarse structure, so that a detector finds something."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 200, (batch, size // 32, size // 32, 3)).repeat(32, 1).repeat(32, 2)
    return (coarse + rng.integers(0, 56, coarse.shape)).astype(np.uint8)


def write_forms(graph: Exportable, folder: Path, size: int) -> None:
    """Write all forms that are not there; those of `FROM_ONNX` are made of the first."""
    first = folder / "onnx-fp32"
    if not first.exists():
        export(graph, first)
    for form, precision in FROM_ONNX:
        out = folder / f"{form}-{precision}"
        if out.exists():
            continue
        shutil.copytree(first, out)
        if precision.startswith("int8"):
            calibration = [{"pixels": pixels(1, size)}] if precision == "int8-static" else []
            quantize(out, graph.outputs, precision, calibration)
        if form == "openvino":
            write_openvino(graph, out)
        write_manifest(out, graph.manifest(form, precision))
    if not graph.translations and not (folder / "torch-fp32").exists():
        export(graph, folder / "torch-fp32", form="torch")


def matrix_rate(side: int = 1536, rounds: int = 5) -> float:
    """Return the FLOP per second of a product of two square matrices in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def calls_of(graph: Exportable, folder: Path, *, compiled: bool) -> dict[str, Callable[[np.ndarray], Values]]:
    """Return name -> a call that takes pixels and returns the outputs."""

    def in_torch(module: Any) -> Callable[[np.ndarray], Values]:
        return lambda x: dict(zip(graph.outputs, (v.numpy() for v in module(torch.from_numpy(x))), strict=False))

    calls = {"eager": in_torch(graph.module)}
    if compiled:
        calls["compiled"] = in_torch(torch.compile(graph.module, dynamic=False))
    for form, precision in (("torch", "fp32"), ("onnx", "fp32"), *FROM_ONNX):
        path = folder / f"{form}-{precision}"
        if path.exists():
            session = open_session(path, read_manifest(path), threads=torch.get_num_threads())
            calls[f"{NAMES[form]} {precision}"] = lambda x, session=session: session.run({"pixels": x})
    return calls


def gap(ours: Values, theirs: Values) -> str:
    """Return how far two results are apart, in words."""
    if "valid" not in theirs:
        return f"{max(float(np.abs(ours[name] - value).max()) for name, value in theirs.items()):.1g}"
    both = [objects({name: values[name][0] for name in DETECTION if name in values}) for values in (ours, theirs)]
    one = match(*both)
    if one["unmatched"]:
        return f"{one['unmatched']:.0f} of {one['theirs']:.0f} without partner"
    return f"{one['box']:.1g} px, {one['score']:.1g}"


def measure(calls: dict[str, Callable[[np.ndarray], Values]], graph: Exportable, x: np.ndarray, rounds: int) -> None:
    """Print the table of one input."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        graph.module(torch.from_numpy(x))
    limit = counter.get_total_flops() / matrix_rate()
    with torch.no_grad():
        results = {name: call(x) for name, call in calls.items()}
        seconds = interleaved([lambda call=call: call(x) for call in calls.values()], rounds)
    print(f"\n| batch {len(x)}, {x.shape[1]} px | ms | images/s | eager / it | largest difference | of the limit |")
    print("|---|---|---|---|---|---|")
    for name, one in zip(calls, seconds, strict=True):
        print(f"| {name} | {1e3 * one:.0f} | {len(x) / one:.2f} | {seconds[0] / one:.2f} | "
              f"{gap(results[name], results['eager'])} | {100 * limit / one:.0f} % |", flush=True)  # fmt: skip
    print(f"| limit | {1e3 * limit:.0f} | {len(x) / limit:.2f} | {seconds[0] / limit:.2f} | | 100 % |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="variant, or checkpoint of a detector")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--write-only", action="store_true")
    parser.add_argument("--compiled", action="store_true", help="compile a detector too, which takes minutes")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    graph = load(args.source)
    write_forms(graph, args.folder, args.size)
    if not args.write_only:
        calls = calls_of(graph, args.folder, compiled=args.compiled or not graph.translations)
        print(f"{args.source}, torch {torch.__version__}, {torch.get_num_threads()} threads", flush=True)
        for batch in args.batches:
            measure(calls, graph, pixels(batch, args.size), args.rounds)
