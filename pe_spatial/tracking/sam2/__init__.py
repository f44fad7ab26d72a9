"""SAM 2 on a Perception Encoder: model, training, losses, streaming."""
