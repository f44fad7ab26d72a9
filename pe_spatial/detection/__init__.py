"""Detection in MMDetection: checked COCO input, heads, test-time augmentation. Importing this registers them."""

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
from .tta import BoxTTA

__all__ = [
    "BoxTTA",
    "CheckedCocoDataset",
    "Detectron2BBoxHead",
    "Detectron2BoxCoder",
    "Detectron2CascadeRoIHead",
    "Detectron2MaxIoUAssigner",
    "Detectron2RPNHead",
    "Detectron2RoIExtractor",
    "Float32Linear",
    "LoadPicture",
]
