"""Detection in MMDetection: checked input, two-stage heads, DETA, LVIS, augmentation. Importing it registers them."""

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
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
