"""Measure J&F and label propagation against straightforward forms of their published code, in the same run.

Both sides take turns and must agree; ratios are medians of the ratios of neighbouring runs. The peers are written here
step by step from davisvideochallenge/davis2017-evaluation@ac7c43f and facebookresearch/dino@7c446df:
eval_video_segmentation.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pe_spatial.tracking.evaluation import evaluate
from pe_spatial.tracking.masks import write_mask
from pe_spatial.tracking.propagation import LabelPropagation

SIZE = (480, 854)  # of masks, in pixels
GRID, WIDTH, LABELS = (30, 53), 768, 3  # 480p in patches of 16 px; channels of B; background and two objects
CONTEXT, RADIUS, TOPK, TEMPERATURE = 7, 12, 5, 0.1  # the first frame beside the context makes eight


def write_videos(root: Path, sequences: int, frames: int) -> None:
    """Two ellipses that drift and turn; the prediction lags, and is frayed at its edge."""
    rng = np.random.default_rng(0)
    for name in map("{:02d}".format, range(sequences)):
        centre, speed = rng.uniform((200, 120), (650, 360), (2, 2)), rng.uniform(-3, 3, (2, 2))
        axes, turn = rng.uniform(30, 150, (2, 2)), rng.uniform(0, 180, 2)
        for t in range(frames):
            for side, lag in (("gt", 0), ("pred", 2)):
                mask = np.zeros(SIZE, np.uint8)
                for k in range(2):
                    at, angle = centre[k] + (t - lag) * speed[k], turn[k] + 2 * (t - lag)
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


def four_deep_neighbourhood(h: int, w: int) -> Tensor:
    """Return which patches each patch may see, (h * w, h * w), by the script's four loops."""
    mask = torch.zeros(h, w, h, w)
    for i in range(h):
        for j in range(w):
            for p in range(i - RADIUS, i + RADIUS + 1):
                for q in range(j - RADIUS, j + RADIUS + 1):
                    if 0 <= p < h and 0 <= q < w:
                        mask[i, j, p, q] = 1
    return mask.reshape(h * w, h * w)


def dense_step(features: Tensor, keys: Tensor, labels: Tensor, near: Tensor) -> Tensor:
    """Propagate one frame by the script's steps: features (C, h, w), keys (n, C, hw), labels (n, K, h, w)."""
    query = F.normalize(features.flatten(1).T, dim=1).expand(len(keys), -1, -1)
    affinity = torch.exp(torch.bmm(query, F.normalize(keys, dim=1)) / TEMPERATURE) * near
    affinity = affinity.transpose(2, 1).reshape(-1, query.shape[1])
    affinity[affinity < affinity.topk(TOPK, dim=0)[0].amin(0)] = 0
    affinity /= affinity.sum(0)
    return (labels.flatten(2).transpose(1, 2).flatten(0, 1).T @ affinity).unflatten(1, features.shape[1:])


def random_frames() -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(WIDTH, *GRID, generator=generator)


def cpu_seconds(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.process_time()  # of one thread: what else the machine does counts less
    result = call()
    return time.process_time() - start, result


def propagation_table(frames: int, long: int) -> list[str]:
    """Time one frame after the other in turns, from where the context is full; then `long` frames of ours alone."""
    stream = random_frames()
    soft = F.one_hot(torch.arange(GRID[0] * GRID[1]) % LABELS, LABELS).T.unflatten(1, GRID).float()
    ours = LabelPropagation(context=CONTEXT, radius=RADIUS, topk=TOPK, temperature=TEMPERATURE)
    first = next(stream)
    ours.start(first, soft)
    loop, near = cpu_seconds(lambda: four_deep_neighbourhood(*GRID))
    queue: list[tuple[Tensor, Tensor]] = []
    times = []
    for _ in range(CONTEXT + frames):
        x = next(stream)
        used = [(first.flatten(1), soft), *queue]
        keys, labels = (torch.stack(part) for part in zip(*used, strict=True))
        peer, expected = cpu_seconds(lambda: dense_step(x, keys, labels, near))  # noqa: B023
        own, got = cpu_seconds(lambda: ours.step(x))  # noqa: B023
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
        queue = [*queue, (x.flatten(1), expected)][-CONTEXT:]
        if len(used) == CONTEXT + 1:
            times.append((peer, own))
    peer, own = (statistics.median(side) for side in zip(*times, strict=True))
    shared = loop / 67 + peer  # the loops once for a video of 67 frames, DAVIS' mean
    lines = [
        f"| propagation, {GRID[0]}x{GRID[1]} patches, {WIDTH} channels, 8 context frames "
        "| CPU ms a frame | times as fast |",
        "|---|---|---|",
        f"| the script: four loops ({loop:.1f} s), then dense products | {1e3 * (loop + peer):.0f} | 1 |",
        f"| the same, loops once for a video of 67 frames | {1e3 * shared:.0f} | {(loop + peer) / shared:.1f} |",
        f"| ours | {1e3 * own:.0f} | {(loop + peer) / own:.1f}; {shared / own:.1f} in such a video; "
        f"{statistics.median(p / o for p, o in times):.1f} without the loops |",
    ]
    spent, memory = [], []
    for _ in range(long):
        x = next(stream)
        spent.append(cpu_seconds(lambda: ours.step(x))[0])  # noqa: B023
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    tenths = [statistics.median(spent[i : i + long // 10]) * 1e3 for i in range(0, long, long // 10)]
    lines += ["", f"{long} more frames, medians of tenths: {', '.join(f'{t:.0f}' for t in tenths)} ms; peak resident "]
    lines[-1] += f"size {memory[0]} MiB after the first, {memory[-1]} MiB after the last"
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of the evaluators (default 3)")
    parser.add_argument("--sequences", type=int, default=16, help="to evaluate (default 16)")
    parser.add_argument("--frames", type=int, default=66, help="of each sequence (default 66, DAVIS' mean)")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long video (default 1000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, numpy {np.__version__}, OpenCV {cv2.__version__}"
    print(f"{versions}, {platform.machine()}, {os.cpu_count()} cores\n")
    print("\n".join(jandf_table(args.rounds, args.sequences, args.frames)), flush=True)
    print("\n" + "\n".join(propagation_table(10, args.long)))


if __name__ == "__main__":
    main()
