"""Semantic segmentation: the linear probe of a frozen encoder. Importing this package registers its classes."""

from .linear_probe import CheckedADE20KDataset, LinearProbe, LinearProbeHead

__all__ = ["CheckedADE20KDataset", "LinearProbe", "LinearProbeHead"]
