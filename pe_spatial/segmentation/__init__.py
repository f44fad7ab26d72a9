"""Semantic segmentation: the linear probe on a frozen encoder."""
