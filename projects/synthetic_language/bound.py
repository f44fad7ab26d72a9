"""Average precision of the detector on classes with and without boxes in training, beside its bounds.

python projects/synthetic_language/bound.py work_dirs/words/detector/iter_250.pth work_dirs/words/world \
    --core work_dirs/words/core.safetensors
"""

import argparse
import contextlib
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_iou
from words import CLASSES, LEFT_OUT, NO_BOXES

import pe_spatial
from pe_spatial.predict.results import Detections

GROUPS = {
    "with boxes": [name for name in CLASSES if name not in NO_BOXES],
    "cones": [name for name in CLASSES if name.endswith("cone") and name not in LEFT_OUT],
    "unseen pairs": list(LEFT_OUT),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("world", type=Path)
    parser.add_argument("--core", required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    predictor = pe_spatial.load(args.checkpoint, words=args.core)
    file = args.world / "annotations" / "words_val.json"
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(file))
    images = sorted(truth.imgs.values(), key=lambda image: image["id"])
    paths = [args.world / "val" / image["file_name"] for image in images]
    found = predictor(paths)
    rng = np.random.default_rng(0)
    rows = {
        "names in the classifier": found,
        "true class of the best overlap (bound)": [
            true_class(one, image, truth) for one, image in zip(found, images, strict=True)
        ],
        "random class (chance)": [replace(one, labels=rng.integers(len(CLASSES), size=len(one))) for one in found],
        "proposals named from tokens, no training on names": predictor(paths, classes=CLASSES),
        "proposals named from crops, no training on names": predictor(paths, classes=CLASSES, by="crops"),
    }
    print("box AP50 | " + " | ".join(GROUPS))
    for title, results in rows.items():
        print(f"{title} | " + " | ".join(f"{100 * value:.1f}" for value in average_precision(truth, images, results)))


def true_class(found: Detections, image: dict, truth: COCO) -> Detections:
    """Give each detection the class of the object that it overlaps most."""
    objects = truth.imgToAnns[image["id"]]
    boxes = np.array([one["bbox"] for one in objects], np.float32).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    if not len(boxes) or not len(found):
        return found
    best = box_iou(torch.from_numpy(found.boxes), torch.from_numpy(boxes)).argmax(1)
    return replace(found, labels=np.array([objects[i]["category_id"] - 1 for i in best]))


def average_precision(truth: COCO, images: list[dict], results: list[Detections]) -> list[float]:
    """Return AP50 of each group."""
    detections = [one for image, result in zip(images, results, strict=True) for one in result.to_coco(image["id"])]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(truth, truth.loadRes(json.loads(json.dumps(detections))), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"][0, :, :, 0, -1]  # (recalls, classes)
    values = []
    for names in GROUPS.values():
        part = precision[:, [CLASSES.index(name) for name in names]]
        values.append(part[part > -1].mean())
    return values


if __name__ == "__main__":
    main()
