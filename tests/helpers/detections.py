"""Random detections with all that evaluation distinguishes: crowds, ties, wrong classes, poor boxes, duplicates."""

import json
import random

from pe_spatial.atomic import write_json

SIZE = 100


def random_detections(seed=0, images=12, classes=3):
    """Return annotations and results in COCO's form."""
    rng = random.Random(seed)
    annotations, results = [], []
    for image in range(1, images + 1):
        for _ in range(rng.randrange(5)):
            x, y, w, h = (rng.randrange(*limits) for limits in ((0, 60), (0, 60), (10, 40), (10, 40)))
            category, crowd = rng.randrange(1, classes + 1), int(rng.random() < 0.15)
            annotations.append(dict(
                id=len(annotations) + 1, image_id=image, category_id=category, bbox=[x, y, w, h], area=w * h,
                iscrowd=crowd, segmentation=[[x, y, x + w, y, x + w, y + h, x, y + h]],
            ))  # fmt: skip
            for _ in range(rng.randrange(4)):
                moved = [value + rng.randrange(-9, 10) for value in (x, y)]
                label = category if rng.random() < 0.7 else rng.randrange(1, classes + 1)
                results.append(dict(image_id=image, category_id=label, bbox=[*moved, w, h], score=rng.randrange(9) / 8))
        if rng.random() < 0.3:
            results.append(dict(image_id=image, category_id=1, bbox=[80, 80, 9, 9], score=rng.random()))
    truth = dict(
        images=[dict(id=i, file_name=f"{i}.jpg", height=SIZE, width=SIZE) for i in range(1, images + 1)],
        categories=[dict(id=i, name=f"class {i}") for i in range(1, classes + 1)],
        annotations=annotations,
    )
    return truth, results


def write_detections(folder, **options):
    """Write truth.json and results.json; return their paths."""
    truth, results = random_detections(**options)
    write_json(folder / "truth.json", truth)
    (folder / "results.json").write_text(json.dumps(results))
    return folder / "truth.json", folder / "results.json"
