"""Scores of the layers of an encoder: the best one, and a figure."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from pe_spatial.atomic import atomic_write


def best_layer(scores: Mapping[int, float], *, higher_is_better: bool = True) -> int:
    """Return the layer with the best score, the deepest one of equals; NaN never wins."""
    sign = 1 if higher_is_better else -1
    return max(scores, key=lambda layer: (np.nan_to_num(sign * scores[layer], nan=-np.inf), layer))


def draw_scores(path: str | Path, scores: Mapping[int, float], *, name: str, best: int) -> None:
    """Draw scores against layers into a PNG file; the best and the deepest layer are marked.

    The axis of the scores spans at least a tenth of them, so that small differences look small.
    """
    layers, last = sorted(scores), max(scores)
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="layer of the encoder, 0-based", ylabel=name)
    axes.plot(layers, [scores[layer] for layer in layers], "o-", color="0.5", markersize=4)
    for label, layer, marker, fill in (("best", best, "*", "full"), ("deepest", last, "s", "none")):
        text = f"{label}: {scores[layer]:.4g} (layer {layer})"
        axes.plot(layer, scores[layer], marker, markersize=12, fillstyle=fill, label=text)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finite = [score for score in scores.values() if np.isfinite(score)] or [0.0]
    middle, spread = (max(finite) + min(finite)) / 2, max(finite) - min(finite)
    half = 0.55 * max(spread, 0.1 * abs(middle)) or 1.0
    axes.set_ylim(middle - half, middle + half)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_write(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
