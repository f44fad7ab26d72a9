"""Detections and annotations, checked against each other, and matched image by image."""

import contextlib
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO

from pe_spatial.detection.annotations import as_nfc, is_number, read_coco
from pe_spatial.errors import DatasetError, listed

MOST = 100
"""Detections of an image that count: those with the highest scores, as in COCO and TIDE."""

Detection = Mapping[str, Any]


def read_truth(path: str, *, masks: bool) -> COCO:
    """Read an annotation file as training and evaluation do; DatasetError if it has no objects."""
    content, _ = read_coco(path, annotated=True, masks=masks)
    truth = COCO()
    truth.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    if all(annotation["iscrowd"] for annotation in content["annotations"]):
        raise DatasetError(f"{path} has no object that is evaluated, only crowds; give the file of an annotated set")
    if masks:
        for annotation in content["annotations"]:
            annotation["segmentation"] = truth.annToRLE(annotation)
    return truth


def find_images(path: str, truth: COCO) -> str | None:
    """Return the folder of the images of an annotation file: beside it or one above, or in a folder named for it."""
    part = Path(path).stem.split("_")[-1]  # val2017 of instances_val2017
    first = next(iter(truth.imgs.values()))["file_name"]
    around = (Path(path).parent, Path(path).parent.parent)
    places = (place / name for place in around for name in (".", part, "images", f"images/{part}"))
    return next((str(place) for place in places if (place / first).is_file()), None)


def read_results(path: str | Path, truth: COCO, *, masks: bool) -> list[dict[str, Any]]:
    """Read detections in COCO's form, each with a bbox, and with a segmentation if `masks`.

    They are a list as `test --out` writes it, or the predictions.json of `predict`, whose images and categories are
    those of `truth` with the same names. DatasetError for a file that is neither, is empty, or belongs to other images
    or categories.
    """
    path = Path(path)
    if not path.is_file():
        raise DatasetError(f"there is no file {path}; give what `test --out FILE.json` writes")
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON ({error}); give what `test --out FILE.json` writes") from error
    if isinstance(results, dict) and results.keys() >= {"images", "categories", "annotations"}:
        results = _of_truth(results, truth)
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise DatasetError(f"{path} is no list of detections; give what `test --out FILE.json` writes")
    if not results:
        raise DatasetError(f"{path} holds no detections, so there is nothing to analyze; check the score threshold")
    for i, one in enumerate(results):
        missing = [key for key in ("image_id", "category_id", "score") if key not in one]
        missing += [] if one.get("bbox") or one.get("segmentation") else ["bbox"]
        missing += ["segmentation"] if masks and not one.get("segmentation") else []
        if missing or not is_number(one["score"]):
            what = f"no {missing[0]}" if missing else f"the score {one['score']!r}"
            hint = "; omit --masks" if missing == ["segmentation"] else ""
            raise DatasetError(f"{path}: detection {i} has {what}{hint or '; write the file again'}")
        if not one.get("bbox"):
            one["bbox"] = rle.toBbox(one["segmentation"]).tolist()
    for key, known, name in (("image_id", truth.imgs, "images"), ("category_id", truth.cats, "categories")):
        unknown = sorted({one[key] for one in results} - set(known), key=str)
        if unknown:
            raise DatasetError(
                f"{path} has detections of {name} that the annotations do not have ({listed(unknown)}); "
                "give the annotations and the results of one set"
            )
    return results


def _of_truth(predictions: Mapping[str, Any], truth: COCO) -> list[dict[str, Any]]:
    """Return the annotations of a predictions.json with the ids of `truth`, or with names that it does not have.

    Classes have the same name; of an image the folders may differ, unless `truth` has several files of that name.
    """
    names = {image["id"]: as_nfc([image["file_name"]])[0] for image in truth.imgs.values()}
    ends = Counter(PurePath(name).name for name in names.values())
    images = {name: i for i, name in names.items()}
    images |= {PurePath(name).name: i for i, name in names.items() if ends[PurePath(name).name] == 1}
    classes = {as_nfc([category["name"]])[0]: i for i, category in truth.cats.items()}
    ids = {}
    for image in predictions["images"]:
        (name,) = as_nfc([image["file_name"]])
        ids[image["id"]] = images.get(name, images.get(PurePath(name).name, name))
    labels = {}
    for category in predictions["categories"]:
        (name,) = as_nfc([category["name"]])
        labels[category["id"]] = classes.get(name, name)
    return [
        dict(one, image_id=ids[one["image_id"]], category_id=labels[one["category_id"]])
        for one in predictions["annotations"]
    ]


@dataclass(frozen=True)
class Scene:
    """An image: its objects, its detections, and how they overlap.

    Attributes:
        image: id.
        objects: annotations that are not crowds.
        crowds: the others.
        detections: at most `MOST`, highest score first.
        iou: (detections, objects).
        crowd_iou: (detections, crowds), intersection over the area of the detection.
    """

    image: Any
    objects: Sequence[Mapping[str, Any]]
    crowds: Sequence[Mapping[str, Any]]
    detections: Sequence[Detection]
    iou: np.ndarray
    crowd_iou: np.ndarray


def match_scenes(truth: COCO, results: Sequence[Detection], *, masks: bool) -> list[Scene]:
    """Return the scene of every annotated image, in the order of the file."""
    shape = "segmentation" if masks else "bbox"
    own: dict[Any, list[Detection]] = {}
    for one in results:
        own.setdefault(one["image_id"], []).append(one)
    scenes = []
    for image in truth.imgs:
        annotations = truth.imgToAnns.get(image, [])
        parts = [[a for a in annotations if bool(a["iscrowd"]) == crowd] for crowd in (False, True)]
        detections = sorted(own.get(image, []), key=lambda one: -one["score"])[:MOST]
        found = [one[shape] for one in detections]
        overlaps = [
            np.array(rle.iou(found, [a[shape] for a in part], [int(crowd)] * len(part))).reshape(len(found), len(part))
            for part, crowd in zip(parts, (False, True), strict=True)
        ]
        scenes.append(Scene(image, parts[0], parts[1], detections, overlaps[0], overlaps[1]))
    return scenes
