"""Monocular depth: data, heads, losses, metrics, inference. Importing it registers."""
