"""Average precision of a result by class and size, its curves, and the difference of two results."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pe_spatial.analysis.interval import Difference, bootstrap
from pe_spatial.analysis.results import Detection
from pe_spatial.detection.report import evaluate_coco, mean_precision

SUMMARY = ("AP", "AP50", "AP75", "small", "medium", "large")


@dataclass(frozen=True)
class ClassPrecision:
    """A class, or all of them: the values of `SUMMARY`, 0 to 1, -1 where there are no objects."""

    name: str
    objects: int
    values: tuple[float, ...]


class Precision:
    """COCO's evaluation of one result.

    Args:
        truth: annotations.
        results: detections.
        masks: evaluate masks instead of boxes.

    Attributes:
        rows: all classes first, then each class that has objects.
        curve: precision (101,) at the recalls 0, 0.01 ... 1, mean over the classes, at IoU of 0.5 and 0.75 and the mean
            over all IoU: (3, 101).
    """

    def __init__(self, truth: COCO, results: Sequence[Detection], *, masks: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation = evaluate_coco(truth, results, "segm" if masks else "bbox", sorted(truth.cats))
        precision = evaluation.eval["precision"][..., -1]  # (IoU, recall, class, area), of 100 detections
        counts = [
            sum(not a["iscrowd"] for a in truth.loadAnns(truth.getAnnIds(catIds=[one]))) for one in sorted(truth.cats)
        ]
        self.rows = [ClassPrecision("all classes", sum(counts), _summarize(precision))]
        for i, one in enumerate(sorted(truth.cats)):
            if counts[i]:
                values = _summarize(precision[:, :, i : i + 1])
                self.rows.append(ClassPrecision(truth.cats[one]["name"], counts[i], values))
        known = precision[..., 0][:, :, (precision[0, 0, :, 0] > -1)]  # (IoU, recall, class)
        self.curve = np.stack([known[0].mean(-1), known[5].mean(-1), known.mean((0, -1))])
        self._evaluation = evaluation

    def by_class(self) -> list["ClassMatches"]:
        """Return what bootstrapping needs of each class."""
        return _class_matches(self._evaluation)


def _summarize(precision: np.ndarray) -> tuple[float, ...]:
    of_all, sizes = precision[..., 0], (precision[..., i] for i in (1, 2, 3))
    return tuple(mean_precision(values) for values in (of_all, of_all[:1], of_all[5:6], *sizes))


@dataclass(frozen=True)
class ClassMatches:
    """The detections of a class over all images, highest score first.

    Attributes:
        image: (D,) index of the image.
        right: (IoU, D) whether it matches an object.
        wrong: (IoU, D) whether it matches none; neither for those that crowds swallow.
        objects: (images,) objects in each image.
    """

    image: np.ndarray
    right: np.ndarray
    wrong: np.ndarray
    objects: np.ndarray

    def average_precision(self, weight: np.ndarray) -> float:
        """Return COCO's AP where each image counts `weight` (images,) times; -1 without objects."""
        objects = float(weight @ self.objects)
        if not objects:
            return -1.0
        times = weight[self.image]
        right, wrong = (self.right * times).cumsum(1), (self.wrong * times).cumsum(1)
        precision = right / np.maximum(right + wrong, np.spacing(1))
        precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        recalls = np.linspace(0, 1, 101)
        total = 0.0
        for row, values in zip(right / objects, precision, strict=True):
            places = np.searchsorted(row, recalls, side="left")
            total += values[places[places < len(values)]].sum()
        return total / (101 * len(right))


def _class_matches(evaluation: COCOeval) -> list[ClassMatches]:
    images, areas = len(evaluation.params.imgIds), len(evaluation.params.areaRng)
    found = []
    for k in range(len(evaluation.params.catIds)):
        cells = evaluation.evalImgs[k * areas * images :][:images]  # of the first area, all sizes
        filled = [(i, cell) for i, cell in enumerate(cells) if cell is not None]
        if not filled:
            continue
        objects = np.zeros(images)
        for i, cell in filled:
            objects[i] = np.sum(~np.asarray(cell["gtIgnore"], bool))
        scores = np.concatenate([cell["dtScores"] for _, cell in filled])
        order = np.argsort(-scores, kind="stable")
        matched = np.concatenate([cell["dtMatches"] for _, cell in filled], axis=1)[:, order] > 0
        ignored = np.concatenate([cell["dtIgnore"] for _, cell in filled], axis=1)[:, order] > 0
        image = np.concatenate([np.full(len(cell["dtScores"]), i) for i, cell in filled])[order]
        found.append(ClassMatches(image.astype(int), matched & ~ignored, ~matched & ~ignored, objects))
    return found


def difference_in_ap(first: Precision, second: Precision, *, samples: int) -> Difference:
    """Return the AP of the second result less that of the first, with the interval of a bootstrap over the images."""
    one, other = first.by_class(), second.by_class()

    def difference(weight: np.ndarray) -> float:
        means = [mean_precision(np.array([c.average_precision(weight) for c in side])) for side in (one, other)]
        return means[1] - means[0]

    return bootstrap(difference, len(first._evaluation.params.imgIds), samples=samples)
