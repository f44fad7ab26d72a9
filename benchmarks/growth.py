"""Measure how time and memory of the encoder grow with image size, batch and number of blocks.

Prints one markdown table: the forward pass plain and windowed (median of CPU or GPU times of alternating runs), and the
memory of a windowed training step as it is planned (`pe-spatial plan`), in which nothing runs.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
from encoder import Step, seconds

from pe_spatial import PerceptionEncoder
from pe_spatial.encoder.variants import EncoderConfig, get_config
from pe_spatial.planning.planner import measure_step

GEOMETRIES = ("release", "vitdet")
Point = tuple[str, EncoderConfig, int, int]  # what, encoder, batch, side of the images in pixels


def points(variant: str, sizes: list[int], batches: list[int], depths: list[int]) -> list[Point]:
    config = get_config(variant)
    return [
        *((f"{size} px ({(size // config.patch_size) ** 2} patches)", config, 1, size) for size in sizes),
        *((f"batch of {batch}", config, batch, config.img_size) for batch in batches),
        *((f"{depth} blocks", dataclasses.replace(config, depth=depth), 1, config.img_size) for depth in depths),
    ]


def build(config: EncoderConfig, geometry: str) -> PerceptionEncoder:
    """Every third block is global in windows, as in ViTDet's recipe for 12."""
    blocks = dict(global_attn_indexes=range(2, config.depth, 3)) if geometry == "vitdet" else {}
    return PerceptionEncoder(config, geometry=geometry, **blocks)


def forward_step(config: EncoderConfig, geometry: str, batch: int, size: int, device: torch.device) -> Step:
    model, x = build(config, geometry).eval().to(device), torch.randn(batch, 3, size, size, device=device)
    return torch.inference_mode()(lambda: model(x)[0])


def training_mib(config: EncoderConfig, batch: int, size: int) -> float:
    with torch.device("meta"):
        model = build(config, "vitdet").train()
    return measure_step(model, batch, (size, size), bfloat16=False).peak / 2**20


def milliseconds(steps: list[Callable[[], object]], rounds: int, device: torch.device) -> list[float]:
    for step in steps:
        step()
    times = [[seconds(step, device) for step in steps] for _ in range(rounds)]
    return [1e3 * statistics.median(column) for column in zip(*times, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--variant", default="pe_spatial_t16_512", help="PE variant (default: PE-Spatial-T16-512)")
    parser.add_argument("--sizes", type=int, nargs="*", default=[512, 768, 1024, 1536, 2048], help="pixels")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 2, 4, 8])
    parser.add_argument("--depths", type=int, nargs="*", default=[6, 12, 24])
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default: 3)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {args.variant}, {args.device}, {torch.get_num_threads()} CPU threads\n")
    print("| | plain forward, ms | windowed forward, ms | windowed training step, MiB |\n|---|---|---|---|")
    for what, config, batch, size in points(args.variant, args.sizes, args.batches, args.depths):
        steps = [forward_step(config, geometry, batch, size, args.device) for geometry in GEOMETRIES]
        plain, windowed = milliseconds(steps, args.rounds, args.device)
        print(f"| {what} | {plain:.0f} | {windowed:.0f} | {training_mib(config, batch, size):.0f} |", flush=True)


if __name__ == "__main__":
    main()
