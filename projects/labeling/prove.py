"""Label the clips of a synthetic world from the boxes of their first frames, beside the same clips with true labels.

python projects/labeling/prove.py TRACKER.pth --world work_dirs/multitask/world --out work_dirs/labeling

Only objects that are in the first frame are labeled; what comes into a clip later is missing, as it would be for a
person who marks one frame. OUT/labels and OUT/truth are datasets for `train --data`, with the same frames and the same
validation part: split `val` of the world. The tracker takes masks, so boxes become masks by GrabCut (OpenCV) first.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image

import pe_spatial
from pe_spatial.atomic import write_json
from pe_spatial.images import read_rgb
from pe_spatial.labeling.project import LabelProject
from pe_spatial.tracking.sam2.session import Drawn


def cut_out(rgb: np.ndarray, box: list[float]) -> np.ndarray:
    """Return the mask (H, W) bool of what is in a box (x, y, width, height)."""
    x, y, width, height = map(round, box)
    mask = np.full(rgb.shape[:2], cv2.GC_BGD, np.uint8)
    mask[y : y + height, x : x + width] = cv2.GC_PR_FGD
    cv2.grabCut(rgb[..., ::-1].copy(), mask, None, np.zeros((1, 65)), np.zeros((1, 65)), 5, cv2.GC_INIT_WITH_MASK)
    found = (mask == cv2.GC_FGD) | (mask == cv2.GC_PR_FGD)
    if not found.any():
        found[y : y + height, x : x + width] = True
    return found


def label_clip(project: LabelProject, first: list[dict[str, Any]], names: dict[int, str]) -> None:
    """Label a clip from the boxes of its first frame."""
    rgb = read_rgb(project.session.video.frames[0])
    for one in first:
        for _ in project.prompt(0, Drawn(one["object_id"], cut_out(rgb, one["bbox"]))):
            pass
        project.name(one["object_id"], names[one["category_id"]])
    for _ in project.track():
        pass
    project.export(["coco"])


def overlaps(project: LabelProject, truth: Path) -> list[float]:
    """Return the IoU of each labeled object with the truth, on each frame but the first where either is."""
    found = []
    for t, path in enumerate(sorted(truth.glob("*.png"))[1:], 1):
        real, labeled = np.asarray(Image.open(path)), project.session.mask(t)
        for i in project.session.objects:
            union = ((real == i) | (labeled == i)).sum()
            found += [((real == i) & (labeled == i)).sum() / union] if union else []
    return found


def absolute(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return COCO's lists with complete paths of images."""
    images = [{**image, "file_name": str((folder / image["file_name"]).resolve())} for image in content["images"]]
    return {**content, "images": images}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tracker")
    parser.add_argument("--world", type=Path, default=Path("work_dirs/multitask/world"))
    parser.add_argument("--out", type=Path, default=Path("work_dirs/labeling"))
    args = parser.parse_args()
    start, tracker = time.monotonic(), pe_spatial.load(args.tracker)
    shutil.rmtree(args.out, ignore_errors=True)
    truth, val = (json.loads((args.world / f"annotations/instances_{x}.json").read_text()) for x in ("test", "val"))
    names = {one["id"]: one["name"] for one in truth["categories"]}
    seconds, ious, prompts = 0.0, [], 0
    for video in truth["videos"]:
        begin = time.monotonic()
        first = next(x for x in truth["images"] if x["video_id"] == video["id"] and x["frame_id"] == 0)
        boxes = [one for one in truth["annotations"] if one["image_id"] == first["id"]]
        folder = args.world / "test" / video["name"]
        project = LabelProject(args.out / "labels" / video["name"], folder, tracker.start(), max_frames=100)
        label_clip(project, boxes, names)
        seconds, prompts = seconds + time.monotonic() - begin, prompts + len(boxes)
        ious += overlaps(project, args.world / "instances" / "test" / video["name"])
        project.session.close()
    for kind in ("labels", "truth"):
        write_json(args.out / kind / "annotations" / "instances_val.json", absolute(val, args.world / "val"))
    write_json(args.out / "truth" / "annotations" / "instances_train.json", absolute(truth, args.world / "test"))
    print(
        f"{prompts} boxes in {len(truth['videos'])} clips, {len(truth['images'])} frames: {seconds:.0f} s of labeling "
        f"({time.monotonic() - start:.0f} s in all); IoU with the truth after the first frame {np.mean(ious):.3f}, "
        f"median {np.median(ious):.3f}"
    )


if __name__ == "__main__":
    main()
