"""Time of an encoder in PyTorch and in the exported forms, in turns in one process, and the processor's limit.

python benchmarks/export.py pe_spatial_t16_512 --size 512

Weights are random: they do not change the time. The limit is the encoder's matrix products at the rate that one large
product reaches in float32.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from pe_spatial import PerceptionEncoder
from pe_spatial.export.certificate import interleaved
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import export
from pe_spatial.runtime.encoder import ExportedEncoder

FORMS = (("onnx", "fp32"), ("onnx", "int8"), ("openvino", "fp32"), ("openvino", "bf16"), ("openvino", "int8-static"),
         ("torch", "fp32"))  # fmt: skip


def matrix_rate(side: int = 1536, rounds: int = 5) -> float:
    """Return the FLOP per second of a product of two square matrices in float32."""
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * side**3 / min(times)


def measure(variant: str, size: int, batch: int, rounds: int, compiled: bool) -> list[tuple[str, float, float]]:
    """Return name, seconds and the largest difference from PyTorch of each form."""
    torch.manual_seed(0)
    graph = encoder_graph(PerceptionEncoder(variant).eval(), whole_windows=True)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        expected = graph.module(tensor)[0].numpy()
    calls: dict[str, Callable[[], Any]] = {"eager": lambda: graph.module(tensor)[0].numpy()}
    if compiled:
        program = torch.compile(graph.module)
        calls["compiled"] = lambda: program(tensor)[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        for form, precision in FORMS:
            out = Path(folder) / f"{form}-{precision}"
            calibration = [{"pixels": pixels[:1]}] if precision == "int8-static" else []
            export(graph, out, form=form, precision=precision, calibration=calibration)
            runtime = ExportedEncoder(out, threads=torch.get_num_threads())
            calls[f"{form} {precision}"] = lambda runtime=runtime: runtime(pixels)[0]
        with torch.no_grad():
            gaps = [float(np.abs(call() - expected).max()) for call in calls.values()]
            seconds = interleaved(list(calls.values()), rounds)
    limit = counter.get_total_flops() / matrix_rate()
    return [*zip(calls, seconds, gaps, strict=True), ("limit", limit, 0.0)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variant")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    rows = measure(args.variant, args.size, args.batch, args.rounds, not args.no_compile)
    first = rows[0][1]
    print(f"| {args.variant}, {args.size} px, batch {args.batch} | ms | eager / it | largest difference |")
    print("|---|---|---|---|")
    for name, seconds, gap in rows:
        print(f"| {name} | {1e3 * seconds:.0f} | {first / seconds:.2f} | {gap:.1g} |")
