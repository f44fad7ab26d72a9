"""Small datasets as a user has them."""

import json

from PIL import Image

CLASSES = ("bolt", "nut", "washer")


def make_content(names, seed=0):
    """COCO content of images of 40x30 pixels, each with two objects whose boxes are those of their polygons."""
    images, annotations = [], []
    for i, name in enumerate(names):
        images.append(dict(id=i + 1, file_name=name, width=40, height=30))
        for j in range(2):
            x, y, w, h = 3 + i % 5 + 15 * j, 2 + (i + seed) % 7, 10, 8 + j
            polygon = [x, y + 1.25, x + w / 3, y, x + w, y + h / 2, x + 4, y + h]
            category = (i + j + seed) % len(CLASSES) + 1
            annotations.append(dict(id=len(annotations) + 1, image_id=i + 1, category_id=category, iscrowd=0,
                                    bbox=[x, y, w, h], area=w * h / 2, segmentation=[polygon]))  # fmt: skip
    return dict(images=images, annotations=annotations, categories=categories(CLASSES))


def categories(names):
    return [dict(id=i + 1, name=name) for i, name in enumerate(names)]


def write_images(folder, names, shade=0):
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        Image.new("RGB", (40, 30), (shade, i, 0)).save(folder / name)


def write_coco(root, content, *, file, folder, shade=0):
    write_images(root / folder, [image["file_name"] for image in content["images"]], shade)
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    (root / file).write_text(json.dumps(content))


def objects(split):
    """Return all objects of a split as (file, class, box, polygons), sorted."""
    files = {image["id"]: image["file_name"] for image in split.content["images"]}
    names = {category["id"]: category["name"] for category in split.content["categories"]}
    return sorted(
        (files[a["image_id"]], names[a["category_id"]], a["bbox"], a.get("segmentation"))
        for a in split.content["annotations"]
    )
