"""What the projects' images are called: a color and a shape for each object, and captions of crops.

An object's color is the hue of its mean color. `LEFT_OUT` are pairs of color and shape that nothing here learns; cones
have captions, but no boxes in the training of the detector.
"""

import colorsys
import json
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as run_lengths

SHAPES = ("sphere", "box", "cylinder", "cone", "torus")
COLORS = {"red": 20, "orange": 45, "yellow": 75, "green": 165, "blue": 255, "purple": 340}
"""Name -> the hue at which it ends, in degrees; red begins at 340."""
CLASSES = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)
LEFT_OUT = ("red sphere", "blue torus", "green box", "yellow cylinder")
NO_BOXES = (*LEFT_OUT, *(name for name in CLASSES if name.endswith("cone")))


@dataclass(frozen=True)
class Thing:
    """An object in an image: its name and its box x0, y0, x1, y1."""

    name: str
    box: tuple[float, float, float, float]


def color_name(rgb: np.ndarray) -> str:
    """Return the name of a color (3,), 0 to 255."""
    hue = 360 * colorsys.rgb_to_hsv(*(rgb / 255))[0]
    return next((name for name, end in COLORS.items() if hue < end), "red")


def read_world(root: Path, split: str) -> list[tuple[np.ndarray, list[Thing]]]:
    """Return the images (H, W, 3) of a synthetic dataset with their objects; write what the detector needs."""
    content = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    objects = defaultdict(list)
    for one in content["annotations"]:
        objects[one["image_id"]].append(one)
    images = []
    for image in content["images"]:
        rgb = np.asarray(Image.open(root / split / image["file_name"]).convert("RGB"))
        things = []
        for one in objects[image["id"]]:
            mask = run_lengths.decode(one["segmentation"]).astype(bool)
            name = f"{color_name(rgb[mask].mean(0))} {SHAPES[one['category_id'] - 1]}"
            one["category_id"] = 1 + CLASSES.index(name)
            x, y, w, h = one["bbox"]
            things.append(Thing(name, (x, y, x + w, y + h)))
        images.append((rgb, things))
    content["categories"] = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    (root / "annotations" / f"words_{split}.json").write_text(json.dumps(content))
    (root / "classes.txt").write_text("\n".join(CLASSES))
    (root / "templates.txt").write_text("a {}")
    return images


def crop_of(rgb: np.ndarray, things: list[Thing], scale: float, flip: bool) -> tuple[np.ndarray, str]:
    """Return a square around one thing or two, `scale` times as large as they are, and its caption."""
    x0, y0 = (min(thing.box[i] for thing in things) for i in (0, 1))
    x1, y1 = (max(thing.box[i] for thing in things) for i in (2, 3))
    half = max(x1 - x0, y1 - y0, 16) * scale / 2
    cx, cy = (x0 + x1) / 2, (y0 + y1) / 2
    square = Image.fromarray(rgb).crop((round(cx - half), round(cy - half), round(cx + half), round(cy + half)))
    pixels = np.asarray(square)[:, ::-1] if flip else np.asarray(square)
    return pixels, caption(things, flip)


def caption(things: list[Thing], flip: bool) -> str:
    """Return 'a red cone', or 'a red cone left of a blue box'."""
    if len(things) == 1:
        return f"a {things[0].name}"
    ordered = sorted(things, key=lambda thing: (thing.box[0] + thing.box[2]) * (-1 if flip else 1))
    return f"a {ordered[0].name} left of a {ordered[1].name}"
