"""Detection in MMDetection: checked COCO and LVIS input, heads, augmentation, the swap. Importing it registers them."""

from .coco import CheckedCocoDataset, LoadPicture
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
from .swap import probe_backbone, swap_backbone
from .tta import BoxTTA

__all__ = [
    "BoxTTA",
    "CheckedCocoDataset",
    "CheckedLVISDataset",
    "Detectron2BBoxHead",
    "Detectron2BoxCoder",
    "Detectron2CascadeRoIHead",
    "Detectron2MaxIoUAssigner",
    "Detectron2RPNHead",
    "Detectron2RoIExtractor",
    "FastLVISMetric",
    "FederatedLoss",
    "Float32Linear",
    "LoadPicture",
    "RepeatFactorSampler",
    "SetClassWeights",
    "probe_backbone",
    "swap_backbone",
]
