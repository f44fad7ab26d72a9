"""Detection in MMDetection: checked input, two-stage heads, DETA, augmentation. Importing it registers."""

import pe_spatial.detection.planning  # noqa: F401  (registers)
from pe_spatial.detection.coco import CheckedCocoDataset
from pe_spatial.detection.deta import (
    DETA,
    DETATTA,
    CanvasPreprocessor,
    DETAFirstStageAssigner,
    DETAHead,
    DETAJitter,
    DETASecondStageAssigner,
    LoadPreviousStage,
    ShortSideResize,
)
from pe_spatial.detection.heads import (
    Detectron2BBoxHead,
    Detectron2BoxCoder,
    Detectron2CascadeRoIHead,
    Detectron2MaxIoUAssigner,
    Detectron2RoIExtractor,
    Detectron2RPNHead,
    Float32Linear,
)
from pe_spatial.detection.lvis import (
    CheckedLVISDataset,
    FastLVISMetric,
    FederatedLoss,
    RepeatFactorSampler,
    SetClassWeights,
)
from pe_spatial.detection.objects365 import CheckedObjects365Dataset
from pe_spatial.detection.tta import BoxTTA

__all__ = [
    "DETA",
    "DETATTA",
    "BoxTTA",
    "CanvasPreprocessor",
    "CheckedCocoDataset",
    "CheckedLVISDataset",
    "CheckedObjects365Dataset",
    "DETAFirstStageAssigner",
    "DETAHead",
    "DETAJitter",
    "DETASecondStageAssigner",
    "Detectron2BBoxHead",
    "Detectron2BoxCoder",
    "Detectron2CascadeRoIHead",
    "Detectron2MaxIoUAssigner",
    "Detectron2RPNHead",
    "Detectron2RoIExtractor",
    "FastLVISMetric",
    "FederatedLoss",
    "Float32Linear",
    "LoadPreviousStage",
    "RepeatFactorSampler",
    "SetClassWeights",
    "ShortSideResize",
]
