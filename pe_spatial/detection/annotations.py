"""COCO annotation files, checked and cleaned: datasets and metrics read them here, so that both have the same objects.

What is accepted, counted and refused: docs/inputs.md.
"""

import json
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from mmengine import fileio

from pe_spatial.engine.checks import neighbors
from pe_spatial.errors import DatasetError, listed

_ROUNDING = 0.5  # pixels by which a box may leave its image: it stays as it is and is not counted as clipped
_FAR = 10  # a polygon that leaves its image by more than this many long sides is not usable

Fields = Mapping[str, Mapping[str, Callable[[Any], object]]]
Content = dict[str, Any]


def is_string(value: Any) -> bool:
    return isinstance(value, str)


def is_id(value: Any) -> bool:
    return type(value) in (int, str)


def is_size(value: Any) -> bool:
    return is_number(value) and value > 0 and value == int(value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


COCO_FIELDS: Fields = {
    "images": {"id": is_id, "file_name": lambda x: is_string(x) and x, "height": is_size, "width": is_size},
    "categories": {"id": is_id, "name": is_string},
    "annotations": {"image_id": is_id, "category_id": is_id, "bbox": lambda _: True},  # boxes are counted
}


def read_coco(
    path: str,
    *,
    annotated: bool,
    masks: bool,
    backend_args: Mapping[str, Any] | None = None,
    fields: Fields = COCO_FIELDS,
) -> tuple[Content, Counter[str]]:
    """Read, check and clean a COCO json.

    Annotations get ids from 1, area and iscrowd; boxes are clipped to their image; unusable ones are removed. Objects
    with `ignore` become crowds too, which evaluation ignores as training does.

    Args:
        path: a file, or an address of mmengine's file backends.
        annotated: whether it must contain annotations (a test set need not).
        masks: whether masks will be used. Then each object must have one; if it cannot be used, the object is ignored.
        backend_args: options of mmengine's file backend.
        fields: the lists that the file must contain, and a check for each key of their entries.

    Returns:
        The content, and counts: of boxes 'clipped' (by more than rounding) and of those that are not learned, by reason
        (`SKIPPED`, `IGNORED`).

    Raises:
        DatasetError: if the file is missing, is not COCO json, or has errors that cannot be skipped.
    """
    content = _read_json(path, backend_args)
    _check_fields(content, path, fields, annotated=annotated)
    try:
        _unify_categories(content)
        _unify_images(content)
        return content, _clean(content, masks=masks)
    except _Problem as problem:
        raise DatasetError(f"{path}: {problem}") from problem.__cause__


def as_nfc(names: Iterable[str]) -> tuple[str, ...]:
    """Return names in one form of Unicode: an accent may be written as a part of its letter or after it."""
    return tuple(unicodedata.normalize("NFC", name) for name in names)


class _Problem(Exception):
    """A DatasetError without the name of the file."""


def _read_json(path: str, backend_args: Mapping[str, Any] | None) -> Content:
    try:
        data = fileio.get(path, backend_args=backend_args)
        text = data.decode(json.detect_encoding(data))  # with or without byte order mark
        del data
        return json.loads(text)
    except FileNotFoundError:
        raise DatasetError(
            f"no annotation file at {path}; {neighbors(path)}. Check data_root (--data-root) and ann_file"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{path} cannot be read as text ({error}); give a COCO json") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid json ({error}); download or write it again") from error


def _check_fields(content: Any, path: str, fields: Fields, *, annotated: bool) -> None:
    if isinstance(content, dict) and not annotated:
        content.setdefault("annotations", [])
    for name, keys in fields.items():
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DatasetError(
                f"{path} is not a COCO instance file: it has no list {name!r}; give an instances_*.json "
                "(for LVIS, an lvis_v1_*.json)"
            )
        entries = content[name]
        for key, holds in keys.items():
            try:
                if all(map(holds, [entry[key] for entry in entries])):
                    continue
            except (KeyError, TypeError, IndexError):
                pass
            i, entry = next(
                (i, entry)
                for i, entry in enumerate(entries)
                if not isinstance(entry, dict) or key not in entry or not holds(entry[key])
            )
            if not isinstance(entry, dict) or key not in entry:
                raise DatasetError(f"{path}: {name}[{i}] has no {key}; fix or remove it")
            raise DatasetError(f"{path}: {name}[{i}] has {key} {entry[key]!r}; fix or remove it")
        times = Counter(entry["id"] for entry in entries) if "id" in keys else {}
        repeated = [key for key, count in times.items() if count > 1]
        if repeated:
            raise DatasetError(f"{path}: {name} contains ids more than once ({listed(repeated)}); make them unique")
    if not content["images"] or (annotated and not content["annotations"]):
        what = "images" if not content["images"] else "annotations, so there is nothing to learn from it"
        raise DatasetError(f"{path} contains no {what}; give the file of an annotated set")


def _unify_categories(content: Content) -> None:
    """Make category ids numbers, names NFC, and remove parents of exporters that nothing refers to."""
    categories, annotations = content["categories"], content["annotations"]
    for i, category in enumerate(categories):
        try:
            category["id"] = int(category["id"])
        except ValueError:
            raise _Problem(f"categories[{i}] has id {category['id']!r}; number the categories") from None
        (category["name"],) = as_nfc([category["name"]])
    defined = {category["id"] for category in categories}
    if len(defined) < len(categories):
        raise _Problem("categories contains ids that are equal as numbers; make them unique")
    unknown = _resolve(annotations, "category_id", defined)
    if unknown:
        text = f"; {next(iter(unknown))!r} is text, ids are numbers" if type(next(iter(unknown))) is str else ""
        raise _Problem(
            f"{unknown.total()} annotations have category ids that the file does not define "
            f"({listed(sorted(unknown, key=str))}{text}); add these categories or remove the annotations"
        )
    used = {annotation["category_id"] for annotation in annotations}
    first: dict[str, Any] = {}
    for category in list(categories):
        other = first.setdefault(category["name"], category)
        if other is category:
            continue
        parent = next((c for c in (other, category) if c["id"] not in used and _is_parent(c, categories)), None)
        if parent is None:
            raise _Problem(
                f"categories {other['id']} and {category['id']} are both named {category['name']!r}; "
                "give one of them another name, or move its annotations to the other and remove it"
            )
        categories.remove(parent)
        first[category["name"]] = category if parent is other else other


def _is_parent(category: Mapping[str, Any], categories: Sequence[Mapping[str, Any]]) -> bool:
    return category.get("supercategory") in (None, "", "none") and any(
        other.get("supercategory") == category["name"] for other in categories
    )


def _unify_images(content: Content) -> None:
    """Make sizes integers and image ids of one kind: pycocotools sorts them with NumPy."""
    images, annotations = content["images"], content["annotations"]
    for image in images:
        image["height"], image["width"] = int(image["height"]), int(image["width"])
    ids = [image["id"] for image in images]
    unknown = _resolve(annotations, "image_id", set(ids))
    if unknown and unknown.total() == len(annotations):
        refers, has = next(iter(unknown)), ids[0]
        kinds = ["text" if type(i) is str else "a number" for i in (refers, has)]
        raise _Problem(
            f"no annotation belongs to an image: {unknown.total()} annotations are of unknown images, such as image_id "
            f"{refers!r} ({kinds[0]}); ids of images are such as {has!r} ({kinds[1]}). Write the ids of images there"
        )
    if set(map(type, ids)) == {int} and max(map(abs, ids)) >= 2**63:  # more than NumPy sorts exactly
        ids.append("")
    if len(set(map(type, ids))) > 1:
        for image in images:
            image["id"] = str(image["id"])
        for annotation in annotations:
            annotation["image_id"] = str(annotation["image_id"])


def _resolve(annotations: Sequence[dict[str, Any]], key: str, defined: set[Any]) -> Counter[Any]:
    """Let `key` refer to the ids that are defined, where a number is text on one of the sides; count the others."""
    unknown = Counter(a[key] for a in annotations if a[key] not in defined)
    if not unknown:
        return unknown
    forms: dict[Any, Any] = {str(i): i for i in defined if type(i) is int}
    forms.update((int(i), i) for i in defined if type(i) is str and i.isdecimal())
    if set(unknown) <= set(forms):
        for annotation in annotations:
            annotation[key] = forms.get(annotation[key], annotation[key])
        unknown.clear()
    return unknown


SKIPPED = ("outside", "smaller than a pixel", "not finite", "of unknown images")
IGNORED = ("crowds", "ignored", "with an unusable polygon")


def _clean(content: Content, *, masks: bool) -> Counter[str]:
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    counts: Counter[str] = Counter()
    kept, without = [], []
    for i, annotation in enumerate(content["annotations"]):
        size = sizes.get(annotation["image_id"])
        if size is None:
            counts["of unknown images"] += 1
            continue
        box, kind = _clip(annotation["bbox"], *size)
        if kind:
            counts[kind] += 1
        if box is None:
            continue
        annotation["bbox"] = box
        annotation["area"] = _area(annotation.get("area"), box, size)
        name = f"annotation {annotation.get('id', i)}"
        crowd = _flag(annotation, "iscrowd", name)
        if annotation.get("ignore") is not None and _flag(annotation, "ignore", name):
            annotation["iscrowd"] = 1
            counts["ignored"] += 1
        elif crowd:
            counts["crowds"] += 1
        if masks:
            if not annotation.get("segmentation") and not annotation["iscrowd"]:
                without.append(annotation.get("id", i))
            elif not _has_mask(annotation, *size, name):
                counts["with an unusable polygon"] += not annotation["iscrowd"]
                annotation["iscrowd"], annotation["segmentation"] = 1, [_corners(box)]
        kept.append(annotation)
    if without:
        raise _Problem(
            f"{len(without)} annotations have no segmentation (ids {listed(without)}), but masks are used; add them, "
            "or do without masks (with_mask=False and no mask head; metric='bbox')"
        )
    for i, annotation in enumerate(kept, 1):
        annotation["id"] = i  # pycocotools loses objects whose id is 0 or not unique
    content["annotations"] = kept
    return counts


def _clip(box: Any, width: int, height: int) -> tuple[list[float] | None, str]:
    """Return the part of `box` (x, y, w, h) inside the image, or None if unusable, and how to count it."""
    try:
        x, y, w, h = box
        right, bottom = x + w, y + h
        if w >= 1 and h >= 1 and x >= 0 and y >= 0 and right <= width and bottom <= height:
            return box, ""
    except (TypeError, ValueError):
        return None, "not finite"
    if not isinstance(box, list) or not all(map(is_number, box)):
        return None, "not finite"
    moved = max(-x, -y, right - width, bottom - height)
    x, y, right, bottom = max(x, 0), max(y, 0), min(right, width), min(bottom, height)
    if w > 0 and h > 0 and (right <= x or bottom <= y):
        return None, "outside"
    if right <= x or bottom <= y:
        return None, "smaller than a pixel"
    if moved > _ROUNDING:
        box = [x, y, right - x, bottom - y]
    if right - x < 1 or bottom - y < 1:  # MMDetection does not learn these, COCO evaluates them
        return box, "smaller than a pixel"
    return box, "clipped" if moved > _ROUNDING else ""


def _area(area: Any, box: Sequence[float], size: tuple[int, int]) -> float:
    """Return the area of an annotation, or that of its box if it has none that its image could hold."""
    return area if type(area) in (int, float) and 0 < area <= size[0] * size[1] else box[2] * box[3]


_FLAGS = {0: 0, 1: 1, None: 0, "0": 0, "1": 1}


def _flag(annotation: dict[str, Any], key: str, name: str) -> int:
    value = annotation.get(key)
    try:
        annotation[key] = _FLAGS[value]
    except (KeyError, TypeError):
        raise _Problem(f"{name} has {key} {value!r}; write 0 or 1") from None
    return annotation[key]


def _corners(box: Sequence[float]) -> list[float]:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _has_mask(annotation: dict[str, Any], width: int, height: int, name: str) -> bool:
    """Keep the usable polygons of an annotation, or check its runs; return whether a mask remains."""
    shape = annotation.get("segmentation")
    if isinstance(shape, Mapping):
        problem = _problem_of_runs(shape, width, height)
        if problem:
            raise _Problem(f"{name} has a run-length mask {problem}")
        return True
    if not shape:
        return False
    far = _FAR * max(width, height)
    try:
        # One call in C tells the polygons of almost all objects from those to look at closely.
        if all(5 < len(p) < math.hypot(*p) < far and not len(p) % 2 for p in shape):
            return True
        usable = [polygon for polygon in shape if _is_usable(polygon, annotation["bbox"], far)]
    except (TypeError, OverflowError) as error:
        raise _Problem(
            f"{name} has the segmentation {str(shape)[:60]}, which is not a list of polygons [[x, y, x, y, ...], ...] "
            "of numbers; write it as one"
        ) from error
    if 0 < len(usable) < len(shape):
        annotation["segmentation"] = usable
    return bool(usable)


def _is_usable(polygon: Sequence[float], box: Sequence[float], far: float) -> bool:
    if not isinstance(polygon, list):
        raise TypeError
    if len(polygon) < 6 or len(polygon) % 2:
        math.hypot(*polygon)  # TypeError if there is anything but numbers
        return False
    largest = max(map(math.fabs, polygon))
    normalized = largest <= 1 and max(box[0] + box[2], box[1] + box[3]) > 2  # coordinates are not in pixels
    return math.isfinite(math.hypot(*polygon)) and largest < far and not normalized


def _problem_of_runs(mask: Mapping[str, Any], width: int, height: int) -> str:
    """Return what is wrong with a run-length mask, or ''."""
    size, counts = mask.get("size"), mask.get("counts")
    if not isinstance(size, list) or not isinstance(counts, list | str):
        return "without size or counts; write dict(size=[height, width], counts=...)"
    if size != [height, width]:
        return (
            f"of {'x'.join(map(str, size))} pixels, but its image is {height}x{width} (height x width); "
            "fix its size, or the image_id"
        )
    try:
        runs = _decompressed(counts).tolist() if isinstance(counts, str) else counts
        readable = set(map(type, runs)) == {int} and min(runs) >= 0
    except ValueError:
        readable = False
    if not readable:
        return "with counts that cannot be read; write it again"
    total = sum(runs)
    if total != width * height:
        return f"with counts that sum up to {total} pixels, but its image has {width * height}; write it again"
    return ""


def _decompressed(counts: str) -> np.ndarray:
    """Decode COCO's compressed counts: digits of 5 bits, from the third run on differences to the last but one."""
    digits = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(digits & 32 == 0)
    if len(ends) == 0 or ends[-1] != len(digits) - 1 or digits.min() < 0 or digits.max() > 63:
        raise ValueError
    starts = np.concatenate(([0], ends[:-1] + 1))
    place = np.arange(len(digits)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 7:
        raise ValueError
    runs = np.add.reduceat((digits & 31) << (5 * place), starts)
    runs -= np.where(digits[ends] & 16, 1 << (5 * (place[ends] + 1)), 0)  # the sign
    runs[2::2] = np.cumsum(runs[2::2])
    runs[1::2] = np.cumsum(runs[1::2])
    return runs
