"""Monocular depth: data, heads, losses, metrics, inference. Importing this package registers its classes."""

import pe_spatial.engine.loading  # noqa: F401  (registers LoadCheckedImage)

from .datasets import DepthPairDataset
from .dpt import DPTDepthHead
from .estimator import DepthEstimator
from .heads import BinsDepthHead
from .losses import GradientLoss, ScaleAndShiftInvariantLoss, SigLoss, SiLog
from .metrics import CheckedDepthMetric
from .transforms import (
    DepthColorAug,
    DepthCrop,
    DepthPreprocessor,
    DepthRandomCrop,
    DepthRandomFlip,
    DepthRandomRotate,
    LoadDepth,
    PackDepthInputs,
)

__all__ = [
    "BinsDepthHead",
    "CheckedDepthMetric",
    "DPTDepthHead",
    "DepthColorAug",
    "DepthCrop",
    "DepthEstimator",
    "DepthPairDataset",
    "DepthPreprocessor",
    "DepthRandomCrop",
    "DepthRandomFlip",
    "DepthRandomRotate",
    "GradientLoss",
    "LoadDepth",
    "PackDepthInputs",
    "ScaleAndShiftInvariantLoss",
    "SiLog",
    "SigLoss",
]
