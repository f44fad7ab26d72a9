"""How far the outputs of two runtimes are apart: arrays by their largest difference, detections one to one."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

SAMPLES = 2048
"""Numbers that are kept of a larger array for a later comparison."""
PROPOSALS = "proposals"
"""The stage whose entries are compared as a set, see `unpaired`."""
DETECTION = ("boxes", "scores", "labels", "valid", "masks")
LIMITS: dict[str, dict[str, float]] = {
    "fp32": dict(stage=1e-4, proposals=0.005, box=0.05, score=1e-4, iou=0.99),
    "fp16": dict(stage=2e-2),
    "bf16": dict(stage=1e-1),
    "int8": dict(stage=5e-1),
    "int8-static": dict(stage=5e-1),
}
"""Precision -> the limits: of the difference of a stage, relative to its largest value where that is above 1; of the
share of proposals without partner; of the difference of a box, in pixels, and of a score; the smallest IoU of a mask.
Reduced precision changes which objects are found: see AP."""


def sample(name: str, values: np.ndarray) -> np.ndarray:
    """Return `values` flat, or of a large array `SAMPLES` of them, always the same ones; proposals as they are."""
    if name == PROPOSALS:
        return values
    flat = values.reshape(-1)
    if flat.size <= SAMPLES:
        return flat
    return flat[np.random.default_rng(zlib.crc32(name.encode())).choice(flat.size, SAMPLES, replace=False)]


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """Return the largest difference of two arrays, and the largest value of the second."""
    if ours.shape != theirs.shape:
        return dict(largest=float("inf"), scale=float(np.abs(theirs).max(initial=0)))
    gap = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    largest = float("inf") if not np.isfinite(gap).all() else float(gap.max(initial=0))
    return dict(largest=largest, scale=float(np.abs(theirs).max(initial=0)))


def unpaired(ours: np.ndarray, theirs: np.ndarray, distance: float = 0.05) -> float:
    """Return the share of the boxes (B, P, 4) of each that have no box of the other within `distance` pixels.

    Proposals are compared so because their order, and the last of them, hang on single ties.
    """
    lost = total = 0
    for a, b in zip(ours, theirs, strict=True):
        near = np.abs(a[:, None] - b[None]).max(-1) <= distance
        lost += int((~near.any(0)).sum() + (~near.any(1)).sum())
        total += len(a) + len(b)
    return lost / max(total, 1)


def match(ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Match the detections of one image one to one, by class, box and score.

    Both have `boxes` (N, 4), `scores` and `labels` (N,), and may have `masks` (N, h, w) bool. Returns the numbers of
    detections, how many of `theirs` have no partner, and the largest differences of those that have one.
    """
    count, number = len(theirs["scores"]), len(ours["scores"])
    result = dict(theirs=count, ours=number, unmatched=abs(count - number), box=0.0, score=0.0, iou=1.0)
    if not count or not number:
        return result
    far = np.abs(ours["boxes"][None] - theirs["boxes"][:, None]).max(-1)
    far = far + 1e3 * np.abs(ours["scores"][None] - theirs["scores"][:, None]).clip(max=0.1)
    far[ours["labels"][None] != theirs["labels"][:, None]] = np.inf
    taken: set[int] = set()
    for i in np.argsort(-theirs["scores"], kind="stable"):
        order = [j for j in np.argsort(far[i], kind="stable") if j not in taken and np.isfinite(far[i, j])]
        if not order:
            result["unmatched"] = max(result["unmatched"], count - len(taken))
            continue
        j = order[0]
        taken.add(int(j))
        result["box"] = max(result["box"], float(np.abs(ours["boxes"][j] - theirs["boxes"][i]).max()))
        result["score"] = max(result["score"], float(abs(ours["scores"][j] - theirs["scores"][i])))
        if "masks" in ours and "masks" in theirs:
            result["iou"] = min(result["iou"], _iou(ours["masks"][j], theirs["masks"][i]))
    result["unmatched"] = max(result["unmatched"], count - len(taken))
    return result


def _iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    union = (ours | theirs).sum()
    return float((ours & theirs).sum() / union) if union else 1.0


def worst(results: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the sums of the counts and the largest differences of several results of `match`."""
    total: dict[str, Any] = {key: sum(result[key] for result in results) for key in ("theirs", "ours", "unmatched")}
    total |= {key: max((result[key] for result in results), default=0.0) for key in ("box", "score")}
    return total | {"iou": min((result["iou"] for result in results), default=1.0)}


def problems(
    stages: Mapping[str, Mapping[str, float]], matched: Mapping[str, float] | None, limits: Mapping[str, float]
) -> list[str]:
    """Return a sentence for each difference above its limit."""
    found = []
    for name, one in stages.items():
        if name == PROPOSALS:
            if one["largest"] > limits.get("proposals", 1.0):
                share = f"{100 * one['largest']:.1f} % of the proposals have no partner"
                found.append(f"{share} (limit {100 * limits['proposals']:g} %)")
            continue
        allowed = limits["stage"] * max(1.0, one["scale"])
        if not one["largest"] <= allowed:
            found.append(f"{name} differs by {one['largest']:.3g} (limit {allowed:.3g})")
    if matched is None or "box" not in limits:
        return found
    if matched["unmatched"]:
        found.append(f"{matched['unmatched']:.0f} of {matched['theirs']:.0f} detections have no partner (limit 0)")
    for name in ("box", "score"):
        if not matched[name] <= limits[name]:
            found.append(f"the {name} of a detection differs by {matched[name]:.3g} (limit {limits[name]:g})")
    if not matched["iou"] >= limits["iou"]:
        found.append(f"a mask has IoU {matched['iou']:.3f} (limit {limits['iou']:g})")
    return found
