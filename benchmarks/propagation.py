"""Measure label propagation against the steps of the released script, in the same run.

Both sides take turns and must agree; ratios are medians of the ratios of neighboring frames. The peer is written here,
step by step, from facebookresearch/dino@7c446df:eval_video_segmentation.py.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from pe_spatial.tracking.propagation import LabelPropagation

GRID, WIDTH, LABELS = (30, 53), 768, 3  # 480p in patches of 16 px; channels of B; background and two objects
CONTEXT, RADIUS, TOPK, TEMPERATURE = 7, 12, 5, 0.1  # the first frame beside the context makes eight


def four_deep_neighborhood(h: int, w: int) -> Tensor:
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
    loop, near = cpu_seconds(lambda: four_deep_neighborhood(*GRID))
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
    parser.add_argument("--frames", type=int, default=10, help="to time in turns (default 10)")
    parser.add_argument("--long", type=int, default=1000, help="frames of the long video (default 1000)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {platform.machine()}, one thread\n")
    print("\n".join(propagation_table(args.frames, args.long)))


if __name__ == "__main__":
    main()
