"""The core: the encoder, its geometry, its pyramids and its checkpoints. torch only."""
