"""Splits while they are read: COCO's lists, filled image by image."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from pe_spatial.data.files import progress
from pe_spatial.errors import DatasetError, listed
from pe_spatial.images import read_size


@dataclass
class Part:
    """One split as a form has it: COCO's lists, with absolute paths as `file_name`."""

    source: str
    images: list[dict[str, Any]] = field(default_factory=list)
    annotations: list[dict[str, Any]] = field(default_factory=list)
    categories: list[dict[str, Any]] = field(default_factory=list)

    def add_image(self, path: str, size: tuple[int, int]) -> int:
        """Add an image of `size` (height, width) and return its id."""
        self.images.append(dict(id=len(self.images) + 1, file_name=path, height=size[0], width=size[1]))
        return len(self.images)

    def add_object(
        self, image: int, category: int, *, box: Sequence[float] = (), polygons: Sequence[Sequence[float]] = ()
    ) -> dict[str, Any]:
        """Add an object with a box (x, y, width, height), or with polygons (x, y, x, y, ...) that define its box."""
        annotation: dict[str, Any] = dict(id=len(self.annotations) + 1, image_id=image, category_id=category, iscrowd=0)
        if polygons:
            xs, ys = [x for p in polygons for x in p[::2]], [y for p in polygons for y in p[1::2]]
            box = (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys))
            annotation["segmentation"] = [list(polygon) for polygon in polygons]
        annotation["bbox"] = list(box)
        annotation["area"] = sum(map(polygon_area, polygons)) if polygons else box[2] * box[3]
        self.annotations.append(annotation)
        return annotation


def join(parts: Sequence[Part], source: str) -> Part:
    """Return one part with the images of all; categories are the same where their names are."""
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(category["name"] for part in parts for category in part.categories)
    joined = Part(source, categories=number_classes(names))
    new = {category["name"]: category["id"] for category in joined.categories}
    for part in parts:
        images = {image["id"]: i for i, image in enumerate(part.images, len(joined.images) + 1)}
        classes = {category["id"]: new[category["name"]] for category in part.categories}
        joined.images += [{**image, "id": images[image["id"]]} for image in part.images]
        for one in part.annotations:
            place = dict(image_id=images[one["image_id"]], category_id=classes[one["category_id"]])
            joined.annotations.append({**one, "id": len(joined.annotations) + 1, **place})
    return joined


@dataclass
class Reading:
    """A dataset as a form has it; `parts` by 'train', 'val', 'test'."""

    form: str
    parts: dict[str, Part]
    notes: list[str] = field(default_factory=list)


def number_classes(names: Iterable[str]) -> list[dict[str, Any]]:
    """Return COCO categories with ids from 1."""
    return [dict(id=i, name=name) for i, name in enumerate(names, 1)]


def polygon_area(polygon: Sequence[float]) -> float:
    points = list(zip(polygon[::2], polygon[1::2], strict=True))
    pairs = zip(points, points[1:] + points[:1], strict=True)
    return abs(sum(x * other_y - other_x * y for (x, y), (other_x, other_y) in pairs)) / 2


def read_sizes(paths: Sequence[str], notes: list[str]) -> dict[str, tuple[int, int]]:
    """Return (height, width) of images from their headers; those that cannot be opened are omitted and noted."""
    sizes, broken = {}, []
    for path in progress(paths, "reading image sizes"):
        try:
            sizes[path] = read_size(path)
        except DatasetError:
            broken.append(path)
    if broken:
        notes.append(f"{len(broken)} images cannot be opened and are omitted: {listed(broken, 3)}")
    return sizes
