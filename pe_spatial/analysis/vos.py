"""The report on one or two results of video object segmentation: J&F by sequence, and where in time it is lost."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from pe_spatial.analysis.figures import draw_over_time
from pe_spatial.analysis.interval import bootstrap
from pe_spatial.analysis.page import Page
from pe_spatial.tracking.vos.evaluation import Evaluation

MEANS = ("J&F-Mean", "J-Mean", "F-Mean")
_NOTE = "J is the overlap of masks, F the agreement of their borders, in percent; means over all objects."


def write_page(evaluations: Mapping[str, Evaluation], *, worst: int, samples: int) -> tuple[str, list[str]]:
    """Return the report on one or two evaluations of the same sequences, as HTML, and lines that summarize it.

    Args:
        evaluations: name -> evaluation.
        worst: number of sequences whose J&F is drawn over time.
        samples: of the bootstrap over sequences, for two evaluations.
    """
    first, *others = evaluations.values()
    counts = f"{len(first.per_sequence)} sequences, {len(first.per_object)} objects, protocol {first.protocol}"
    page = Page(f"Analysis of {' and '.join(evaluations)}", counts)
    page.section("J&F", _NOTE)
    rows = [[100 * one.global_results[key] for key in MEANS] for one in evaluations.values()]
    lines = [f"{name}: J&F {row[0]:.1f}" for name, row in zip(evaluations, rows, strict=True)]
    named: list[list[Any]] = [[name, *row] for name, row in zip(evaluations, rows, strict=True)]
    if others:
        named.append(["difference", *(b - a for a, b in zip(*rows, strict=True))])
    page.table(["", *MEANS], named)
    if others and samples:
        lines.append(_difference(first, others[0], samples))
        page.text(lines[-1])
    for rule in first.rules():
        page.text(rule)
    names = _add_sequences(page, evaluations)[:worst]
    if names:
        page.section("Over time", "J&F of each frame, mean over the objects, of the first sequences of the table.")
        page.image(draw_over_time({n: {k: _over_time(one, n) for k, one in evaluations.items()} for n in names}))
    return page.html(), lines


def _add_sequences(page: Page, evaluations: Mapping[str, Evaluation]) -> list[str]:
    """Add the table of sequences; return their names, the one to look at first."""
    first, *others = evaluations.values()
    table: list[list[Any]] = []
    for name in first.per_sequence:
        values = [100 * one.per_sequence[name]["J&F-Mean"] for one in evaluations.values()]
        table.append([name, *values, *([values[1] - values[0]] if others else [])])
    table.sort(key=lambda row: row[-1])
    page.section("Sequences", "Largest loss first." if others else "Lowest J&F first.")
    header = ["sequence", *evaluations, *(["difference"] if others else [])]
    page.table(header, table, changes=3 if others else -1)
    return [row[0] for row in table]


def _objects(evaluation: Evaluation, sequence: str) -> list[str]:
    return [name for name in evaluation.per_object if name.rpartition("_")[0] == sequence]


def _over_time(evaluation: Evaluation, sequence: str) -> np.ndarray:
    """Return J&F in percent, mean over the objects that count in a frame, (frames,)."""
    scores: dict[str, list[float]] = {}
    for name in _objects(evaluation, sequence):
        one: Mapping[str, Any] = evaluation.per_frame[name]
        for frame, j, f in zip(one["frames"], one["J"], one["F"], strict=True):
            scores.setdefault(frame, []).append(50 * (j + f))
    return np.array([np.mean(scores[frame]) for frame in sorted(scores)])


def _difference(first: Evaluation, second: Evaluation, samples: int) -> str:
    sums, counts = [], []
    for sequence in first.per_sequence:
        names = _objects(first, sequence)
        gains = [second.per_object[n][key] - first.per_object[n][key] for n in names for key in ("J-Mean", "F-Mean")]
        sums.append(sum(gains) / 2)
        counts.append(len(names))

    def difference(weight: np.ndarray) -> float:
        return float(weight @ np.array(sums) / (weight @ np.array(counts)))

    return bootstrap(difference, len(sums), samples=samples).sentence("J&F", "sequences", scale=100)
