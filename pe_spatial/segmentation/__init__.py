"""Semantic segmentation: the linear probe of a frozen encoder, own data. Importing it registers the classes."""

from pe_spatial.segmentation import linear_probe, own_data  # noqa: F401
