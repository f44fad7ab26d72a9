"""Semantic segmentation: the linear probe of a frozen encoder. Importing this package registers its classes."""

from pe_spatial.segmentation import linear_probe  # noqa: F401
