"""Measure speed and memory of the encoder against its peers in the same run; print one markdown table.

Every time is the median of several runs that alternate with the peer's; the ratio is the median of the ratios of
neighboring runs, so that a busy machine slows both. Peak memory is measured apart, one process for each cell: what
torch's allocator had given out, weights and gradients included.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm  # at the top, so that both sides of the memory measurement carry it
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from pe_spatial import PerceptionEncoder
from pe_spatial.encoder.variants import get_config
from pe_spatial.encoder.vit import Attention

Step = Callable[[], "Tensor | None"]
TIMM = {"t16": "tiny_patch16", "s16": "small_patch16", "b16": "base_patch16"}


class PartitionsEveryBlock(PerceptionEncoder):
    """The peer of the windowed encoder: in and out of the windows in each block, as detectron2's ViTDet does."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self._block_groups = [(window, (i,)) for window, blocks in self._block_groups for i in blocks]


class ReleasedAttention(Attention):
    """Rotary products as in the released detectors' code: float32 tables and halves that are written out."""

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        cos, sin = (table.repeat_interleave(2, -1) for table in rope.unbind(-1))  # (N, D)
        q, k = (y.float() * cos + self.turn(y.float()) * sin for y in (q, k))
        out = F.scaled_dot_product_attention(q.type_as(v), k.type_as(v), v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2))

    @staticmethod
    def turn(x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((-odd, even), -1).flatten(-2)


class ReleasedStructure(PartitionsEveryBlock):
    """The structure of the released detectors' backbone (pev1_det.py), with our names of the weights."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        for block in self.blocks:
            block.attn.__class__ = ReleasedAttention


@dataclass(frozen=True)
class Row:
    """One line of the table: what `ours` and `peer` build is called once a run."""

    key: str
    what: str
    peer_name: str
    batch: int
    ours: Callable[[], Step]
    peer: Callable[[], Step]
    equal: bool = False  # both return the same tensor: features, or the gradient of a weight
    rate: bool = False  # report images/s and the share of the device's matrix products


def images(variant: str, batch: int, size: int | None, device: torch.device) -> Tensor:
    size = size or get_config(variant).img_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def training_step(
    variant: str,
    batch: int,
    size: int,
    device: torch.device,
    kind: type[PerceptionEncoder],
    recompute: bool | str = False,
) -> Step:
    torch.manual_seed(0)
    model = kind(variant, geometry="vitdet", grad_checkpointing=recompute).to(device).train()
    x = images(variant, batch, size, device)

    def step() -> Tensor:
        model(x)[0].square().mean().backward()
        gradient = model.blocks[0].attn.qkv.weight.grad
        model.zero_grad(set_to_none=True)
        return gradient

    return step


def forward_step(variant: str, batch: int, device: torch.device, dtype: torch.dtype, mode: str) -> Step:
    """`mode` is 'ours', 'compiled' or 'timm'; all have the same weights."""
    torch.manual_seed(0)
    source = PerceptionEncoder(variant)
    x = images(variant, batch, None, device).to(dtype)
    if mode == "timm":
        _, _, size, side = variant.split("_")
        theirs = timm.create_model(f"vit_pe_spatial_{TIMM[size]}_{side}", num_classes=0)
        theirs.load_state_dict(source.state_dict())
        theirs = theirs.eval().to(device, dtype)
        grid = get_config(variant).grid_size

        def run() -> Tensor:
            return theirs.forward_features(x)[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))

    else:
        model = source.eval().to(device, dtype)
        forward = torch.compile(model, fullgraph=True) if mode == "compiled" else model

        def run() -> Tensor:
            return forward(x)[0]

    return torch.inference_mode()(run)


def table_rows(device: torch.device, sections: list[str], sizes: list[str]) -> list[Row]:
    cuda = device.type == "cuda"
    rows = []
    if "windows" in sections:
        batch = 4 if cuda else 1
        for size in [size for size in sizes if size != "t16" or len(sizes) == 1]:
            variant = f"pe_spatial_{size}_512"
            step = partial(training_step, variant, batch, 1024, device)
            rows.append(
                Row(f"windows-{variant}", f"{variant} windowed, forward + backward, 1024 px", "partition each block",
                    batch, partial(step, PerceptionEncoder), partial(step, PartitionsEveryBlock))
            )  # fmt: skip
    if "memory" in sections:
        batch = 4 if cuda else 1
        for size in [size for size in sizes if size != "t16" or len(sizes) == 1]:
            variant = f"pe_spatial_{size}_512"
            step = partial(training_step, variant, batch, 1024, device)
            rows += [
                Row(f"memory-{recompute}-{variant}", f"{variant} windowed, forward + backward, 1024 px, {what}",
                    "released structure", batch, partial(step, PerceptionEncoder, recompute),
                    partial(step, ReleasedStructure), equal=True)
                for recompute, what in ((False, "keeping all"), ("selective", "selective"), (True, "recomputing all"))
            ]  # fmt: skip
    if "timm" in sections:
        batch = 16 if cuda else 1
        for size in sizes:
            variant = f"pe_spatial_{size}_512"
            step = partial(forward_step, variant, batch, device, torch.float32)
            rows.append(
                Row(f"timm-{variant}", f"{variant} plain forward, 512 px", "timm", batch,
                    partial(step, "ours"), partial(step, "timm"), equal=True)
            )  # fmt: skip
    if "half" in sections:
        batch = 32 if cuda else 1
        for size in sizes:
            variant = f"pe_spatial_{size}_512"
            step = partial(forward_step, variant, batch, device, torch.bfloat16)
            rows.append(
                Row(f"half-float32-{variant}", f"{variant} bf16 forward, 512 px", "ours, float32", batch,
                    partial(step, "ours"), partial(forward_step, variant, batch, device, torch.float32, "ours"))
            )  # fmt: skip
            for mode in ("ours", "compiled") if cuda else ("ours",):
                name = f"{variant} bf16 forward, 512 px" + (", torch.compile" if mode == "compiled" else "")
                rows.append(
                    Row(f"half-{mode}-{variant}", name, "timm, bf16", batch,
                        partial(step, mode), partial(step, "timm"), rate=True)
                )  # fmt: skip
    return rows


def seconds(step: Step, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product: the best of several runs."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    best = min(seconds(lambda: torch.mm(a, b), device) for _ in range(10))
    return 2 * n**3 / best


def operations(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_mib(key: str, side: str, args: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--peak-of", key, side, "--device", str(args.device)]
    command += ["--sections", *args.sections, "--variants", *args.variants]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout)


def measure_peak(row: Row, side: str, device: torch.device) -> float:
    """Most MiB that torch's allocator had given out in one run of one side; meant for a process of its own."""
    step = getattr(row, side)()
    if device.type == "cuda":
        seconds(step, device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    del kept
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]") / 2**20


def measure(row: Row, rounds: int, args: argparse.Namespace) -> str:
    device = args.device
    ours, peer = row.ours(), row.peer()
    outputs = [step() for step in (ours, peer)]  # also the warm-up
    if row.equal:
        assert_close(*outputs, rtol=1e-4, atol=1e-4)
    # each side goes first as often as the other
    times = [
        [seconds(step, device) for step in ((ours, peer), (peer, ours))[i % 2]][:: 1 - 2 * (i % 2)]
        for i in range(rounds)
    ]
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(a / b for a, b in times)
    share = "-"
    if row.rate:
        eager = row.peer()
        share = f"{operations(eager) / mine / matmul_rate(device, torch.bfloat16):.0%}"
    peaks = " / ".join(f"{peak_mib(row.key, side, args):.0f}" for side in ("ours", "peer"))
    cells = [row.what, row.batch, row.peer_name, f"{1e3 * mine:.1f}", f"{1e3 * theirs:.1f}", f"{ratio:.2f}"]
    return " | ".join(map(str, [*cells, f"{row.batch / mine:.1f}", share, peaks]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the smallest variant, three rounds")
    parser.add_argument(
        "--rounds", type=int, help="runs of each side (default: 3 when quick, 7 on the CPU, 30 on CUDA)"
    )
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=("windows", "memory", "timm", "half"),
        help="'windows': runs of windows against partitioning in every block; 'memory': kinds of recomputing against "
        "the structure of the released detectors; 'timm': plain forward; 'half': bf16 against float32 and timm, on a "
        "GPU with and without torch.compile, images/s, share of the device's matrix-product rate (default: all)",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=TIMM,
        help="PE-Spatial variants (default: t16 when quick, else all; 'windows' leaves t16 out where there are others)",
    )
    parser.add_argument("--peak-of", nargs=2, metavar=("ROW", "SIDE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    cuda = args.device.type == "cuda"
    args.sections = args.sections or ["windows", "memory", "timm", "half"]
    args.variants = args.variants or (["t16"] if args.quick else list(TIMM))
    rows = table_rows(args.device, args.sections, args.variants)
    if args.peak_of:
        key, side = args.peak_of
        print(measure_peak(next(row for row in rows if row.key == key), side, args.device))
        return
    rounds = args.rounds or (3 if args.quick else 30 if cuda else 7)
    name = torch.cuda.get_device_name(args.device) if cuda else f"{platform.machine()} CPU"
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {name}, {torch.get_num_threads()} CPU threads, "
        f"TF32 {'on' if torch.backends.cuda.matmul.allow_tf32 else 'off'}, median of {rounds} alternating runs\n"
    )
    print("| what | batch | peer | ms | peer's ms | ratio | images/s | of matmul rate | peak MiB, ours / peer |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(f"| {measure(row, rounds, args)} |", flush=True)


if __name__ == "__main__":
    main()
