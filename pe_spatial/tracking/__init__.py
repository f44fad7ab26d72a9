"""Video object segmentation: propagation without training, the SAM 2-style tracker, J&F."""
