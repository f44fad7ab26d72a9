"""Video object segmentation: masks, datasets, J&F and its evaluation."""
