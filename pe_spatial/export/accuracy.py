"""COCO's AP of a predictor of any runtime, on given annotations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pe_spatial.errors import DatasetError


def average_precision(predictor: Any, annotations: Path, images: Path) -> dict[str, float]:
    """Return 'box AP', and 'mask AP' for a detector with masks, from 0 to 1.

    Args:
        predictor: takes a path and returns `Detections`.
        annotations: a JSON file in COCO's form; its categories are found by name.
        images: the folder of its files.

    Raises DatasetError as `read_annotations` does.
    """
    from pycocotools.cocoeval import COCOeval

    truth, by_name = read_annotations(annotations, predictor.class_names)
    with redirect_stdout(io.StringIO()):
        ids = [by_name.get(name, -1) for name in predictor.class_names]
        results: list[dict[str, Any]] = []
        for number, image in truth.imgs.items():
            results += predictor(images / image["file_name"]).to_coco(number, ids)
        values = {}
        for kind, name in (("bbox", "box AP"), ("segm", "mask AP")):
            if results and (kind == "bbox" or "segmentation" in results[0]):
                scores = COCOeval(truth, truth.loadRes([dict(one) for one in results]), kind)
                scores.evaluate()
                scores.accumulate()
                scores.summarize()
                values[name] = float(scores.stats[0])
    return values or {"box AP": 0.0}


def read_annotations(path: Path, class_names: Sequence[str]) -> tuple[Any, dict[str, int]]:
    """Return the `pycocotools.COCO` of a file, and the category of each class.

    Raises DatasetError for a file in another form, and for categories that are not among `class_names`.
    """
    from pycocotools.coco import COCO

    try:
        with redirect_stdout(io.StringIO()):
            truth = COCO(str(path))
        by_name = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise DatasetError(f"{path} holds no annotations in COCO's form ({reason}); give such a JSON file") from error
    missing = [name for name in by_name if name not in class_names]
    if missing:
        raise DatasetError(f"{path} has the category {missing[0]!r}, which the model does not have")
    return truth, by_name
