"""COCO files in the layouts of COCO, Roboflow, CVAT, LVIS and Objects365."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pe_spatial.data.files import Files, read_json, split_of
from pe_spatial.data.parts import Part, Reading, join
from pe_spatial.errors import DatasetError, listed

if TYPE_CHECKING:
    from numpy import ndarray

_OTHER_TASKS = re.compile(r"(panoptic|stuff|captions?|(?:person_)?keypoints|image_info|densepose|unlabeled)(?![a-z])")
_LISTS = ("images", "annotations", "categories")


def is_other_task(path: Path) -> bool:
    """Return whether a file is named as one without instances is: panoptic, stuff, captions, keypoints."""
    return _OTHER_TASKS.match(path.stem.lower()) is not None


def read_folder(files: Files, instances: Mapping[Path, dict[str, Any]], notes: list[str]) -> Reading:
    """Read the instance files of a folder, path -> content."""
    by_split: dict[str, list[Path]] = {}
    for path in instances:
        by_split.setdefault(files.split_of(path) or "train", []).append(path)
    for split, paths in by_split.items():
        if len(paths) > 1 and not all(map(_is_label_project, paths)):
            raise DatasetError(
                f"{files.root} has several COCO files for {split}: "
                f"{listed([files.relative(path) for path in paths])}; give the path of one instead of the folder"
            )
    if len(instances) == 1:  # whatever its name
        by_split = {"train": [*instances]}
    parts = {
        split: join([_part(instances[path], path, files, notes) for path in paths], str(files.root))
        for split, paths in by_split.items()
    }
    return Reading(_form(parts), parts, notes)


def _is_label_project(path: Path) -> bool:
    """Return whether `pe-spatial label` wrote the file; those of several videos are one dataset."""
    return path.parent.name == "coco" and (path.parents[1] / "journal.jsonl").is_file()


def read_file(path: Path) -> Reading:
    """Read one file as the training part, and its counterpart for validation if there is one beside it."""
    content = read_json(path)
    if not is_instances(content):
        if isinstance(content, dict) and "shapes" in content:
            raise DatasetError(f"{path} is the LabelMe file of one image; give the folder that contains it")
        raise DatasetError(
            f"{path} contains no COCO instances (it needs lists of {', '.join(_LISTS)}, with boxes); "
            "give an instances_*.json, or the folder of the dataset"
        )
    folder = path.parent
    if folder.name.lower() in ("annotations", "annotation", "labels", "json") or split_of(folder.name):
        folder = folder.parent  # images are beside it
    files = Files(folder)
    notes: list[str] = []
    parts = {"train": _part(content, path, files, notes)}
    counterpart = _counterpart(path, files)
    if counterpart:
        other = read_json(counterpart)
        if is_instances(other):
            notes.append(f"validation uses its counterpart {counterpart}")
            parts["val"] = _part(other, counterpart, files, notes)
    return Reading(_form(parts), parts, notes)


def _counterpart(path: Path, files: Files) -> Path | None:
    """Return the validation file that is named as this training file is."""
    name = files.relative(path)
    if files.split_of(path) != "train":
        return None
    for word in ("val", "valid", "validation"):
        other = files.root / re.sub(r"(?<![A-Za-z])train(?![A-Za-z])", word, name)
        if other != path and other.is_file():
            return other
    return None


def is_instances(content: Any) -> bool:
    if not isinstance(content, dict) or not all(isinstance(content.get(name), list) for name in _LISTS):
        return False
    first = next(iter(content["annotations"]), None)
    return first is None or (isinstance(first, dict) and "bbox" in first and "segments_info" not in first)


def _part(content: dict[str, Any], path: Path, files: Files, notes: list[str]) -> Part:
    for name, key in (("images", "id"), ("categories", "id"), ("annotations", "image_id")):
        for i, entry in enumerate(content[name]):
            if not isinstance(entry, dict) or key not in entry:
                raise DatasetError(f"{path}: {name}[{i}] has no {key}; fix or remove it")
    images: list[dict[str, Any]] = content["images"]
    for i, image in enumerate(images):
        if "coco_url" in image and "neg_category_ids" in image:  # LVIS, with images of COCO's train and val
            image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise DatasetError(f"{path}: images[{i}] has no file_name; fix or remove it")
    names = [image["file_name"] for image in images]
    paths, elsewhere = files.locate(names, path.parent, files.split_of(path))
    missing = {str(image["id"]) for image, found in zip(images, paths, strict=True) if found is None}
    absent = [name for name, found in zip(names, paths, strict=True) if found is None]
    if absent and len(absent) == len(names):
        raise DatasetError(
            f"none of the {len(names)} images of {path} is below {files.root}, such as {names[0]}; "
            "put the images there, beside the JSON or in a folder beside it"
        )
    if absent:
        notes.append(
            f"{len(absent)} of {len(names)} images of {path} do not exist and are omitted: {listed(absent, 3)}"
        )
    if elsewhere:
        notes.append(f"{path.name}: {elsewhere}")
    for image, found in zip(images, paths, strict=True):
        image["file_name"] = found
    return Part(
        source=str(path),
        images=[image for image in images if image["file_name"] is not None],
        annotations=[entry for entry in content["annotations"] if str(entry["image_id"]) not in missing],
        categories=content["categories"],
    )


def _form(parts: dict[str, Part]) -> str:
    part = parts.get("train") or next(iter(parts.values()))
    if any("neg_category_ids" in image for image in part.images):
        return "LVIS"
    return "Objects365" if [c["id"] for c in part.categories] == list(range(1, 366)) else "COCO"


def decode_mask(segmentation: Any, size: tuple[int, int] | None) -> "ndarray":
    """Return the mask (H, W) bool of COCO's polygons or run lengths; compressed ones know their size (H, W)."""
    from pycocotools import mask

    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, *(size or ())))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, *(size or ()))
    return mask.decode(segmentation).astype(bool)
