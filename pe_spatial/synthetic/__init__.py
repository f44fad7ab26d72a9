"""A small procedural RGB-D world: one scene description gives boxes, masks, metric depth and object tracks."""

from .render import render_frame
from .scene import CATEGORIES, sample_scene
from .writer import SPLITS, write_dataset

__all__ = ["CATEGORIES", "SPLITS", "render_frame", "sample_scene", "write_dataset"]
