"""DETA: detector, head, transforms, test-time augmentation, training in stages. Importing it registers."""

from pe_spatial.detection.deta.assigners import DETAFirstStageAssigner, DETASecondStageAssigner
from pe_spatial.detection.deta.detector import DETA, CanvasPreprocessor
from pe_spatial.detection.deta.head import DETAHead
from pe_spatial.detection.deta.stages import LoadPreviousStage
from pe_spatial.detection.deta.transforms import DETAJitter, ShortSideResize
from pe_spatial.detection.deta.tta import DETATTA

__all__ = [
    "DETA",
    "DETATTA",
    "CanvasPreprocessor",
    "DETAFirstStageAssigner",
    "DETAHead",
    "DETAJitter",
    "DETASecondStageAssigner",
    "LoadPreviousStage",
    "ShortSideResize",
]
