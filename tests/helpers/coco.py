"""A COCO set of coloured rectangles, for tests."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def annotation(number: int, image: int, box: list[float], category: int = 1, **fields: Any) -> dict[str, Any]:
    x, y, w, h = box
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    base = dict(id=number, image_id=image, category_id=category, bbox=box, area=w * h, segmentation=[polygon])
    return base | dict(iscrowd=0) | fields


def write_coco(root: Path, *, images: int = 4, size: tuple[int, int] = (96, 128), split: str = "train2017") -> Path:
    """Write `images` images of (height, width) with two boxes each; return the annotation file."""
    rng = np.random.default_rng(0)
    (root / split).mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": 1, "name": "red"}, {"id": 7, "name": "blue"}]
    height, width = size
    for i in range(1, images + 1):
        pixels = np.full((height, width, 3), 90, np.uint8)
        for k, (category, colour) in enumerate(((1, (220, 30, 30)), (7, (30, 30, 220)))):
            x, y = int(rng.integers(0, width // 2 - 30)) + k * width // 2, int(rng.integers(0, height - 40))
            pixels[y : y + 40, x : x + 30] = colour
            content["annotations"].append(annotation(2 * i + k, i, [x, y, 30, 40], category))
        Image.fromarray(pixels).save(root / split / f"{i}.png")
        content["images"].append({"id": i, "file_name": f"{i}.png", "height": height, "width": width})
    path = root / "annotations" / f"instances_{split}.json"
    path.write_text(json.dumps(content))
    return path
