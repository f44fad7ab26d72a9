"""`open_dataset`: a folder, JSON or YAML of any form becomes COCO content with the same classes in all splits."""

import json
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pe_spatial.atomic import write_file
from pe_spatial.data import coco, labelme, voc, yolo
from pe_spatial.data.files import Files, progress, read_json
from pe_spatial.data.parts import Part, Reading
from pe_spatial.data.splitting import identical_files, split_off
from pe_spatial.errors import DatasetError, listed

FORMS = "a COCO JSON, a data.yaml of YOLO, XML files of Pascal VOC, or JSON files of LabelMe beside the images"


@dataclass(frozen=True)
class Split:
    """A part of a dataset.

    Attributes:
        content: COCO instances; `file_name` of images is relative to `root`, categories are the same in all splits.
        root: folder of the images.
        source: the file or folder that it was read from.
    """

    content: dict[str, Any]
    root: Path
    source: str


@dataclass(frozen=True)
class OwnDataset:
    """A dataset of objects in images.

    Attributes:
        form: 'COCO', 'YOLO', 'Pascal VOC', 'LabelMe', 'LVIS' or 'Objects365'.
        classes: names in the order of the categories.
        has_masks: whether every object has a mask.
        notes: sentences for the user: what was split off, omitted, counted.
    """

    form: str
    classes: tuple[str, ...]
    train: Split
    val: Split
    test: Split | None
    has_masks: bool
    notes: tuple[str, ...]

    @property
    def splits(self) -> dict[str, Split]:
        parts = {"train": self.train, "val": self.val, "test": self.test}
        return {name: part for name, part in parts.items() if part is not None}

    def summary(self) -> str:
        """Return one line: the form, images of each split, objects, classes."""
        images = ", ".join(f"{len(split.content['images'])} {name}" for name, split in self.splits.items())
        objects = sum(len(split.content["annotations"]) for split in self.splits.values())
        masks = "with masks" if self.has_masks else "without masks"
        names = f"{len(self.classes)} class{'es' * (len(self.classes) != 1)} ({listed(self.classes, 10)})"
        return f"{self.form}: images {images}; {objects} objects {masks}; {names}"


def open_dataset(path: str | Path, *, val_fraction: float = 0.1, seed: int = 0) -> OwnDataset:
    """Read a dataset in any of the forms of docs/own_data.md.

    Args:
        path: a folder, a COCO JSON, or a YAML of YOLO.
        val_fraction: part of the images that is split off for validation if the dataset has no validation part.
        seed: random seed of that split.

    Raises:
        DatasetError: if the form is not recognized, or something must be decided or fixed first.
    """
    path = Path(os.path.abspath(os.path.expanduser(path)))
    if not path.exists():
        raise DatasetError(f"{path} does not exist; give a folder, a COCO JSON or a YAML of YOLO")
    if path.is_dir():
        reading = _read_folder(path)
    elif path.suffix.lower() == ".json":
        reading = coco.read_file(path)
    elif path.suffix.lower() in yolo.SUFFIXES:
        reading = yolo.read_yaml(path)
    else:
        raise DatasetError(f"{path} is neither a folder nor a JSON nor a YAML; give the folder of the dataset")
    notes = list(reading.notes)
    if "test" in reading.parts and not reading.parts["test"].annotations:
        notes.append(f"the test part ({reading.parts.pop('test').source}) has no objects and is omitted")
    classes = _unify_classes(reading.parts, notes)
    if "val" not in reading.parts:
        _split_off(reading.parts, notes, path, val_fraction, seed)
    else:
        _count_shared(reading.parts["train"], reading.parts["val"], notes)
    for name, part in reading.parts.items():
        if not part.images or not part.annotations:
            what = "images" if not part.images else "objects"
            remedy = "" if name == "train" else f", or remove it{' and a part of train is taken' * (name == 'val')}"
            raise DatasetError(f"the {name} part ({part.source}) contains no {what}; add some{remedy}")
    splits = {name: _relative(part) for name, part in reading.parts.items()}
    objects = [a for part in reading.parts.values() for a in part.annotations if not a.get("iscrowd")]
    with_mask = sum(bool(a.get("segmentation")) for a in objects)
    if 0 < with_mask < len(objects):
        notes.append(f"{len(objects) - with_mask} of {len(objects)} objects have no mask, so masks are not used")
    return OwnDataset(
        form=reading.form,
        classes=classes,
        train=splits["train"],
        val=splits["val"],
        test=splits.get("test"),
        has_masks=with_mask == len(objects),
        notes=tuple(notes),
    )


def write_splits(dataset: OwnDataset, folder: str | Path) -> dict[str, Path]:
    """Write train.json, val.json and, if there is one, test.json in COCO's form; return their paths by split."""
    paths = {}
    for name, split in dataset.splits.items():
        paths[name] = Path(folder) / f"{name}.json"
        write_file(paths[name], json.dumps(split.content))
    return paths


def _read_folder(folder: Path) -> Reading:
    files, notes = Files(folder), []  # type: tuple[Files, list[str]]
    instances, shapes = _read_jsons(files, notes)
    yamls = [path for suffix in yolo.SUFFIXES for path in files.by_suffix[suffix] if yolo.is_dataset(path)]
    annotations = voc.read_xmls(files.by_suffix[".xml"])
    present: dict[str, Collection[Path]] = {
        "COCO": instances, "YOLO": yamls, "Pascal VOC": annotations, "LabelMe": shapes
    }  # fmt: skip
    forms = {form: paths for form, paths in present.items() if paths}
    if len(forms) > 1:
        examples = ", ".join(f"{form} ({files.relative(next(iter(paths)))})" for form, paths in forms.items())
        raise DatasetError(
            f"{folder} has labels in several forms: {examples}; give the path of the JSON or YAML, or move the others"
        )
    if instances:
        return coco.read_folder(files, instances, notes)
    if yamls:
        if len(yamls) > 1:
            names = listed([files.relative(path) for path in yamls])
            raise DatasetError(f"{folder} has several YAML files of YOLO, {names}; give the path of one of them")
        return yolo.read_yaml(yamls[0])
    if annotations:
        return voc.read_folder(files, annotations, notes)
    if shapes:
        return labelme.read_folder(files, shapes, notes)
    raise DatasetError(f"{folder} {_why_nothing(files)} (docs/own_data.md)")


def _read_jsons(files: Files, notes: list[str]) -> tuple[dict[Path, Any], dict[Path, Any]]:
    """Read the JSON files of a folder; return the contents of COCO's and of LabelMe's by path."""
    paths = files.by_suffix[".json"]
    named = [path for path in paths if coco.is_other_task(path)]
    if named:
        notes.append(f"omitted by their names: {listed([files.relative(path) for path in named])}")
    instances, shapes, others = {}, {}, []
    for path in progress([path for path in paths if path not in set(named)], "reading JSON files"):
        content = read_json(path)
        if coco.is_instances(content):
            instances[path] = content
        elif labelme.is_labelme(content):
            shapes[path] = content
        else:
            others.append(files.relative(path))
    if others:
        notes.append(f"omitted, as they contain no objects: {listed(others)}")
    return instances, shapes


def _why_nothing(files: Files) -> str:
    if not files.images and not any(files.by_suffix.values()):
        return f"is empty; give a folder with images and {FORMS}"
    labels = [path for path in files.by_suffix[".txt"] if "labels" in path.parts]
    if labels:
        return (
            f"has {len(labels)} label files of YOLO, but no data.yaml that names the classes; write one with the lines "
            "'train: images/train', 'val: images/val' and 'names: [FIRST, SECOND]'"
        )
    return f"has {len(files.images)} images, but no labels; add {FORMS}"


def _unify_classes(parts: dict[str, Part], notes: list[str]) -> tuple[str, ...]:
    """Give all parts the categories of train."""
    if "train" not in parts:
        raise DatasetError(
            f"there is no training part, only {' and '.join(parts)} ({next(iter(parts.values())).source}); "
            "add one, or name one of them train"
        )
    for part in parts.values():
        for i, category in enumerate(part.categories):
            if not isinstance(category.get("name"), str):
                raise DatasetError(f"{part.source}: categories[{i}] has no name; add it")
            category["name"] = unicodedata.normalize("NFC", category["name"])
        _drop_parents(part, parts, notes)
        names = Counter(category["name"] for category in part.categories)
        repeated = [name for name, count in names.items() if count > 1]
        if repeated:
            raise DatasetError(f"{part.source} has several categories named {listed(repeated)}; rename or merge them")
    train = parts["train"]
    ids = {category["name"]: category["id"] for category in train.categories}
    for split, part in parts.items():
        own = {category["name"]: category["id"] for category in part.categories}
        added = [name for name in own if name not in ids]
        if added:
            raise DatasetError(
                f"train ({train.source}) has the classes {listed(list(ids), 20)}, but {split} ({part.source}) has also "
                f"{listed(added, 20)}; give both the same categories"
            )
        if len(own) < len(ids):
            absent = [name for name in ids if name not in own]
            notes.append(f"{split} has no class {listed(absent)}; it gets the {len(ids)} classes of train")
        if own != ids:
            new = {str(number): ids[name] for name, number in own.items()}
            for annotation in part.annotations:
                annotation["category_id"] = new.get(str(annotation.get("category_id")), annotation.get("category_id"))
        part.categories = train.categories
    return tuple(ids)


def _drop_parents(part: Part, parts: Mapping[str, Part], notes: list[str]) -> None:
    """Remove the category that Roboflow adds as the parent of all classes, if nothing refers to it."""
    used = {str(a.get("category_id")) for other in parts.values() for a in other.annotations}
    names = {category.get("supercategory") for category in part.categories}
    for category in list(part.categories):
        is_parent = category.get("supercategory") in (None, "", "none") and category["name"] in names
        if is_parent and str(category["id"]) not in used:
            part.categories.remove(category)
            note = f"category {category['name']!r} is the parent of others, has no objects and is omitted"
            if note not in notes:
                notes.append(note)


def _split_off(parts: dict[str, Part], notes: list[str], path: Path, fraction: float, seed: int) -> None:
    train = parts["train"]
    files = {str(image["id"]): image["file_name"] for image in train.images}
    classes: dict[str, set[str]] = {}
    for annotation in train.annotations:
        classes.setdefault(str(annotation["image_id"]), set()).add(str(annotation.get("category_id")))
    chosen, duplicates = split_off(files, classes, fraction=fraction, seed=seed)
    if not chosen:
        raise DatasetError(
            f"{path} has no validation part, and its {len(files)} image{'s are' if len(files) != 1 else ' is'} one; "
            "add another image, or a validation part"
        )
    parts["val"] = Part(
        train.source,
        [image for image in train.images if str(image["id"]) in chosen],
        [annotation for annotation in train.annotations if str(annotation["image_id"]) in chosen],
        train.categories,
    )
    train.images = [image for image in train.images if str(image["id"]) not in chosen]
    train.annotations = [a for a in train.annotations if str(a["image_id"]) not in chosen]
    same = f"; {duplicates} duplicates stay with their originals" if duplicates else ""
    notes.append(
        f"there is no validation part: {len(chosen)} of {len(files)} images were split off (seed {seed}, stratified by "
        f"class{same})"
    )


def _count_shared(train: Part, val: Part, notes: list[str]) -> None:
    """Note how many validation images are in the training part too: their results are too good."""
    sizes = {os.path.getsize(image["file_name"]) for image in val.images}
    paths = {f"val {i}": image["file_name"] for i, image in enumerate(val.images)}
    for i, image in enumerate(train.images):
        if os.path.getsize(image["file_name"]) in sizes:
            paths[f"train {i}"] = image["file_name"]
    shared = 0
    for group in identical_files(paths):
        if len({name.split()[0] for name in group}) == 2:
            shared += sum(name.startswith("val") for name in group)
    if shared:
        notes.append(f"{shared} of {len(val.images)} validation images are also in train, so results are too good")


def _relative(part: Part) -> Split:
    """Make the names of images relative to the folder that has all of them."""
    folders = {os.path.dirname(image["file_name"]) for image in part.images}
    root = os.path.commonpath(folders)
    for image in part.images:
        image["file_name"] = os.path.relpath(image["file_name"], root)
    content = dict(images=part.images, annotations=part.annotations, categories=part.categories)
    return Split(content, Path(root), part.source)

