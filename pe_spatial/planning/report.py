"""Plans as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any

from pe_spatial.planning.search import GB, TERA, Hardware

COLUMNS = (
    "variant", "weights", "recomputed", "parameters", "gradients", "optimizer", "extra", "activations", "total", "fits",
    "largest batch", "TFLOP forward", "TFLOP step", "hours/epoch", "hours/run",
)  # fmt: skip
SHORT_STEP = 0.05  # seconds
_RECOMPUTED = {False: "no", "selective": "selective", True: "yes"}
_MEMORY = ("parameters", "gradients", "optimizer", "extra", "activations", "total")


def format_table(rows: Sequence[Mapping[str, Any]], hardware: Hardware) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    for row in rows:
        cells = [
            f"{row['variant']} ({row['number'] / 1e6:.1f} M)", row["weights"], _RECOMPUTED[row["recomputed"]],
            *(f"{row[key] / GB:.2f}" for key in _MEMORY),
            "yes" if row["total"] <= hardware.usable else "no", str(row["largest_batch"]),
            f"{row['forward_flops'] / TERA:.2f}", f"{row['step_flops'] / TERA:.2f}", f"{row['hours']:.3g}",
            f"{row['run_hours']:.3g}" if row["run_hours"] else "",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def describe(row: Mapping[str, Any], hardware: Hardware, *, config: str, images: str, run: str) -> str:
    """Return the line above the table of a plan: what is trained, from any of its rows.

    `images` is the number of images of an epoch and where it is from, `run` the length of the run.
    """
    h, w = row["size"]
    precision = "bfloat16 under autocast" if row["bfloat16"] else "float32"
    kind = f"clips of {row['frames']} frames" if "frames" in row else "images"
    return (
        f"{config}: {h} x {w} px, {row['batch']} {kind} on each of {hardware.gpus} GPUs of {hardware.gpu_memory:g} GB, "
        f"{precision}; epoch: {images}; run: {run}.\n"
    )


def explain(rows: Sequence[Mapping[str, Any]], hardware: Hardware) -> str:
    """Return the lines below the table; docs/nodes.md explains the columns."""
    assumed, option = hardware.assumed, rows[0]["option"]
    selective = any(row["recomputed"] == "selective" for row in rows)
    values = "True or selective" if selective else "True"
    recompute = f"{option}={values}" if option else "with_cp of the backbone"
    lines = [
        f"\nGB (1e9 bytes) of one GPU; fits: total leaves {hardware.reserve:g} GB. Counted: {rows[0]['counted']}.",
        f"Hours assume {hardware.efficiency:.0%} of {assumed.bfloat16:g} TFLOP/s in bfloat16 and of "
        f"{assumed.float32:g} TFLOP/s in float32 ({assumed.name}; --efficiency, --bfloat16-rate, --float32-rate), "
        "without data loading and validation.",
        f"Set by --cfg-options: train_dataloader.batch_size=N, {recompute} (recomputed), runner_type=ShardedRunner "
        "(FSDP).",
    ]
    fastest = min(row["seconds"] for row in rows)
    if fastest < SHORT_STEP:
        lines.append(
            f"A step of {fastest * 1000:.2g} ms does not reach these rates: below {SHORT_STEP * 1000:g} ms, data "
            "loading and the start of kernels take longer, so its hours are a lower bound."
        )
    return "\n".join(lines)
