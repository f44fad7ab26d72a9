"""The frames of a video that are worth a look: where masks change abruptly or the tracker is in doubt."""

from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

SPACES = 20
"""Two frames to check are at least this part of the video apart."""


class Keyframe(NamedTuple):
    """A frame to check: its number, its score (0 is good), the object that is worst there, and why."""

    frame: int
    score: float
    object_id: int
    reason: str


def choose_keyframes(
    mask: Callable[[int], np.ndarray],
    confidence: Mapping[int, Mapping[int, float]],
    frames: int,
    *,
    done: Collection[int] = (),
    count: int = 5,
) -> list[Keyframe]:
    """Return up to `count` frames, worst first, at some distance from each other and from those `done`.

    The score of an object on a frame is its change, 1 - IoU with its mask on the frame before, plus the tracker's
    doubt, 1 - confidence; that of a frame is its worst object's.

    Args:
        mask: frame number -> index mask (H, W).
        confidence: frame -> object -> 0 to 1.
        frames: number of frames.
        done: frames that were prompted or accepted.
        count: number of frames at most.
    """
    scored: list[Keyframe] = []
    before: np.ndarray | None = None
    for t in range(frames):
        now = mask(t)
        if t not in done:
            found = [_judge(t, i, now, before, value) for i, value in confidence.get(t, {}).items()]
            scored += [max(found, key=lambda one: one.score)] if found else []
        before = now
    distance = max(1, frames // SPACES)
    chosen: list[Keyframe] = []
    for one in sorted(scored, key=lambda one: -one.score):
        near = [*(other.frame for other in chosen), *done]
        if all(abs(one.frame - t) >= distance for t in near):
            chosen.append(one)
        if len(chosen) == count:
            break
    return chosen


def _judge(frame: int, object_id: int, now: np.ndarray, before: np.ndarray | None, confidence: float) -> Keyframe:
    change = 0.0
    if before is not None:
        first, second = before == object_id, now == object_id
        union = int((first | second).sum())
        change = 1 - int((first & second).sum()) / union if union else 0.0
    doubt = 1 - confidence
    reason = f"changes by {change:.0%}" if change >= doubt else f"confidence {confidence:.0%}"
    return Keyframe(frame, change + doubt, object_id, reason)
