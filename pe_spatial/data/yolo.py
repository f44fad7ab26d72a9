"""YOLO: a YAML in the conventions of ultralytics, and one label file per image with boxes and polygons in 0 to 1."""

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pe_spatial.data.files import SPLITS, Files, progress
from pe_spatial.data.parts import Part, Reading, number_classes, read_sizes
from pe_spatial.errors import DatasetError, listed

SUFFIXES = (".yaml", ".yml")
_FAR = 2  # a coordinate above this is in pixels
_DIGITS = 9  # of pixels: what remains of a number that was divided by the size of the image and multiplied again


def is_dataset(path: Path) -> bool:
    """Return whether a YAML describes a dataset: other tools keep theirs in the same folders."""
    try:
        content = _load(path)
    except DatasetError:
        return path.stem in ("data", "dataset")
    return "train" in content and bool({"names", "nc"} & set(content))


def read_yaml(path: Path) -> Reading:
    """Read a dataset by its YAML.

    A label file is where ultralytics looks for it: the last `images` of the path becomes `labels`. An image without one
    has no objects.
    """
    content, notes = _load(path), []  # type: tuple[Mapping[str, Any], list[str]]
    names = _class_names(content, path)
    root = _root(content, path)
    paths: dict[str, list[str]] = {}
    for split in SPLITS:
        entry = content.get(split) or (content.get("validation") if split == "val" else None)
        try:
            if entry:
                paths[split] = _find_images(entry, split, root, path, notes)
        except DatasetError as error:
            if split != "test":  # many files of Roboflow name a test part that was not exported
                raise
            notes.append(f"omitted: {error}")
    if "train" not in paths:
        raise DatasetError(f"{path} has no train; add the folder of the training images, such as train: images/train")
    if paths.get("val") == paths["train"]:
        del paths["val"]
        notes.append("val is the same as train and is omitted")
    parts = {}
    for split, images in paths.items():
        parts[split] = Part(f"{path}, {split}", categories=number_classes(names))
        _read_labels(parts[split], images, _numbers_per_pose(content), notes)
    return Reading("YOLO", parts, notes)


def _load(path: Path) -> Mapping[str, Any]:
    try:
        # Without types: a class may be called no, on or 1e3.
        content = yaml.load(path.read_text(encoding="utf-8-sig"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DatasetError(f"{path} cannot be read as YAML ({' '.join(str(error).split())}); write it again") from error
    if not isinstance(content, Mapping):
        raise DatasetError(f"{path} is not a data.yaml of YOLO; it needs the keys train, val and names")
    return {key: value for key, value in content.items() if value not in ("", "~", "null")}


def _class_names(content: Mapping[str, Any], path: Path) -> list[str]:
    names = content.get("names")
    if isinstance(names, Mapping):
        if sorted(names, key=str) != sorted(map(str, range(len(names)))):
            raise DatasetError(f"{path}: names has the keys {listed(list(names))}; number the classes 0, 1, 2, ...")
        names = [names[str(i)] for i in range(len(names))]
    count = content.get("nc")
    if not names and count:
        names = [f"class_{i}" for i in range(int(count))]
    if not isinstance(names, list) or not names:
        raise DatasetError(f"{path} has no names; add the list of classes, such as names: [bolt, nut]")
    if count and int(count) != len(names):
        raise DatasetError(f"{path} has nc: {count}, but {len(names)} names ({listed(names, 20)}); make them agree")
    return names


def _root(content: Mapping[str, Any], path: Path) -> Path:
    """Return the folder that the YAML's `path` names, or that of the YAML if it does not exist."""
    folder = path.parent / os.path.expanduser(content.get("path", ""))
    return Path(os.path.normpath(folder)) if folder.is_dir() else path.parent


def _find_images(entry: Any, split: str, root: Path, file: Path, notes: list[str]) -> list[str]:
    """Return the images of folders, lists of files (.txt) and lists of these."""
    images: dict[str, None] = {}
    for text in entry if isinstance(entry, list) else [entry]:
        place = _find(str(text).replace("\\", "/"), split, root, file, notes)
        if place.is_dir():
            images.update(dict.fromkeys(sorted(Files(place).images)))
        elif place.suffix.lower() == ".txt":
            images.update(dict.fromkeys(_read_list(place, split, root, notes)))
        else:
            raise DatasetError(f"{file}: {split} is {text}; give a folder, a list (.txt) or several of these")
    if not images:
        raise DatasetError(f"{file}: {split} is {entry}, which contains no images; add some, or remove {split}")
    return list(images)


def _find(text: str, split: str, root: Path, file: Path, notes: list[str]) -> Path:
    bases = (root, file.parent)
    inside = text.removeprefix("../")  # Roboflow's
    for candidate in (base / name for name in (os.path.expanduser(text), inside) for base in bases):
        if candidate.exists():
            return Path(os.path.normpath(candidate))
    parts = text.split("/")
    for base in bases:
        for i in range(1, len(parts)):
            candidate = base.joinpath(*parts[i:])
            if "/".join(parts[i:]) and candidate.exists():
                notes.append(f"{split} of {file.name} is {text}, which is not here; read from {candidate}")
                return candidate
    raise DatasetError(
        f"{file}: {split} is {text}, which exists neither there nor below {root}; set path to the folder of the "
        f"dataset and {split} to a folder or list in it"
    )


def _read_list(file: Path, split: str, root: Path, notes: list[str]) -> list[str]:
    names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    here = [os.path.normpath(file.parent / name) for name in names]
    if not all(map(os.path.isfile, here)):
        found, elsewhere = Files(root).locate(names, root, split)
        here = [path for path in found if path is not None]
        if not here and names:
            raise DatasetError(
                f"none of the {len(names)} images in {file} is below {root}, such as {names[0]}; "
                "put the images there, or write the list again"
            )
        if len(here) < len(names):
            notes.append(f"{len(names) - len(here)} of {len(names)} images in {file} do not exist and are omitted")
        if elsewhere:
            notes.append(f"{file.name}: {elsewhere}")
    return here


def _numbers_per_pose(content: Mapping[str, Any]) -> int:
    """Return how many numbers a row has in a dataset of key points, of which the box is read; 0 in others."""
    shape = content.get("kpt_shape")
    return 5 + math.prod(map(int, shape)) if isinstance(shape, list) else 0


def _read_labels(part: Part, images: list[str], pose: int, notes: list[str]) -> None:
    labels = {image: _label_of(image) for image in images}
    folders = filter(os.path.isdir, {os.path.dirname(label) for label in labels.values()})
    existing = {os.path.join(folder, name) for folder in folders for name in os.listdir(folder)}
    if not existing & set(labels.values()) and not part.source.endswith(", test"):
        raise DatasetError(
            f"none of the {len(images)} images of {part.source} has a label file, such as {labels[images[0]]}; "
            "put one for each image with objects there"
        )
    sizes = read_sizes(images, notes)
    counts = Counter(negatives=sum(labels[image] not in existing for image in images))
    for image, (height, width) in progress(sizes.items(), "reading labels"):
        number = part.add_image(image, (height, width))
        if labels[image] not in existing:
            continue
        for label, values in _read_rows(labels[image], len(part.categories), pose):
            if len(values) > 4:
                pixels = [round(v * (height if i % 2 else width), _DIGITS) for i, v in enumerate(values)]
                part.add_object(number, label + 1, polygons=[pixels])
            else:
                x, y, w, h = values
                box = [(x - w / 2) * width, (y - h / 2) * height, w * width, h * height]
                part.add_object(number, label + 1, box=[round(v, _DIGITS) for v in box])
    # Label files of images that are listed nowhere; beside the images there are also other texts.
    beside = {os.path.dirname(image) for image in images}
    single = {path for path in existing - set(labels.values()) if path.endswith(".txt")}
    orphans = [path for path in single if os.path.dirname(path) not in beside]
    if counts["negatives"]:
        notes.append(f"{counts['negatives']} of {len(images)} images of {part.source} have no label file: no objects")
    if orphans:
        notes.append(f"{len(orphans)} label files of {part.source} have no image: {listed(sorted(orphans), 3)}")


def _label_of(image: str) -> str:
    images, labels = f"{os.sep}images{os.sep}", f"{os.sep}labels{os.sep}"
    return os.path.splitext(labels.join(image.rsplit(images, 1)))[0] + ".txt"


def _read_rows(path: str, classes: int, pose: int) -> list[tuple[int, list[float]]]:
    """Return the class and the numbers of each row: 4 for a box (center and size), or x, y of a polygon."""
    rows = []
    with open(path, encoding="utf-8-sig") as file:
        lines = file.read().splitlines()
    for i, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            label, *values = map(float, re.split(r"[\s,]+", line.strip()))
        except ValueError:
            raise DatasetError(f"{path}, line {i} is {line[:60]!r}; write a class and numbers") from None
        if pose and len(values) + 1 == pose:
            values = values[:4]
        if len(values) != 4 and (len(values) < 6 or len(values) % 2):
            raise DatasetError(
                f"{path}, line {i} has {len(values)} numbers after the class; a box has 4, a polygon at least 3 pairs"
            )
        if label not in range(classes):
            raise DatasetError(f"{path}, line {i} has class {label:g}, but names has 0 to {classes - 1}; fix either")
        if max(values) > _FAR:
            raise DatasetError(f"{path}, line {i} is in pixels; divide x by the width of the image, y by its height")
        rows.append((int(label), values))
    return rows
