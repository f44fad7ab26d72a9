"""Measure the patch embedding of an encoder beside torch's convolution of the same weights, in turns; print a table."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder

MODES = ("float32", "bfloat16", "autocast")


def convolving(encoder: PerceptionEncoder) -> PerceptionEncoder:
    """Return a copy whose patch embedding is torch's convolution."""
    encoder = copy.deepcopy(encoder)
    ours = encoder.patch_embed.proj
    conv = nn.Conv2d(ours.in_channels, ours.out_channels, ours.kernel_size, stride=ours.stride, bias=False)
    conv.weight = ours.weight
    encoder.patch_embed.proj = conv
    return encoder


def ratio(ours: nn.Module, peer: nn.Module, x: Tensor, rounds: int) -> tuple[float, float, float]:
    """Return both medians in ms, and the median ratio of neighboring runs."""
    ms: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 2):
        for times, module in zip(ms, (ours, peer), strict=True):
            start = time.perf_counter()
            module(x)
            times.append((time.perf_counter() - start) * 1000)
    a, b = ms[0][2:], ms[1][2:]
    return statistics.median(a), statistics.median(b), statistics.median(x / y for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="pe_spatial_s16_512")
    parser.add_argument("--size", type=int, default=512, help="side of the image, in pixels")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, CPU, {args.variant}, {args.size} px\n")
    print("| what | ms | convolution, ms | ratio |\n|---|---|---|---|")
    for mode in MODES:
        torch.manual_seed(0)
        encoder = PerceptionEncoder(args.variant).eval()
        x = torch.randn(1, 3, args.size, args.size)
        if mode == "bfloat16":
            encoder, x = encoder.bfloat16(), x.bfloat16()
        peer = convolving(encoder)
        autocast: AbstractContextManager[object] = (
            torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext()
        )
        with torch.inference_mode(), autocast:
            assert_close(encoder.patch_embed(x), peer.patch_embed(x))
            parts = (
                ("patch embedding", encoder.patch_embed, peer.patch_embed, 5),
                ("complete forward", encoder, peer, 1),
            )
            for what, ours, theirs, times in parts:
                a, b, r = ratio(ours, theirs, x, args.rounds * times)
                print(f"| {what}, {mode} | {a:.2f} | {b:.2f} | {r:.2f} |", flush=True)


if __name__ == "__main__":
    main()
