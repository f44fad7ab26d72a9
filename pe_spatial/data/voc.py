"""Pascal VOC: one XML per image with boxes; `ImageSets/Main` or the names of folders tell the splits."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from pe_spatial.data.files import SPLITS, Files, progress
from pe_spatial.data.parts import Part, Reading, number_classes, read_sizes
from pe_spatial.errors import DatasetError, listed


def read_xmls(paths: Sequence[Path]) -> dict[Path, ElementTree.Element]:
    """Parse XML files and return those of images."""
    annotations = {}
    for path in progress(paths, "reading XML files"):
        try:
            element = ElementTree.parse(path).getroot()
        except ElementTree.ParseError as error:
            raise DatasetError(f"{path} is not valid XML ({error}); write it again or remove it") from error
        if element.tag == "annotation":
            annotations[path] = element
    return annotations


def read_folder(files: Files, annotations: Mapping[Path, ElementTree.Element], notes: list[str]) -> Reading:
    """Read a dataset.

    Coordinates are taken as edges of boxes, as tools write them; in the files of the original challenge pixels are
    counted from 1, so that left and top are one less there (detectron2: data/datasets/pascal_voc.py). Objects marked
    as difficult are ignored, as in the challenge. Classes are ordered by name.
    """
    splits = _splits(files, annotations, notes)
    images = _find_images(files, annotations)
    absent = [path for paths in splits.values() for path in paths if path not in images]
    if len(absent) == len(annotations):
        raise DatasetError(
            f"none of the {len(annotations)} XML files of {files.root} has an image, such as {absent[0]}; "
            "give the folder that contains Annotations and JPEGImages, or put the images beside the XML files"
        )
    if absent:
        notes.append(f"{len(absent)} XML files have no image and are omitted: {listed(absent, 3)}")
    names = sorted({_text(o, "name", path) for path in images for o in annotations[path].iter("object")})
    ids = {name: i for i, name in enumerate(names, 1)}
    sizes = {path: _size(annotations[path]) for path in images}
    from_headers = read_sizes([images[path] for path, size in sizes.items() if size is None], notes)
    parts, difficult = {}, 0
    for split, paths in splits.items():
        part = parts[split] = Part(f"{files.root}, {split}", categories=number_classes(names))
        for path in paths:
            size = path in images and (sizes[path] or from_headers.get(images[path]))
            if not size:
                continue
            number = part.add_image(images[path], size)
            from_one = "VOC20" in (annotations[path].findtext("source/database") or "")
            for element in annotations[path].iter("object"):
                label = ids[_text(element, "name", path)]
                annotation = part.add_object(number, label, box=_box(element, path, from_one))
                if (element.findtext("difficult") or "").strip() == "1":
                    annotation["ignore"] = 1
                    difficult += 1
    if difficult:
        notes.append(f"{difficult} objects are marked as difficult and ignored, as in the challenge")
    return Reading("Pascal VOC", parts, notes)


def _splits(files: Files, annotations: Mapping[Path, object], notes: list[str]) -> dict[str, list[Path]]:
    """Return the XML files of each split: by the lists in ImageSets/Main, or by the names of their folders."""
    lists: defaultdict[str, list[Path]] = defaultdict(list)
    for path in files.by_suffix[".txt"]:
        if path.parts[-3:-1] == ("ImageSets", "Main"):
            lists[path.stem].append(path)
    if not any(lists[name] for name in (*SPLITS, "trainval")):
        folders: dict[str, list[Path]] = {}
        for path in annotations:
            folders.setdefault(files.split_of(path.parent) or "train", []).append(path)
        return folders
    wanted = {
        name: [file.parents[2] / "Annotations" / f"{line.split()[0]}.xml" for file in found
               for line in file.read_text().splitlines() if line.strip()]
        for name, found in lists.items()
    }  # fmt: skip
    if not wanted.get("train"):
        wanted["train"] = [path for path in wanted.get("trainval", ()) if path not in wanted.get("val", ())]
    splits: dict[str, list[Path]] = {}
    for split in SPLITS:
        paths = [path for path in wanted.get(split, ()) if path in annotations]
        absent = len(wanted.get(split, ())) - len(paths)
        if absent:
            notes.append(f"{absent} of {absent + len(paths)} images of the {split} list have no XML file")
        if paths or split == "train":
            splits[split] = paths
    unlisted = len(annotations) - len({path for paths in splits.values() for path in paths})
    if unlisted:
        notes.append(f"{unlisted} of {len(annotations)} XML files are in no list of ImageSets/Main and are omitted")
    return splits


def _find_images(files: Files, annotations: Mapping[Path, ElementTree.Element]) -> dict[Path, str]:
    """Find the image of each XML: that of its name, or else that of its `filename`, nearest to it."""
    by_name: defaultdict[str, list[str]] = defaultdict(list)
    for image in sorted(files.images):
        name = os.path.basename(image)
        by_name[name].append(image)
        by_name[os.path.splitext(name)[0]].append(image)
    images = {}
    for path, element in annotations.items():
        file_name = (element.findtext("filename") or "").strip().replace("\\", "/").rpartition("/")[2]
        candidates = by_name.get(path.stem) or by_name.get(file_name) or ()
        split = files.split_of(path.parent)
        candidates = [i for i in candidates if split is None or files.split_of(os.path.dirname(i)) in (None, split)]
        if candidates:
            images[path] = max(candidates, key=lambda image: len(os.path.commonpath([image, path])))
    return images


def _size(element: ElementTree.Element) -> tuple[int, int] | None:
    """Return (height, width), or None where a tool wrote none or 0."""
    try:
        height, width = (int(float(element.findtext(f"size/{key}") or 0)) for key in ("height", "width"))
    except ValueError:
        return None
    return (height, width) if height > 0 and width > 0 else None


def _box(element: ElementTree.Element, path: Path, from_one: bool) -> list[float]:
    x, y, right, bottom = (_number(element, f"bndbox/{key}", path) for key in ("xmin", "ymin", "xmax", "ymax"))
    return [x - from_one, y - from_one, right - x + from_one, bottom - y + from_one]


def _number(element: ElementTree.Element, key: str, path: Path) -> float:
    text = _text(element, key, path)
    try:
        return float(text)
    except ValueError:
        raise DatasetError(f"{path}: {key} of an object is {text!r}; write a number") from None


def _text(element: ElementTree.Element, key: str, path: Path) -> str:
    text = (element.findtext(key) or "").strip()
    if not text:
        raise DatasetError(f"{path}: an object has no {key}; add it, or remove the object")
    return text
