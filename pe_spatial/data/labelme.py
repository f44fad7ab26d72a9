"""LabelMe: one JSON per image with polygons and rectangles; the names of folders tell the splits."""

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pe_spatial.data.files import Files
from pe_spatial.data.parts import Part, Reading, number_classes, read_sizes
from pe_spatial.errors import DatasetError, listed


def is_labelme(content: Any) -> bool:
    """Return whether a JSON is LabelMe's; the image that it may contain is dropped."""
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        return False
    content.pop("imageData", None)
    return True


def read_folder(files: Files, contents: Mapping[Path, Mapping[str, Any]], notes: list[str]) -> Reading:
    """Read a dataset, path of a JSON -> content.

    Polygons of one label and `group_id` in an image are one object. Classes are ordered by name.
    """
    images = {path: image for path, content in contents.items() if (image := _find_image(files, path, content))}
    absent = [files.relative(path) for path in contents if path not in images]
    if not images:
        raise DatasetError(
            f"none of the {len(contents)} LabelMe files of {files.root} has an image, such as {absent[0]}; "
            "put each image beside its JSON"
        )
    if absent:
        notes.append(f"{len(absent)} LabelMe files have no image and are omitted: {listed(absent, 3)}")
    sizes = {path: _size(contents[path]) for path in images}
    from_headers = read_sizes([images[path] for path, size in sizes.items() if size is None], notes)
    objects = {path: _objects(contents[path]["shapes"], path) for path in images}
    names = sorted({label for found, _ in objects.values() for label, _ in found})
    ids = {name: i for i, name in enumerate(names, 1)}
    parts: dict[str, Part] = {}
    for path, image in images.items():
        split = files.split_of(path.parent) or files.split_of(os.path.dirname(image)) or "train"
        part = parts.setdefault(split, Part(f"{files.root}, {split}", categories=number_classes(names)))
        size = sizes[path] or from_headers.get(image)
        if size is None:
            continue
        number = part.add_image(image, size)
        for label, geometry in objects[path][0]:
            part.add_object(number, ids[label], **geometry)
    skipped = sum((kinds for _, kinds in objects.values()), Counter[str]())
    if skipped:
        kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.items())
        notes.append(f"omitted shapes that are neither polygons nor rectangles: {kinds}")
    unlabeled = len(files.images) - len(set(images.values()))
    if unlabeled:
        notes.append(f"{unlabeled} images have no LabelMe file and are omitted")
    return Reading("LabelMe", parts, notes)


def _find_image(files: Files, path: Path, content: Mapping[str, Any]) -> str | None:
    """Return the image that the JSON names, or the one of its own name beside it."""
    name = str(content.get("imagePath") or "")
    (found,), _ = files.locate([name], path.parent, files.split_of(path.parent)) if name else ((None,), "")
    beside = (str(path.with_suffix(suffix)) for suffix in {os.path.splitext(image)[1] for image in files.images})
    return found or next((image for image in beside if image in files.images), None)


def _size(content: Mapping[str, Any]) -> tuple[int, int] | None:
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return (height, width) if isinstance(height, int) and isinstance(width, int) and height * width > 0 else None


def _objects(shapes: list[Any], path: Path) -> tuple[list[tuple[str, dict[str, Any]]], Counter[str]]:
    """Return (label, box or polygons) of each object, and the number of other shapes by kind."""
    objects: list[tuple[str, dict[str, Any]]] = []
    groups: dict[tuple[str, Any], dict[str, Any]] = {}
    skipped: Counter[str] = Counter()
    for i, shape in enumerate(shapes):
        try:
            label, kind = str(shape["label"]), shape.get("shape_type") or "polygon"
            points = [(float(x), float(y)) for x, y in shape["points"]]
        except (KeyError, TypeError, ValueError, AttributeError):
            raise DatasetError(f"{path}: shapes[{i}] has no label or no points; fix or remove it") from None
        if kind == "rectangle" and len(points) in (2, 4):
            xs, ys = zip(*points, strict=True)
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
            objects.append((label, dict(box=box)))
        elif kind == "polygon" and len(points) > 2:
            polygon = [coordinate for point in points for coordinate in point]
            group = groups.get((label, shape.get("group_id")))
            if group is not None and shape.get("group_id") is not None:
                group["polygons"].append(polygon)
            else:
                geometry = groups[label, shape.get("group_id")] = dict(polygons=[polygon])
                objects.append((label, geometry))
        else:
            skipped[kind] += 1
    return objects, skipped
