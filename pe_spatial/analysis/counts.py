"""What detections are confused with, and whether their scores are probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pe_spatial.analysis.results import Scene
from pe_spatial.detection.report import IOU, SCORE

BINS = 10


def confusion_matrix(scenes: Sequence[Scene], categories: Sequence[int]) -> np.ndarray:
    """Count objects (rows) by what was detected there (columns), as (classes + 1, classes + 1); the last is background.

    Detections from a score of `SCORE` on and objects of any class are matched one to one from an IoU of `IOU` on,
    highest first. Detections inside of a crowd do not count as wrong.
    """
    place = {category: i for i, category in enumerate(categories)}
    background = len(categories)
    counts = np.zeros((background + 1, background + 1), int)
    for scene in scenes:
        number = sum(one["score"] >= SCORE for one in scene.detections)
        iou = scene.iou[:number].copy()
        free, missed = set(range(number)), set(range(len(scene.objects)))
        while iou.size and iou.max() >= IOU:
            i, j = divmod(int(iou.argmax()), iou.shape[1])
            counts[place[scene.objects[j]["category_id"]], place[scene.detections[i]["category_id"]]] += 1
            free.discard(i)
            missed.discard(j)
            iou[i], iou[:, j] = 0, 0
        for j in missed:
            counts[place[scene.objects[j]["category_id"]], background] += 1
        for i in free:
            if not (scene.crowd_iou[i] >= IOU).any():
                counts[background, place[scene.detections[i]["category_id"]]] += 1
    return counts


@dataclass(frozen=True)
class Calibration:
    """Detections in `BINS` equal bins of their score.

    Attributes:
        score: (BINS,) mean score; nan for an empty bin.
        precision: (BINS,) share that matches an object of the class.
        count: (BINS,) number of detections.
        error: mean distance of score and precision, weighted with the counts (the expected calibration error).
    """

    score: np.ndarray
    precision: np.ndarray
    count: np.ndarray
    error: float


def calibrate(scenes: Sequence[Scene]) -> Calibration:
    """Compare the scores of detections with how many are right: an object of their class with an IoU of `IOU`.

    Each object is found once, by its best detection. Detections inside of a crowd are left out.
    """
    scores, right = [], []
    for scene in scenes:
        free = set(range(len(scene.objects)))
        for i, one in enumerate(scene.detections):
            fits = [j for j in free if scene.iou[i, j] >= IOU and scene.objects[j]["category_id"] == one["category_id"]]
            if not fits and (scene.crowd_iou[i] >= IOU).any():
                continue
            if fits:
                free.discard(max(fits, key=lambda j: scene.iou[i, j]))
            scores.append(one["score"])
            right.append(bool(fits))
    place = np.clip((np.array(scores) * BINS).astype(int), 0, BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        score = np.bincount(place, scores, BINS) / count
        precision = np.bincount(place, right, BINS) / count
    error = float(np.nansum(np.abs(score - precision) * count) / max(count.sum(), 1))
    return Calibration(score, precision, count, error)
