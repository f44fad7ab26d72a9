"""Time and memory of reading COCO's annotations, checked and cleaned, beside json.load and pycocotools' index alone.

python benchmarks/annotations.py                    # writes /tmp/coco_118k.json (0.5 GB) and measures both, in turns

Each measurement is a process of its own. The file has as many images and boxes as COCO 2017's training set, with 1.3
polygons for each object and 25 points for each polygon.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np


def write(path: Path, *, images: int = 118_000, boxes: int = 860_000) -> None:
    """Write a COCO file of random polygons, deterministically."""
    rng = np.random.default_rng(0)
    width, height = 640, 480
    content = dict(
        images=[dict(id=i, file_name=f"{i:012d}.jpg", width=width, height=height) for i in range(1, images + 1)],
        categories=[dict(id=i, name=f"class {i}", supercategory="none") for i in range(1, 81)],
    )
    of_image = np.sort(rng.integers(1, images + 1, boxes)).tolist()
    categories = rng.integers(1, 81, boxes).tolist()
    parts = np.where(rng.random(boxes) < 0.7, 1, 2).tolist()
    angles = np.sort(rng.random((1000, 25)) * 2 * np.pi, axis=1)
    rounds = np.stack([np.cos(angles), np.sin(angles)], -1)  # (1000, 25, 2)
    annotations = content["annotations"] = []
    for i in range(boxes):
        center, radius = rng.random(2) * (width - 120, height - 120) + 60, rng.random() * 50 + 5
        shapes = rounds[rng.integers(1000, size=parts[i])] * radius + center
        low, high = shapes.min((0, 1)), shapes.max((0, 1))
        annotations.append(
            dict(
                id=i + 1,
                image_id=of_image[i],
                category_id=categories[i],
                bbox=np.round([*low, *(high - low)], 2).tolist(),
                area=round(float(radius**2), 4),
                iscrowd=0,
                segmentation=np.round(shapes, 2).reshape(parts[i], -1).tolist(),
            )
        )
    path.write_text(json.dumps(content))


def measure(kind: str, path: str) -> None:
    """Read `path` in one of the two ways and print its CPU seconds and peak memory."""
    from pycocotools.coco import COCO

    from pe_spatial.detection.annotations import read_coco

    coco = COCO()
    start = time.process_time()  # of one thread: what else the machine does counts less
    if kind == "bare":
        with open(path) as file:
            coco.dataset = json.load(file)
    else:
        coco.dataset, _ = read_coco(path, annotated=True, masks=True)
    coco.createIndex()
    seconds = time.process_time() - start
    print(json.dumps([seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, default=Path("/tmp/coco_118k.json"), help="where the file is, or goes")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each kind (3)")
    parser.add_argument("--kind", choices=["bare", "checked"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.kind:
        measure(args.kind, str(args.file))
        return
    if not args.file.exists():
        write(args.file)
    best = {}
    for _ in range(args.runs):
        for kind in ("bare", "checked"):
            command = [sys.executable, __file__, "--file", str(args.file), "--kind", kind]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            result = json.loads(out.splitlines()[-1])
            best[kind] = min(best.get(kind, result), result)
            print(f"{kind}: {result[0]:.1f} s, {result[1]:.2f} GiB", flush=True)
    ratio = best["checked"][0] / best["bare"][0]
    print(f"{args.file.stat().st_size / 2**20:.0f} MiB, Python {platform.python_version()}: ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
