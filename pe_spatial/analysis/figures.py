"""Figures of a report, as PNG."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from pe_spatial.analysis.counts import Calibration

_NAMED = 25  # classes, above which a matrix has no names


def draw_curves(curves: Mapping[str, np.ndarray]) -> bytes:
    """Draw the precision-recall curves (3, 101) of results by name: IoU of 0.5, of 0.75, mean over IoU."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    for place, title in enumerate(("IoU 0.5", "IoU 0.75", "mean over IoU 0.5 to 0.95")):
        axes = figure.add_subplot(1, 3, place + 1)
        for name, curve in curves.items():
            axes.plot(np.linspace(0, 1, 101), curve[place], label=f"{name} ({curve[place].mean():.3f})")
        axes.set(title=title, xlabel="recall", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    figure.axes[0].set_ylabel("precision, mean over classes")
    return _png(figure)


def draw_confusion(counts: np.ndarray, names: Sequence[str]) -> bytes:
    """Draw a confusion matrix with background as the last row and column; colors are shares of a row."""
    labels = [*names, "background"]
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(2.2 + 0.42 * len(labels), 9) if len(names) <= _NAMED else 7
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="detected", ylabel="annotated")
    if len(names) <= _NAMED:
        axes.set_xticks(range(len(labels)), labels, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, fontsize=8, parse_math=False)
        for (i, j), count in np.ndenumerate(counts):
            if count:
                axes.text(j, i, str(count), ha="center", va="center", fontsize=7, color="wk"[int(shares[i, j] < 0.6)])
    else:
        axes.set_title(f"{len(names)} classes in the order of the file; background is last", fontsize=9)
    return _png(figure)


def draw_calibration(results: Mapping[str, Calibration]) -> bytes:
    """Draw precision over score, and how many detections have which score."""
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    curve, histogram = figure.subplots(1, 2)
    curve.plot([0, 1], [0, 1], color="gray", linewidth=1, linestyle="--")
    for name, one in results.items():
        full = one.count > 0
        curve.plot(one.score[full], one.precision[full], marker="o", label=f"{name} (error {one.error:.3f})")
        histogram.stairs(one.count, np.linspace(0, 1, len(one.count) + 1), label=name)
    curve.set(xlabel="score", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    curve.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    histogram.set(xlabel="score", ylabel="detections", yscale="symlog", xlim=(0, 1))
    histogram.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.2))
    return _png(figure)


def draw_over_time(sequences: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Draw scores in percent over the frames: sequence -> result -> (frames,)."""
    rows = -(-len(sequences) // 3)
    figure = Figure(figsize=(10, 2.4 * rows), layout="constrained")
    for place, (sequence, results) in enumerate(sequences.items()):
        axes = figure.add_subplot(rows, 3, place + 1)
        for name, values in results.items():
            axes.plot(values, label=name)
        axes.set(ylim=(0, 102))
        axes.set_title(sequence, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower left")
    return _png(figure)


def side_by_side(images: Sequence[Image.Image]) -> bytes:
    """Return images of one height beside each other, as JPEG."""
    sheet = Image.new("RGB", (sum(i.width for i in images) + 8 * (len(images) - 1), images[0].height), "white")
    x = 0
    for image in images:
        sheet.paste(image, (x, 0))
        x += image.width + 8
    buffer = io.BytesIO()
    sheet.save(buffer, format="JPEG", quality=80)
    return buffer.getvalue()


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()
