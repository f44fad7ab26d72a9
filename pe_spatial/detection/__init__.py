"""Detection in MMDetection: checked COCO input, heads, test-time augmentation. Importing this registers them."""

from .coco import CheckedCocoDataset, LoadPicture
from .heads import Float32Linear, Float32RPNHead
from .tta import BoxTTA

__all__ = ["BoxTTA", "CheckedCocoDataset", "Float32Linear", "Float32RPNHead", "LoadPicture"]
