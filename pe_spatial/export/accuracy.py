"""COCO's AP of a predictor of any runtime, on given annotations."""

from __future__ import annotations

import io
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

    Raises DatasetError for a file in another form, and for categories that the model does not have.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with redirect_stdout(io.StringIO()):
        try:
            truth = COCO(str(annotations))
            by_name = {category["name"]: category["id"] for category in truth.dataset["categories"]}
        except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
            text = f"{annotations} holds no annotations in COCO's form ({reason}); give such a JSON file"
            raise DatasetError(text) from error
        missing = [name for name in by_name if name not in predictor.class_names]
        if missing:
            raise DatasetError(f"{annotations} has the category {missing[0]!r}, which the model does not have")
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
