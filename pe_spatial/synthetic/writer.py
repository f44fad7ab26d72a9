"""Scenes on disk: images, COCO annotations with boxes, masks and tracks, depth and instance maps.

    <root>/world.json                              parameters and version of the dataset
    <root>/annotations/instances_<split>.json      COCO, with `videos` and per-image camera
    <root>/<split>/<scene>/<frame>.jpg             rgb, e.g. train/0003/00001.jpg
    <root>/depth/<split>/<scene>/<frame>.png       16 bit, millimeters along the optical axis, always valid (> 0)
    <root>/instances/<split>/<scene>/<frame>.png   palette, 0 = room, else the object's number in its scene

An image's `file_name` is `<scene>/<frame>.jpg`; depth and instances have the same name with `.png`. Beyond COCO, an
image has `video_id, frame_id, time` (seconds), `intrinsics` (3x3) and `camera_to_world` (4x4), and an annotation has
`instance_id` (its track, unique in the split) and `object_id` (its value in the instance map). Boxes are tight:
x + w and y + h are exclusive. An object that covers less than `MIN_VISIBLE` of an image is not annotated in it; its
pixels keep their value in the instance map.

Seeds: scene i of a split is `sample_scene((seed, SPLITS.index(split), i))`, so splits share no scenes, and a longer
dataset starts with the scenes of a shorter one with the same seed.
"""

import json
import math
import multiprocessing
import os
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.atomic import atomic_folder
from pe_spatial.errors import ConfigError, DatasetError

from .render import Frame, render_frame
from .scene import CATEGORIES, sample_scene

SPLITS = ("train", "val", "test", "pretrain")
MIN_VISIBLE = 1e-3  # fraction of the image's pixels
VERSION = 1  # increase it when the same parameters give different files
JPEG_QUALITY = 95


def write_dataset(
    root: str | os.PathLike[str], *, scenes: Mapping[str, int], frames_per_scene: int = 2,
    size: tuple[int, int] = (256, 256), duration: float = 2.0, seed: int = 0, workers: int = 1,
) -> Path:  # fmt: skip
    """Write a dataset, or reuse the one at `root` if it has the same parameters; return `root`.

    `root` is complete or absent, even if the process is killed (see `atomic_folder`).

    Args:
        scenes: number of scenes (videos) of each split, e.g. {"train": 200, "val": 50}.
        frames_per_scene: frames evenly over `duration`, both ends included; 1 or 2 give the most variety for
            detection, 8 or more a video for tracking.
        size: (H, W) in pixels.
        duration: duration of each scene in seconds.
        workers: number of processes; the files do not depend on it. With more than one, the calling script needs an
            `if __name__ == "__main__":` guard.

    Raises ConfigError if a parameter is out of range, and DatasetError if `root` has other content.
    """
    root = Path(root).absolute()
    if not scenes or not set(scenes) <= set(SPLITS) or min(scenes.values()) < 1:
        raise ConfigError(f"scenes is {dict(scenes)}; give at least one scene for some of {', '.join(SPLITS)}")
    if frames_per_scene < 1 or workers < 1 or seed < 0:
        given = f"frames_per_scene is {frames_per_scene}, workers {workers}, seed {seed}"
        raise ConfigError(f"{given}; at least 1, 1 and 0 are required")
    world: dict[str, Any] = {"version": VERSION, "seed": seed}
    world["scenes"] = {split: int(scenes[split]) for split in SPLITS if split in scenes}
    world |= {"frames_per_scene": frames_per_scene, "size": list(size), "duration": duration}
    if _is_complete(root, world):
        return root
    try:
        with atomic_folder(root) as build:
            (build / "annotations").mkdir()
            for split in world["scenes"]:
                images = _write_split(build, split, world, workers)
                _write_json(build / "annotations" / f"instances_{split}.json", images)
            _write_json(build / "world.json", world)
    except OSError:  # another process may have finished first
        if not _is_complete(root, world):
            raise
    return root


def _is_complete(root: Path, world: dict[str, Any]) -> bool:
    """Return whether `root` contains the dataset `world`, False if it is empty or absent; else raise DatasetError."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    path = root / "world.json"
    if not path.is_file():
        raise DatasetError(f"{root} exists and is not a synthetic dataset (no world.json); choose another folder")
    existing = json.loads(path.read_text())
    keys = sorted(key for key in {*existing, *world} if existing.get(key) != world.get(key))
    if keys:
        different = ", ".join(f"{key} {existing.get(key)} instead of {world.get(key)}" for key in keys)
        raise DatasetError(
            f"{root} is a synthetic dataset with other parameters: {different}; "
            "delete it, choose another folder, or use the parameters in its world.json"
        )
    return True


def _write_split(build: Path, split: str, world: dict[str, Any], workers: int) -> dict[str, Any]:
    """Write the images of a split and return its COCO dictionary."""
    jobs = [(build, split, index, world) for index in range(world["scenes"][split])]
    if workers == 1:
        videos = [_write_scene(job) for job in jobs]
    else:  # spawn: forking a process with torch's threads may hang
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            videos = list(pool.map(_write_scene, jobs, chunksize=max(1, math.ceil(len(jobs) / (8 * workers)))))
    info = {"description": "pe_spatial synthetic world", "version": str(VERSION), "split": split}
    categories = [{"id": i, "name": name, "supercategory": "solid"} for i, name in enumerate(CATEGORIES, 1)]
    coco: dict[str, Any] = {"info": info, "licenses": [], "categories": categories}
    coco |= {"videos": [], "images": [], "annotations": []}
    tracks: dict[tuple[int, int], int] = {}
    height, width = world["size"]
    for video_id, frames in enumerate(videos, 1):
        coco["videos"].append({"id": video_id, "name": _scene_name(video_id - 1), "height": height, "width": width})
        for image, annotations in frames:
            image_id = len(coco["images"]) + 1
            coco["images"].append({"id": image_id, "video_id": video_id, **image})
            for annotation in annotations:
                track = tracks.setdefault((video_id, annotation["object_id"]), len(tracks) + 1)
                ids = {"id": len(coco["annotations"]) + 1, "image_id": image_id, "video_id": video_id}
                coco["annotations"].append({**ids, "instance_id": track, **annotation})
    return coco


def _write_scene(job: tuple[Path, str, int, dict[str, Any]]) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Write the images of one scene; return (image, annotations) of each frame, without ids of the split."""
    from PIL import Image

    build, split, index, world = job
    scene = sample_scene((world["seed"], SPLITS.index(split), index), duration=world["duration"])
    category_ids = {solid.id: CATEGORIES.index(solid.category) + 1 for solid in scene.solids}
    folders = [build / kind / _scene_name(index) for kind in (split, f"depth/{split}", f"instances/{split}")]
    for folder in folders:
        folder.mkdir(parents=True)
    frames = []
    for frame_id in range(world["frames_per_scene"]):
        time = world["duration"] * frame_id / max(world["frames_per_scene"] - 1, 1)
        frame = render_frame(scene, time, tuple(world["size"]))
        name = f"{frame_id:05d}"
        Image.fromarray(frame.rgb).save(folders[0] / f"{name}.jpg", quality=JPEG_QUALITY)
        Image.fromarray(np.round(frame.depth * 1000).astype(np.uint16)).save(folders[1] / f"{name}.png")
        ids = Image.fromarray(frame.instances.astype(np.uint8))
        ids.putpalette(_palette())
        ids.save(folders[2] / f"{name}.png")
        height, width = world["size"]
        image = {"file_name": f"{_scene_name(index)}/{name}.jpg", "height": height, "width": width}
        image |= {"frame_id": frame_id, "time": time, "intrinsics": frame.intrinsics.tolist()}
        image["camera_to_world"] = frame.camera_to_world.tolist()
        frames.append((image, _annotate(frame, category_ids)))
    return frames


def _annotate(frame: Frame, category_ids: Mapping[int, int]) -> list[dict[str, Any]]:
    """Return an annotation without ids for every sufficiently visible object."""
    from pycocotools import mask as rle

    annotations = []
    for object_id, category_id in category_ids.items():
        mask = frame.instances == object_id
        area = int(mask.sum())
        if area < max(1, MIN_VISIBLE * mask.size):
            continue
        code = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
        ids = {"object_id": object_id, "category_id": category_id, "bbox": [int(x) for x in rle.toBbox(code)]}
        segmentation = {"size": list(mask.shape), "counts": code["counts"].decode("ascii")}
        annotations.append({**ids, "area": area, "iscrowd": 0, "segmentation": segmentation})
    return annotations


def _scene_name(index: int) -> str:
    return f"{index:04d}"


def _palette() -> list[int]:
    """Return Pascal VOC's colors for 0 ... 15: bits 0, 1, 2 (then 3) of the id are red, green, blue (then dark red)."""
    return [128 * (i >> c & 1) + (64 * (i >> 3 & 1) if c == 0 else 0) for i in range(16) for c in range(3)]


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, separators=(",", ":")))
