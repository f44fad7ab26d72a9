"""Measure J&F against the official evaluator's steps, in the same run.

Both sides take turns and must agree; ratios are medians of the ratios of neighboring runs. The peer is written here,
step by step, from davisvideochallenge/davis2017-evaluation@ac7c43f.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pe_spatial.tracking.vos.evaluation import evaluate
from pe_spatial.tracking.vos.masks import write_mask

SIZE = (480, 854)  # of masks, in pixels


def write_videos(root: Path, sequences: int, frames: int) -> None:
    """Two ellipses that drift and turn; the prediction lags, and is frayed at its edge."""
    rng = np.random.default_rng(0)
    for name in map("{:02d}".format, range(sequences)):
        center, speed = rng.uniform((200, 120), (650, 360), (2, 2)), rng.uniform(-3, 3, (2, 2))
        axes, turn = rng.uniform(30, 150, (2, 2)), rng.uniform(0, 180, 2)
        for t in range(frames):
            for side, lag in (("gt", 0), ("pred", 2)):
                mask = np.zeros(SIZE, np.uint8)
                for k in range(2):
                    at, angle = center[k] + (t - lag) * speed[k], turn[k] + 2 * (t - lag)
                    cv2.ellipse(mask, (at, 2 * axes[k], angle), k + 1, -1)
                if lag:
                    ys, xs = np.nonzero(cv2.Canny(mask * 100, 50, 100))
                    for y, x in zip(ys[::40], xs[::40], strict=True):
                        cv2.circle(mask, (int(x), int(y)), int(rng.integers(2, 12)), int(rng.integers(0, 3)), -1)
                write_mask(root / side / name / f"{t:05d}.png", mask)


def official_steps(root: Path) -> float:
    """J&F as davis2017-evaluation@ac7c43f computes it, step by step: whole frames, float64 stacks, Python loops."""
    from skimage.morphology import disk

    def stack(paths: list[Path]) -> np.ndarray:  # (objects, frames, H, W)
        ids = np.zeros((len(paths), *SIZE))
        for t, path in enumerate(paths):
            ids[t] = np.array(Image.open(path))
        objects = np.ones((int(ids.max()), *ids.shape)) * np.arange(1, ids.max() + 1)[:, None, None, None]
        return (objects == ids) > 0

    def boundary(mask: np.ndarray) -> np.ndarray:
        right, down, both = (np.zeros_like(mask) for _ in range(3))
        right[:, :-1], down[:-1], both[:-1, :-1] = mask[:, 1:], mask[1:], mask[1:, 1:]
        edge = mask ^ right | mask ^ down | mask ^ both
        edge[-1], edge[:, -1] = mask[-1] ^ right[-1], mask[:, -1] ^ down[:, -1]
        edge[-1, -1] = 0
        return edge

    def f_measure(pred: np.ndarray, gt: np.ndarray) -> float:
        footprint = disk(np.ceil(0.008 * np.linalg.norm(gt.shape))).astype(np.uint8)
        void = np.zeros_like(gt).astype(bool)
        edges = [boundary(mask * np.logical_not(void)) for mask in (pred, gt)]
        near = [cv2.dilate(edge.astype(np.uint8), footprint) for edge in edges]
        totals = [np.sum(edge) for edge in edges]
        if not all(totals):
            return float(totals[0] == totals[1])
        precision, recall = np.sum(edges[0] * near[1]) / totals[0], np.sum(edges[1] * near[0]) / totals[1]
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0

    scores = []
    for folder in sorted((root / "gt").iterdir()):
        names = sorted(path.name for path in folder.iterdir())
        gt = stack([folder / name for name in names])[:, 1:-1]
        pred = stack([root / "pred" / folder.name / name for name in names[1:-1]])
        for truth, guess in zip(gt, pred, strict=True):
            void = np.zeros_like(guess)
            both = np.sum((guess & truth) & np.logical_not(void), axis=(-2, -1))
            either = np.sum((guess | truth) & np.logical_not(void), axis=(-2, -1))
            j = np.where(either == 0, 1, both / np.maximum(either, 1))
            f = [f_measure(guess[t], truth[t]) for t in range(len(guess))]
            scores.append((j.mean() + np.mean(f)) / 2)
    return float(np.mean(scores))


def jandf_table(rounds: int, sequences: int, frames: int) -> list[str]:
    """Time the evaluators in turns; the start of worker processes is part of ours."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_videos(root, sequences, frames)

        def ours(workers: int) -> Callable[[], float]:
            return lambda: evaluate(root / "gt", root / "pred", workers=workers).global_results["J&F-Mean"]

        sides = {"official steps": lambda: official_steps(root), "1 worker": ours(1), "2 workers": ours(2)}
        values = {name: side() for name, side in sides.items()}  # also the warm-up
        assert max(values.values()) - min(values.values()) < 1e-9, values
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                before, start = sum(os.times()[:4]), time.perf_counter()
                side()
                times[name].append((time.perf_counter() - start, sum(os.times()[:4]) - before))
    scored = sequences * (frames - 2)
    lines = [
        f"| J&F of {SIZE[0]}x{SIZE[1]} px, 2 objects, {sequences} videos of {frames} frames | ms a frame | "
        "CPU ms a frame | times as fast | by CPU time |",
        "|---|---|---|---|---|",
    ]
    for name, runs in times.items():
        pairs = zip(times["official steps"], runs, strict=True)
        ratios = zip(*((p[0] / o[0], p[1] / o[1]) for p, o in pairs), strict=True)
        (wall, cpu), (faster, less) = map(statistics.median, zip(*runs, strict=True)), map(statistics.median, ratios)
        lines.append(f"| {name} | {1e3 * wall / scored:.2f} | {1e3 * cpu / scored:.2f} | {faster:.1f} | {less:.1f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns (default 3)")
    parser.add_argument("--sequences", type=int, default=16, help="to evaluate (default 16)")
    parser.add_argument("--frames", type=int, default=66, help="of each sequence (default 66, DAVIS' mean)")
    args = parser.parse_args()
    print(f"numpy {np.__version__}, OpenCV {cv2.__version__}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("\n".join(jandf_table(args.rounds, args.sequences, args.frames)))


if __name__ == "__main__":
    main()
