"""The geometry doctor: which preset, image size and layer of an encoder suit some images, and what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pe_spatial.alignment.material import Material
from pe_spatial.alignment.measure import HIGHER_IS_BETTER, METRICS, encoding_of, measure
from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.geometry import PRESETS
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.features.extract import load_encoder
from pe_spatial.integrations.openmmlab import build_encoder
from pe_spatial.integrations.timm import PREFIX
from pe_spatial.planning.ledger import EmulateCuda, Ledger

GEOMETRIES = ("release", "timm", "vitdet")
"""Presets that are compared by default."""

FACTORS = (0.75, 1.0, 1.5, 2.0)
"""Default image sizes over the side of the pretraining images."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A way to read frozen features.

    Attributes:
        geometry: name of a preset; None for timm's encoders, which have their own.
        size: side of the images in pixels, the longer one, in tracking the shorter one.
        layer: block, 0-based.
        scores: metric -> value.
        gflops: operations of a forward pass of a square image up to this layer, 1e9.
        memory: weights up to this layer and the largest activations of that pass in float32, in bytes.
        seconds: of that pass here, measured for the last layer and scaled by the operations.
    """

    geometry: str | None
    size: int
    layer: int
    scores: Mapping[str, float]
    gflops: float
    memory: int
    seconds: float

    @property
    def name(self) -> str:
        """Say what it is."""
        preset = "" if self.geometry is None else f"{self.geometry}, "
        return f"{preset}{self.size} px, layer {self.layer}"


def default_sizes(variant: Any) -> list[int]:
    """Return `FACTORS` times the side of the pretraining images, in whole patches."""
    with torch.device("meta"):
        encoder = build_encoder(variant)
    grid = encoder.config.grid_size
    native = (grid if isinstance(grid, int) else max(grid)) * encoder.patch_size
    return [round(factor * native / encoder.patch_size) * encoder.patch_size for factor in FACTORS]


def examine(
    variant: Any,
    checkpoint: str,
    material: Material,
    *,
    sizes: Sequence[int] | None = None,
    geometries: Sequence[str] = GEOMETRIES,
    layers: str | Sequence[int] = "all",
    tasks: Sequence[str] | None = None,
    device: str = "cpu",
    report: Callable[[str], object] = lambda _: None,
) -> list[Choice]:
    """Score every preset, size and layer.

    Args:
        variant, checkpoint: as in `load_encoder`.
        material: what to measure on.
        sizes: image sizes in pixels; None for `default_sizes`.
        geometries: names of presets.
        layers: blocks, or 'all'.
        tasks: some of `material.tasks`; None for all.
        report: gets a line before each preset and size.
    """
    for name in geometries:
        one_of("a geometry", name, sorted(PRESETS))
    timm = isinstance(variant, str) and variant.startswith(PREFIX)
    torch.manual_seed(0)  # random weights are the same for every preset
    choices = []
    for geometry in (None,) if timm else tuple(geometries):
        torch.manual_seed(0)
        encoder = load_encoder(variant, checkpoint, layers=layers, geometry=geometry or "release")
        encoding = encoding_of(encoder.to(device), device)
        for size in sizes or default_sizes(variant):
            side = max(1, round(size / encoder.patch_size)) * encoder.patch_size
            report(f"{geometry or variant}: {side} px, {side // encoder.patch_size} patches")
            scores = measure(encoding, material, size=side, tasks=tasks)
            costs = forward_costs(variant, geometry, encoding.layers, side)
            seconds = _seconds(encoder, side, device)
            full = costs[max(costs)][0]
            for layer, (flops, memory) in costs.items():
                cost = dict(gflops=flops / 1e9, memory=memory, seconds=seconds * flops / full)
                choices.append(Choice(geometry=geometry, size=side, layer=layer, scores=scores[layer], **cost))  # type: ignore[arg-type]
    return choices


def forward_costs(variant: Any, geometry: str | None, layers: Sequence[int], side: int) -> dict[int, tuple[int, int]]:
    """Return (operations, bytes of weights and activations) of a forward pass up to each layer, by the planner."""
    costs = {}
    for layer in layers:
        with torch.device("meta"):
            encoder = build_encoder(variant, out_indices=[layer], geometry=geometry)
            images = torch.empty(1, 3, side, side)
        weights = sum(p.nbytes for p in encoder.parameters())
        with torch.no_grad(), Ledger(encoder) as ledger, EmulateCuda(encoder, ledger, False):
            encoder.eval()(images)
        costs[layer] = (sum(ledger.flops.values()), weights + ledger.highest["peak"])
    return costs


@torch.inference_mode()
def _seconds(encoder: Any, side: int, device: str) -> float:
    images = torch.zeros(1, 3, side, side, device=device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        encoder(images)[-1].float().sum().item()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def frontier(choices: Sequence[Choice], metric: str) -> list[Choice]:
    """Return the choices that no other one beats at the same or lower cost, the cheapest first."""
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    best, kept = -np.inf, []
    for choice in sorted(choices, key=lambda c: (c.gflops, -sign * c.scores[metric])):
        if sign * choice.scores[metric] > best:
            best = sign * choice.scores[metric]
            kept.append(choice)
    return kept


def check_tolerance(tolerance: float) -> None:
    """Raise ConfigError for what is no part of a score."""
    if not 0 <= tolerance < 1:
        raise ConfigError(f"tolerance is {tolerance}; give a part of the best score, at least 0 and below 1")


def recommend(choices: Sequence[Choice], metric: str, tolerance: float = 0.01) -> Choice:
    """Return the cheapest choice whose score is within `tolerance`, a part of the best score, of the best."""
    check_tolerance(tolerance)
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    best = max(sign * choice.scores[metric] for choice in choices)
    enough = best - tolerance * abs(best)
    return next(choice for choice in frontier(choices, metric) if sign * choice.scores[metric] >= enough)


def format_table(choices: Sequence[Choice], metric: str, chosen: Choice) -> str:
    """Return a Markdown table: for each preset and size its best layer and its last one, and the frontier."""
    metrics = list(choices[0].scores)
    sign = 1 if HIGHER_IS_BETTER[metric] else -1
    groups: dict[tuple[Any, int], list[Choice]] = {}
    for choice in choices:
        groups.setdefault((choice.geometry, choice.size), []).append(choice)
    kept = frontier(choices, metric)
    rows = set(map(id, kept))
    for group in groups.values():
        rows |= {id(max(group, key=lambda c: sign * c.scores[metric])), id(max(group, key=lambda c: c.layer))}
    lines = [f"| geometry | pixels | layer | {' | '.join(metrics)} | GFLOP | MB | ms here | note |"]
    lines.append("|---" * (len(metrics) + 7) + "|")
    for choice in choices:
        if id(choice) not in rows:
            continue
        notes = ["frontier"] * any(choice is one for one in kept) + ["recommended"] * (choice is chosen)
        scores = " | ".join(f"{choice.scores[name]:.4g}" for name in metrics)
        cost = f"{choice.gflops:.3g} | {choice.memory / 1e6:.0f} | {1000 * choice.seconds:.0f}"
        about = f"| {choice.geometry or 'own'} | {choice.size} | {choice.layer} | {scores} | {cost} "
        lines.append(f"{about}| {', '.join(notes)} |")
    return "\n".join(lines)


def draw_frontier(path: str | Path, choices: Sequence[Choice], metric: str, chosen: Choice) -> None:
    """Draw score against cost: a line for each preset and size, a point for each layer, and the frontier."""
    figure = Figure(figsize=(7.2, 4.6), dpi=130, layout="constrained")
    axes = figure.add_subplot(xlabel="GFLOP of a forward pass", ylabel=metric, xscale="log")
    sizes = sorted({choice.size for choice in choices})
    styles = {name: style for name, style in zip(dict.fromkeys(c.geometry for c in choices), "osD^v", strict=False)}
    for geometry, size in dict.fromkeys((c.geometry, c.size) for c in choices):
        group = [c for c in choices if (c.geometry, c.size) == (geometry, size)]
        points = [c.gflops for c in group], [c.scores[metric] for c in group]
        label = f"{size} px" if geometry is None else f"{geometry}, {size} px"
        color = f"C{sizes.index(size)}"
        axes.plot(*points, f"{styles[geometry]}-", color=color, markersize=4, linewidth=0.8, alpha=0.7, label=label)
    kept = frontier(choices, metric)
    axes.plot([c.gflops for c in kept], [c.scores[metric] for c in kept], "k--", linewidth=1.2, label="frontier")
    axes.plot(chosen.gflops, chosen.scores[metric], "k*", markersize=15, label=f"recommended: {chosen.name}")
    if not HIGHER_IS_BETTER[metric]:
        axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")
    with atomic_write(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)


def metric_of(task: str) -> str:
    """Return the metric of a task."""
    return METRICS[one_of("task", task, list(METRICS))]
