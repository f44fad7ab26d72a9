"""What each kind of error costs, by TIDE (Bolya et al., ECCV 2020), with the numbers of tidecv 1.0.1.

A detection that matches no object of its class (IoU of 0.5) is one of: *localization* (IoU of 0.1 to 0.5 with an object
of its class), *classification* (IoU of 0.5 with one of another class), *duplicate* (of an object that a better
detection has), *background* (IoU below 0.1 with all), or *both* (wrong class and poor box). An object that no detection
has, and none of the first two kinds points at, is *missed*. The cost of a kind is the AP (at an IoU of 0.5, in percent)
that is gained if an oracle repairs all errors of that kind and nothing else.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pe_spatial.analysis.results import Scene

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
_NONE, _CLASS, _BOX, _BOTH, _DUPLICATE, _BACKGROUND = -1, 0, 1, 2, 3, 4
_RECALLS = np.arange(101) / 100


@dataclass(frozen=True)
class ErrorCosts:
    """The errors of a result.

    Attributes:
        ap: AP50 in percent, by TIDE's rules: a class without objects that has detections counts as 0.
        costs: kind -> points of `ap` that repairing it gains.
        counts: kind -> number of errors.
        false_positives: gain if all wrong detections had the lowest score, all right ones the highest.
        false_negatives: gain if no missed object counted.
    """

    ap: float
    costs: Mapping[str, float]
    counts: Mapping[str, int]
    false_positives: float
    false_negatives: float


@dataclass
class _Judged:
    """Detections of all images, one entry each in the order of images and scores."""

    category: np.ndarray
    score: np.ndarray
    correct: np.ndarray
    ignored: np.ndarray  # wrong, but in a crowd
    kind: np.ndarray
    repaired: np.ndarray  # category of the object that it gets when repaired, or _NONE
    objects: Counter[int]
    missed: Counter[int]  # objects of errors 'missed'
    unmatched: Counter[int]


def count_errors(scenes: Sequence[Scene], *, iou: float = 0.5, background: float = 0.1) -> ErrorCosts:
    """Find the errors of detections, and what each kind costs."""
    judged = _judge(scenes, iou, background)
    natural = ~judged.ignored
    ap = _mean_ap(judged.category[natural], judged.score[natural], judged.correct[natural], judged.objects)
    costs = {kind: max(_repair(judged, i) - ap, 0.0) for i, kind in enumerate(KINDS)}
    kinds = Counter(judged.kind.tolist())
    counts = {kind: kinds[i] for i, kind in enumerate(KINDS[:-1])} | {"missed": judged.missed.total()}
    order = _errors_first(judged)
    order = order[~judged.ignored[order]]
    correct, category = judged.correct[order], judged.category[order]
    perfect = _mean_ap(category, correct.astype(float), correct, judged.objects)
    complete = _mean_ap(category, judged.score[order], correct, judged.objects - judged.unmatched)
    return ErrorCosts(ap, costs, counts, perfect - ap, complete - ap)


def _judge(scenes: Sequence[Scene], threshold: float, background: float) -> _Judged:
    rows: list[tuple[Any, ...]] = []
    objects, missed, unmatched = Counter[int](), Counter[int](), Counter[int]()
    for scene in scenes:
        detected = np.array([one["category_id"] for one in scene.detections], int)
        wanted = np.array([one["category_id"] for one in scene.objects], int)
        same = detected[:, None] == wanted
        right, taken = _match(scene.iou * same, threshold)
        crowds = np.array([one["category_id"] for one in scene.crowds], int)
        inside = ~right & ((scene.crowd_iou > threshold) & (detected[:, None] == crowds)).any(1)
        targeted = np.zeros(len(wanted), bool)
        for i, one in enumerate(scene.detections):
            error, target = (_NONE, _NONE) if right[i] else _kind(i, scene.iou, same, taken, threshold, background)
            gets = _NONE
            if target != _NONE and not taken[target] and not targeted[target]:
                targeted[target], gets = True, wanted[target]
            rows.append((detected[i], one["score"], right[i], inside[i], error, gets))
        objects.update(wanted.tolist())
        unmatched.update(wanted[~taken].tolist())
        missed.update(wanted[~taken & ~targeted].tolist())
    types = (int, float, bool, bool, int, int)
    columns: Iterator[np.ndarray]
    columns = (np.array(column, kind) for column, kind in zip(zip(*rows, strict=True), types, strict=True))
    category, score, correct, ignored, kinds, repaired = columns
    return _Judged(category, score, correct, ignored, kinds, repaired, objects, missed, unmatched)


def _match(iou: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Give each detection, best first, the free object it overlaps most; return (correct, taken)."""
    correct, taken = np.zeros(iou.shape[0], bool), np.zeros(iou.shape[1], bool)
    if iou.shape[1]:
        free = iou.copy()
        for i, overlaps in enumerate(free):
            j = overlaps.argmax()
            if overlaps[j] >= threshold:
                correct[i] = taken[j] = True
                free[:, j] = 0
    return correct, taken


def _kind(
    i: int, iou: np.ndarray, same: np.ndarray, taken: np.ndarray, threshold: float, background: float
) -> tuple[int, int]:
    """Return the kind of the error that detection `i` is, and the object that it points at, or _NONE."""
    if not iou.shape[1]:
        return _BACKGROUND, _NONE
    own, other = iou[i] * same[i], iou[i] * ~same[i]
    if background <= own.max() <= threshold:
        return _BOX, int(own.argmax())
    if other.max() >= threshold:
        return _CLASS, int(other.argmax())
    if (own * taken).max() >= threshold:
        return _DUPLICATE, _NONE
    return (_BACKGROUND if iou[i].max() <= background else _BOTH), _NONE


def _errors_first(judged: _Judged) -> np.ndarray:
    """Return the order of detections after a repair, which decides between equal scores."""
    return np.concatenate([np.flatnonzero(~judged.correct), np.flatnonzero(judged.correct)])


def _repair(judged: _Judged, kind: int) -> float:
    """Return the AP without the errors of a kind: repaired, or else removed."""
    if KINDS[kind] == "missed":
        order = _errors_first(judged)
        order = order[~judged.ignored[order]]
        objects = judged.objects - judged.missed
        return _mean_ap(judged.category[order], judged.score[order], judged.correct[order], objects)
    these = judged.kind == kind
    category = np.where(these & (judged.repaired != _NONE), judged.repaired, judged.category)
    correct = judged.correct | (these & (judged.repaired != _NONE))
    kept = np.where(these, judged.repaired != _NONE, ~judged.ignored)
    order = _errors_first(judged)
    order = order[kept[order]]
    return _mean_ap(category[order], judged.score[order], correct[order], judged.objects)


def _mean_ap(category: np.ndarray, score: np.ndarray, correct: np.ndarray, objects: Counter[int]) -> float:
    """Return the mean over the classes that have detections or objects, in percent."""
    classes = set(category.tolist()) | set(+objects)
    if not classes:
        return 0.0
    values = [_ap(score[category == one], correct[category == one], objects[one]) for one in sorted(classes)]
    return 100 * sum(values) / len(values)


def _ap(score: np.ndarray, correct: np.ndarray, objects: int) -> float:
    """Return the average precision of one class over 101 recalls."""
    if not objects or not len(score):
        return 0.0
    right = correct[np.argsort(-score, kind="stable")].cumsum()
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    places = np.searchsorted(right / objects, _RECALLS, side="left")
    return float(np.append(precision, 0.0)[np.minimum(places, len(precision))].mean())
