"""Plans as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from pe_spatial.planning.search import GB, TERA, Hardware

COLUMNS = (
    "variant", "weights", "recomputed", "parameters", "gradients", "optimizer", "extra", "activations", "total", "fits",
    "largest batch", "TFLOP forward", "TFLOP step", "hours/epoch",
)  # fmt: skip
_MEMORY = ("parameters", "gradients", "optimizer", "extra", "activations", "total")


def format_table(rows: Sequence[Mapping[str, Any]], hardware: Hardware) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [
            f"{row['variant']} ({row['number'] / 1e6:.1f} M)", row["weights"], "yes" if row["recomputed"] else "no",
            *(f"{row[key] / GB:.2f}" for key in _MEMORY),
            "yes" if row["total"] <= hardware.usable else "no", str(row["largest_batch"]),
            f"{row['forward_flops'] / TERA:.2f}", f"{row['step_flops'] / TERA:.2f}", f"{row['hours']:.2f}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(row: Mapping[str, Any], hardware: Hardware, *, config: str, images: int) -> str:
    """Explain the columns and assumptions of a plan, from any of its rows; an epoch has `images` images or clips."""
    (h, w), batch_size = row["size"], row["batch"]
    precision = "bfloat16 under autocast" if row["bfloat16"] else "float32"
    unit = f"clips of {row['frames']} frames" if "frames" in row else "images"
    return f"""\
{config}: {h} x {w} px, {batch_size} {unit} on each of {hardware.gpus} GPUs of {hardware.gpu_memory:g} GB, {precision}.
Counted: {row["counted"]}.

- Memory in GB (1e9 bytes) of one GPU. weights: complete on each GPU (DDP) or sharded over all (FSDP, one unit for each
  block). extra: DDP's buckets, or the weights that FSDP gathers at a time. activations: their peak, recomputed blocks
  included. total: the sum, with the optimizer's temporary memory instead of the activations where it is larger.
- fits: total leaves {hardware.reserve:g} GB for the CUDA context, buffers of libraries and fragmentation.
- TFLOP for one of the {unit}: matrix products, convolutions and attention; a multiplication and an addition are two
  operations. step: forward, backward and recomputation.
- hours for {images} {unit} at {hardware.efficiency:.0%} of {hardware.bfloat16_rate:g} TFLOP/s in bfloat16 and of \
{hardware.float32_rate:g} TFLOP/s in float32; without data loading,
  communication and validation.
"""
