"""LVIS v1: checked annotations, the federated loss, repeated sampling, and the metric. Importing it registers.

LVIS annotates each image for some classes only: those that have objects there, and those it lists as absent
(`neg_category_ids`). The metric ignores the others; the loss trains a few classes at a time.
"""

from pe_spatial.detection.lvis import dataset, federated_loss, metric, sampler

__all__ = ["dataset", "federated_loss", "metric", "sampler"]
