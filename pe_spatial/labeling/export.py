"""Labels as files: COCO, YOLO, CVAT and DAVIS, and a sheet to review them.

<folder>/coco/instances.json, images/          COCO, with `track_id` in the annotations
<folder>/yolo/data.yaml, images/, labels/      the largest polygon of each object
<folder>/cvat/annotations.xml, images/         CVAT for images 1.1, masks with an attribute `track_id`
<folder>/davis/JPEGImages, Annotations, ImageSets
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as xml

import cv2
import numpy as np
from PIL import Image

from pe_spatial.atomic import atomic_folder, write_json
from pe_spatial.data.sheet import Example, Statistics, draw_sheet
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.tracking.vos.masks import write_mask

QUALITY = 95
"""Of the JPEGs."""


@dataclass(frozen=True)
class Labels:
    """The masks of a video and what its objects are.

    Attributes:
        name: of the video.
        frames: image files.
        size: (H, W).
        mask: frame number -> index mask (H, W) uint8.
        classes: object -> name of its class.
        chosen: numbers of the frames that become a dataset.
        accepted: those among them that a person has accepted or prompted.
    """

    name: str
    frames: Sequence[Path]
    size: tuple[int, int]
    mask: Callable[[int], np.ndarray]
    classes: Mapping[int, str]
    chosen: Sequence[int]
    accepted: frozenset[int] = frozenset()

    @property
    def names(self) -> list[str]:
        """The names of the classes, in the order of their first objects."""
        return list(dict.fromkeys(self.classes[i] for i in sorted(self.classes)))

    def objects(self, frame: int) -> Iterator[tuple[int, int, MaskCrop]]:
        """Yield the object, its class (from 0) and its mask for each object in a frame."""
        index, names = self.mask(frame), self.names
        for i in sorted(self.classes):
            crop = MaskCrop.cut(index == i)
            if crop.pixels.size:
                yield i, names.index(self.classes[i]), crop


def polygons(crop: MaskCrop) -> list[list[float]]:
    """Return the outlines of a mask, x, y, x, y, ..., largest first; holes are filled.

    They run through the centers of the pixels at the border and are moved outwards to the corners, so that the box of
    the polygons is that of the mask.
    """
    scaled = cv2.resize(crop.pixels.astype(np.uint8), None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    found, _ = cv2.findContours(np.pad(scaled, 1), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    shapes = []
    for contour in sorted(found, key=cv2.contourArea, reverse=True):
        points = (contour[:, 0].astype(np.float64) - 1) / 2  # pixel k covers 2k and 2k + 1, that is k to k + 1/2
        points = np.ceil(points)  # to the borders of the pixels
        shapes.append((points + np.array([crop.x, crop.y])).ravel().tolist())
    return [shape for shape in shapes if len(shape) >= 6]


def write_coco(labels: Labels, folder: Path, *, outlines: bool = False) -> None:
    """Write COCO instances; `outlines` writes polygons instead of run lengths, which are exact."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for t, name in _write_images(labels, folder / "images"):
        size = dict(height=labels.size[0], width=labels.size[1])
        images.append(dict(id=t + 1, file_name=f"images/{name}.jpg", **size, frame_id=t, accepted=t in labels.accepted))
        for i, label, crop in labels.objects(t):
            x0, y0, x1, y1 = crop.box
            shape: Any = polygons(crop) if outlines else crop.rle(labels.size)
            one: dict[str, Any] = dict(id=len(annotations) + 1, image_id=t + 1, category_id=label + 1, track_id=i)
            one |= dict(iscrowd=0, bbox=[x0, y0, x1 - x0, y1 - y0], area=int(crop.pixels.sum()), segmentation=shape)
            annotations.append(one)
    categories = [dict(id=k, name=name) for k, name in enumerate(labels.names, 1)]
    tables = dict(images=images, annotations=annotations, categories=categories)
    write_json(folder / "instances.json", tables)


def write_yolo(labels: Labels, folder: Path) -> None:
    """Write a dataset of YOLO segmentation."""
    (folder / "labels").mkdir()
    for t, name in _write_images(labels, folder / "images"):
        rows = []
        for _, label, crop in labels.objects(t):
            outline = polygons(crop)[0]
            numbers = (value / labels.size[1 - k % 2] for k, value in enumerate(outline))
            rows.append(" ".join([str(label), *(f"{number:.6f}" for number in numbers)]))
        (folder / "labels" / f"{name}.txt").write_text("".join(f"{row}\n" for row in rows))
    lines = ["train: images", "names:", *(f"  {k}: {_quoted(name)}" for k, name in enumerate(labels.names))]
    (folder / "data.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_cvat(labels: Labels, folder: Path) -> None:
    """Write CVAT for images 1.1; masks are row-wise run lengths in their boxes, background first."""
    root = xml.Element("annotations")
    xml.SubElement(root, "version").text = "1.1"
    task = xml.SubElement(xml.SubElement(root, "meta"), "task")
    xml.SubElement(task, "name").text = labels.name
    kinds = xml.SubElement(task, "labels")
    for name in labels.names:
        entry = xml.SubElement(kinds, "label")
        xml.SubElement(entry, "name").text = name
        attribute = xml.SubElement(xml.SubElement(entry, "attributes"), "attribute")
        for key, value in (("name", "track_id"), ("mutable", "False"), ("input_type", "text"), ("values", "")):
            xml.SubElement(attribute, key).text = value
    height, width = labels.size
    for number, (t, name) in enumerate(_write_images(labels, folder / "images")):
        about = dict(id=str(number), name=f"{name}.jpg", width=str(width), height=str(height))
        image = xml.SubElement(root, "image", about)
        for i, label, crop in labels.objects(t):
            flat = np.concatenate(([0], crop.pixels.ravel().astype(np.int8), [2]))  # starts with the background
            changes = np.flatnonzero(np.diff(flat))
            counts = np.diff(np.concatenate(([0], changes))).tolist()
            (left, top), (rows, columns) = crop.box[:2], crop.pixels.shape
            place = dict(left=str(left), top=str(top), width=str(columns), height=str(rows))
            kind = dict(label=labels.names[label], source="semi-auto", occluded="0", z_order="0")
            mask = xml.SubElement(image, "mask", {**kind, "rle": ", ".join(map(str, counts)), **place})
            xml.SubElement(mask, "attribute", name="track_id").text = str(i)
    xml.indent(root)
    xml.ElementTree(root).write(folder / "annotations.xml", encoding="utf-8", xml_declaration=True)


def write_davis(labels: Labels, folder: Path) -> None:
    """Write the layout of DAVIS 2017 with one sequence."""
    for t, name in _write_images(labels, folder / "JPEGImages" / "480p" / labels.name):
        index = labels.mask(t)
        index = np.where(np.isin(index, list(labels.classes)), index, 0).astype(np.uint8)
        write_mask(folder / "Annotations" / "480p" / labels.name / f"{name}.png", index)
    lists = folder / "ImageSets" / "2017"
    lists.mkdir(parents=True)
    for split in ("train", "val"):
        (lists / f"{split}.txt").write_text(f"{labels.name}\n", encoding="utf-8")


WRITERS: dict[str, Callable[..., None]] = {
    "coco": write_coco, "yolo": write_yolo, "cvat": write_cvat, "davis": write_davis
}  # fmt: skip


def export(labels: Labels, root: Path, forms: Sequence[str], *, outlines: bool = False) -> None:
    """Write `root`/FORM for each form, in place of an earlier export, and the review sheet `root`/review.png.

    Raises DatasetError without objects on the chosen frames.
    """
    if not any(True for t in labels.chosen for _ in labels.objects(t)):
        raise DatasetError(f"{labels.name} has no labeled object on the chosen frames; prompt some, and track them")
    for form in forms:
        options = dict(outlines=True) if outlines and form == "coco" else {}
        shutil.rmtree(root / form, ignore_errors=True)  # the journal has everything
        with atomic_folder(root / form) as unfinished:
            WRITERS[form](labels, unfinished, **options)
    write_sheet(labels, root / "review.png")


def write_sheet(labels: Labels, path: Path, *, images: int = 12) -> None:
    """Write a PNG with evenly spaced frames, their objects, and the statistics of the labels."""
    names, sides, per_image = labels.names, [], []
    counts = [0] * len(names)
    found = {t: list(labels.objects(t)) for t in labels.chosen}
    for objects in found.values():
        per_image.append(len(objects))
        for _, label, crop in objects:
            counts[label] += 1
            x0, y0, x1, y1 = crop.box
            sides.append(math.sqrt((x1 - x0) * (y1 - y0)))
    step = max(1, math.ceil(len(labels.chosen) / images))
    examples = [
        Example(
            image=read_rgb(labels.frames[t]),
            boxes=np.array([crop.box for _, _, crop in found[t]], np.float64).reshape(-1, 4),
            labels=[label for _, label, _ in found[t]],
            masks=[crop.full(labels.size) for _, _, crop in found[t]],
            title=f"frame {t}{' (accepted)' if t in labels.accepted else ''}",
        )
        for t in labels.chosen[::step]
    ]
    lines = [
        f"{labels.name}: {len(labels.chosen)} of {len(labels.frames)} frames, {len(labels.classes)} tracks, "
        f"{sum(counts)} objects, {len(labels.accepted & set(labels.chosen))} frames accepted or prompted by a person"
    ]
    draw_sheet(path, examples, names, Statistics({"labels": counts}, sides, per_image), lines)


def _write_images(labels: Labels, folder: Path) -> Iterator[tuple[int, str]]:
    """Write the chosen frames as JPEGs; yield the number and the name of each."""
    folder.mkdir(parents=True)
    for t in labels.chosen:
        name = f"{t:05d}"
        Image.fromarray(read_rgb(labels.frames[t])).save(folder / f"{name}.jpg", quality=QUALITY)
        yield t, name


def _quoted(name: str) -> str:
    """Return a name as YAML reads it back."""
    import json

    return json.dumps(name, ensure_ascii=False)
