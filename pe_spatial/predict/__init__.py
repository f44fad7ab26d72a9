"""Trained models on images and videos: `pe_spatial.load`, and its results as small typed objects."""
