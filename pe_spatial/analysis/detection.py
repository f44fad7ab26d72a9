"""The report on one or two results of a detector."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools.coco import COCO

from pe_spatial.analysis.counts import Calibration, calibrate, confusion_matrix
from pe_spatial.analysis.figures import draw_calibration, draw_confusion, draw_curves, side_by_side
from pe_spatial.analysis.page import Page, less
from pe_spatial.analysis.precision import SUMMARY, Precision, difference_in_ap
from pe_spatial.analysis.results import Detection, match_scenes
from pe_spatial.analysis.tide import KINDS, ErrorCosts, count_errors
from pe_spatial.data.colors import palette
from pe_spatial.detection.report import IOU, SCORE, draw_pair, rank_by_errors

_SIDE = 420  # pixels of a drawn image
_CONFUSED = 12  # rows of the list below the matrix
_NOTES = {
    "AP": "Average precision in percent, by COCO's evaluation: over IoU 0.5 to 0.95, and by size (area below 32 x 32, "
    "below 96 x 96, above).",
    "errors": "What each kind of error costs: the AP50 that is gained if all errors of the kind are repaired and no "
    "others (TIDE, arXiv 2008.08115). classification: right box, wrong class; localization: right class, IoU of 0.1 "
    "to 0.5; both: wrong class and poor box; duplicate: of an object that a better detection has; background: no "
    "object there; missed: not detected. Costs do not add up.",
    "confusion": f"Objects by what was detected there, of detections with a score from {SCORE} and an IoU from {IOU}. "
    "The row of background holds detections without an object, its column missed objects.",
    "calibration": "Detections by score. On the dashed line a score is the probability to be right (an object of the "
    f"class, IoU from {IOU}); above it scores are too low, below it too high.",
}


@dataclass(frozen=True)
class Analysis:
    """What is known of one result."""

    precision: Precision
    errors: ErrorCosts
    confusion: np.ndarray
    calibration: Calibration


def analyze(truth: COCO, results: Sequence[Detection], *, masks: bool) -> Analysis:
    """Analyze the detections of a result, boxes or masks."""
    scenes = match_scenes(truth, results, masks=masks)
    precision = Precision(truth, results, masks=masks)
    return Analysis(precision, count_errors(scenes), confusion_matrix(scenes, sorted(truth.cats)), calibrate(scenes))


def write_page(
    truth: COCO,
    results: Mapping[str, Sequence[Detection]],
    *,
    masks: bool,
    images: str | None,
    worst: int,
    samples: int,
) -> tuple[str, list[str]]:
    """Return the report on one or two results, as HTML, and lines that summarize it.

    Args:
        truth: annotations.
        results: name -> detections.
        masks: analyze masks instead of boxes.
        images: folder of the images; without it none are drawn.
        worst: number of images to draw: those with the most errors.
        samples: of the bootstrap, for two results.
    """
    analyses = {name: analyze(truth, one, masks=masks) for name, one in results.items()}
    what = "masks" if masks else "boxes"
    counts = f"{len(truth.imgs)} images, {sum(not a['iscrowd'] for a in truth.anns.values())} objects"
    detections = ", ".join(f"{len(one)} detections of {name}" for name, one in results.items())
    page = Page(f"Analysis of {' and '.join(results)}", f"{what}; {counts}; {detections}")
    lines = _add_precision(page, analyses, samples)
    _add_errors(page, analyses)
    page.section("Precision and recall")
    page.image(draw_curves({name: one.precision.curve for name, one in analyses.items()}))
    _add_classes(page, analyses)
    page.section("Confusion", _NOTES["confusion"])
    names = [truth.cats[one]["name"] for one in sorted(truth.cats)]
    for name, one in analyses.items():
        page.image(draw_confusion(one.confusion, names), name)
        page.table(["annotated", "detected as", "times"], _most_confused(one.confusion, names))
    page.section("Calibration", _NOTES["calibration"])
    page.image(draw_calibration({name: one.calibration for name, one in analyses.items()}))
    if worst:
        _add_images(page, truth, results, images, worst)
    return page.html(), lines


def _add_precision(page: Page, analyses: Mapping[str, Analysis], samples: int) -> list[str]:
    page.section("Average precision", _NOTES["AP"])
    rows: list[list[Any]] = [[name, *_percent(one.precision.rows[0].values)] for name, one in analyses.items()]
    lines = [f"{name}: AP {row[1]:.1f}, AP50 {row[2]:.1f}" for name, *row in ((r[0], *r) for r in rows)]
    if len(analyses) == 2:
        first, second = analyses.values()
        rows.append(["difference", *(less(b, a) for a, b in zip(rows[0][1:], rows[1][1:], strict=True))])
        page.table(["", *SUMMARY], rows)
        if samples:
            found = difference_in_ap(first.precision, second.precision, samples=samples)
            line = found.sentence("AP", "images", scale=100)
            page.text(line)
            lines.append(line)
    else:
        page.table(["", *SUMMARY], rows)
    return lines


def _add_errors(page: Page, analyses: Mapping[str, Analysis]) -> None:
    page.section("Errors and their cost", _NOTES["errors"])
    header = ["error"]
    for name in analyses:
        header += [f"cost, {name}", "errors"]
    rows: list[list[Any]] = []
    for kind in KINDS:
        rows.append([kind])
        for one in analyses.values():
            rows[-1] += [one.errors.costs[kind], str(one.errors.counts[kind])]
    for label, key in (("all wrong detections", "false_positives"), ("all missed objects", "false_negatives")):
        rows.append([label])
        for one in analyses.values():
            rows[-1] += [getattr(one.errors, key), ""]
    page.table(header, rows)


def _add_classes(page: Page, analyses: Mapping[str, Analysis]) -> None:
    first, *others = (one.precision.rows[1:] for one in analyses.values())
    header = ["class", "objects", *SUMMARY]
    if not others:
        page.section("Classes", "Lowest AP first.")
        order = sorted(first, key=lambda row: row.values[0])
        page.table(header, [[row.name, str(row.objects), *_percent(row.values)] for row in order])
        return
    page.section("Classes", "AP of each, largest loss first.")
    rows: list[list[Any]] = []
    for a, b in zip(first, others[0], strict=True):
        one, two = _percent(a.values), _percent(b.values)
        rows.append([a.name, str(a.objects), one[0], two[0], less(two[0], one[0])])
    rows.sort(key=lambda row: row[4])
    page.table(["class", "objects", *analyses, "difference"], rows, changes=4)


def _add_images(
    page: Page, truth: COCO, results: Mapping[str, Sequence[Detection]], images: str | None, worst: int
) -> None:
    *_, last = results
    page.section("Worst images", f"Those with the most errors of {last}: missed objects and detections without one.")
    if images is None:
        page.text("Not drawn: the folder of the images is not known (--images).")
        return
    colors = dict(zip(sorted(truth.cats), palette(len(truth.cats)), strict=True))
    for image, errors in rank_by_errors(truth, results[last])[:worst]:
        pairs = [draw_pair(images, truth, one, image, colors, side=_SIDE) for one in results.values()]
        drawn = side_by_side([pairs[0][0], *(pair[1] for pair in pairs)])
        file = Path(truth.imgs[image]["file_name"])
        page.image(drawn, f"{file}: {errors} errors; annotated, {', '.join(results)}")


def _most_confused(counts: np.ndarray, names: Sequence[str]) -> list[list[str]]:
    labels = [*names, "background"]
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:_CONFUSED]
    cells = [np.unravel_index(place, wrong.shape) for place in order]
    return [[labels[i], labels[j], str(wrong[i, j])] for i, j in cells if wrong[i, j]]


def _percent(values: Sequence[float]) -> list[float | None]:
    return [None if value < 0 else 100 * value for value in values]
