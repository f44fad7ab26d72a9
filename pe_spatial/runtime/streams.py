"""A short video through a tracker: what a certificate compares, with PyTorch first and later with the runtime alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from pe_spatial.runtime.tracker import ExportedTracker
from pe_spatial.tracking.sam2.online import OnlineTracker
from pe_spatial.tracking.sam2.prompts import Prompt

FRAMES = 8


def moving_frames(side: int) -> np.ndarray:
    """Return colored waves that drift, (FRAMES, 3/4 side, side, 3) uint8."""
    y, x = np.mgrid[: side * 3 // 4, :side] / side
    waves = [
        np.stack([np.sin(17 * x - t / 3 + channel) * np.cos(13 * y + channel * t / 4) for channel in range(3)], -1)
        for t in range(FRAMES)
    ]
    return (127 + 100 * np.stack(waves)).astype(np.uint8)


def track_frames(tracker: OnlineTracker, frames: np.ndarray) -> np.ndarray:
    """Track a square from its mask, a place from a click, and a box that comes later; return (T, 3, H, W) bool."""
    height, width = frames.shape[1:3]
    square = np.zeros((height, width), bool)
    square[height // 4 : height // 2, width // 4 : width // 2] = True
    start = {1: Prompt(mask=square), 2: Prompt(points=[(width * 0.7, height * 0.4)], labels=[1])}
    later = {3: Prompt(box=(width * 0.1, height * 0.6, width * 0.5, height * 0.9))}
    prompts: Mapping[int, Mapping[int, Prompt]] = {0: start, 2: later}
    masks = np.zeros((len(frames), 3, height, width), bool)
    for t, frame in enumerate(frames):
        for i, mask in tracker.step(frame, prompts.get(t)).items():
            masks[t, i - 1] = mask.cpu() if hasattr(mask, "cpu") else mask
    return masks


def smallest_iou(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the smallest IoU of a mask, of (T, N, H, W) bool; 1 where both are empty."""
    union = (ours | theirs).sum((2, 3))
    both = (ours & theirs).sum((2, 3))
    return float(np.where(union > 0, both / np.maximum(union, 1), 1.0).min())


def stream_problems(iou: float, limits: Mapping[str, float]) -> list[str]:
    """Return a sentence if the smallest IoU of a mask is below its limit."""
    return [f"a mask of the video has IoU {iou:.3f} (limit {limits['iou']:g})"] if iou < limits.get("iou", 0) else []


def verify_tracker(folder: Path, reference: Mapping[str, np.ndarray], *, backend: str | None) -> float:
    """Track the video of a certificate again; return the smallest IoU of a mask with PyTorch's."""
    theirs = np.unpackbits(reference["masks"], count=int(reference["shape"].prod())).reshape(reference["shape"])
    tracker = ExportedTracker(folder, backend=backend).start(non_overlapping=False)
    return smallest_iou(track_frames(tracker, reference["frames"]), theirs.astype(bool))
