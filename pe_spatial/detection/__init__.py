"""Detection in MMDetection: checked input, two-stage heads, DETA, LVIS, augmentation. Importing it registers them."""

import io
from contextlib import redirect_stdout

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)

with redirect_stdout(io.StringIO()):  # MMDetection prints which optional package it lacks
    from pe_spatial.detection import (
        coco,
        coco_metric,
        deta,
        drawing,
        heads,
        lvis,
        objects365,
        planning,
        report,
        resize,
        ssd,
        text_classifier,
        tta,
    )

__all__ = [
    "coco", "coco_metric", "deta", "drawing", "heads", "lvis", "objects365", "planning", "report", "resize",
    "ssd", "text_classifier", "tta",
]  # fmt: skip
