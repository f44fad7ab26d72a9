"""Memory and arithmetic of a training step, measured on the meta device."""
