"""DETA: model, head, transforms, test-time augmentation, start from an earlier stage."""
