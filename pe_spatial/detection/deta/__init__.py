"""DETA: detector, head, transforms, test-time augmentation, training in stages. Importing it registers."""

from pe_spatial.detection.deta import assigners, detector, head, stages, transforms, tta

__all__ = ["assigners", "detector", "head", "stages", "transforms", "tta"]
