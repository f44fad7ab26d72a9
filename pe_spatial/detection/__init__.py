"""Detection in MMDetection: checked input, two-stage heads, DETA, augmentation, the swap. Importing it registers."""

from .coco import CheckedCocoDataset
from .deta import DETA, CanvasPreprocessor
from .deta_head import DETAFirstStageAssigner, DETAHead, DETASecondStageAssigner
from .deta_start import StartFromStage
from .deta_transforms import DETAJitter, ShortSideResize
from .deta_tta import DETATTA
from .heads import (
    Detectron2BBoxHead,
    Detectron2BoxCoder,
    Detectron2CascadeRoIHead,
    Detectron2MaxIoUAssigner,
    Detectron2RoIExtractor,
    Detectron2RPNHead,
    Float32Linear,
)
from .lvis import CheckedLVISDataset, FastLVISMetric, FederatedLoss, RepeatFactorSampler, SetClassWeights
from .objects365 import CheckedObjects365Dataset
from .swap import probe_backbone, swap_backbone
from .tta import BoxTTA

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
    "RepeatFactorSampler",
    "SetClassWeights",
    "ShortSideResize",
    "StartFromStage",
    "probe_backbone",
    "swap_backbone",
]
