"""LVIS v1: checked annotations, the federated loss, repeated sampling, and the metric. Importing it registers.

LVIS annotates each image for some classes only: those that have objects there, and those it lists as absent
(`neg_category_ids`). The metric ignores the others; the loss trains a few classes at a time.
"""

from pe_spatial.detection.lvis.dataset import CheckedLVISDataset, read_lvis
from pe_spatial.detection.lvis.federated_loss import FederatedLoss, SetClassWeights
from pe_spatial.detection.lvis.metric import FastLVISMetric
from pe_spatial.detection.lvis.sampler import RepeatFactorSampler, repeat_factors

__all__ = [
    "CheckedLVISDataset",
    "FastLVISMetric",
    "FederatedLoss",
    "RepeatFactorSampler",
    "SetClassWeights",
    "read_lvis",
    "repeat_factors",
]
