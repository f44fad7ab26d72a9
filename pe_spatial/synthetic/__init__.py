"""A small procedural RGB-D world: one scene description gives boxes, masks, metric depth and object tracks."""

from .render import Frame, intrinsics, render_frame
from .scene import CATEGORIES, TEXTURES, Camera, Material, Room, Scene, Solid, sample_scene
from .writer import SPLITS, write_dataset

__all__ = [
    "CATEGORIES",
    "SPLITS",
    "TEXTURES",
    "Camera",
    "Frame",
    "Material",
    "Room",
    "Scene",
    "Solid",
    "intrinsics",
    "render_frame",
    "sample_scene",
    "write_dataset",
]
