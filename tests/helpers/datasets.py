"""COCO content written in the forms that other tools write."""

import json
import shutil
from xml.etree import ElementTree


def convert(form, splits, root):
    """Write `splits`, name -> (COCO content, folder of images), in a form; return what to open."""
    WRITERS[form](splits, root)
    return root


def parts(splits):
    """Yield each image as (split, path, entry, its objects as (category id, class, annotation))."""
    for split, (content, folder) in splits.items():
        names = {category["id"]: category["name"] for category in content["categories"]}
        for image in content["images"]:
            own = [a for a in content["annotations"] if a["image_id"] == image["id"]]
            objects = [(a["category_id"], names[a["category_id"]], a) for a in own]
            yield split, folder / image["file_name"], image, objects


def put(path, text="", image=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    if image:
        shutil.copy(image, path)
    else:
        path.write_text(text)


def write_coco(splits, root):
    for split, (content, _) in splits.items():
        put(root / f"annotations/instances_{split}.json", json.dumps(content))
    for split, path, *_ in parts(splits):
        put(root / split / path.name, image=path)


def write_lvis(splits, root):
    lists = dict(neg_category_ids=[], not_exhaustive_category_ids=[])
    for split, (content, _) in splits.items():
        images = [
            {"coco_url": f"http://images.org/{split}2017/{image['file_name']}", **lists,
             **{key: image[key] for key in ("id", "height", "width")}} for image in content["images"]
        ]  # fmt: skip
        annotations = [{key: value for key, value in a.items() if key != "iscrowd"} for a in content["annotations"]]
        text = json.dumps(dict(content, images=images, annotations=annotations))
        put(root / f"annotations/lvis_v1_{split}.json", text)
    for split, path, *_ in parts(splits):
        put(root / f"{split}2017" / path.name, image=path)


def write_yolo(splits, root, polygons=True):
    content, _ = splits["train"]
    names = [category["name"] for category in content["categories"]]
    index = {category["id"]: i for i, category in enumerate(content["categories"])}
    lines = [f"{split}: images/{split}" for split in splits]
    put(root / "data.yaml", "\n".join(["path: .", *lines, f"names: {json.dumps(names)}"]))
    for split, path, image, objects in parts(splits):
        put(root / "images" / split / path.name, image=path)
        size, rows = (image["width"], image["height"]), []
        for category, _, annotation in objects:
            x, y, w, h = annotation["bbox"]
            (polygon,) = annotation["segmentation"]
            numbers = polygon if polygons else (x + w / 2, y + h / 2, w, h)
            rows.append([index[category], *(number / size[i % 2] for i, number in enumerate(numbers))])
        text = "\n".join(" ".join(map(repr, row)) for row in rows)
        put(root / "labels" / split / f"{path.stem}.txt", text)


def write_yolo_boxes(splits, root):
    write_yolo(splits, root, polygons=False)


def write_voc(splits, root):
    for split, path, image, objects in parts(splits):
        put(root / "JPEGImages" / path.name, image=path)
        element = ElementTree.Element("annotation")
        ElementTree.SubElement(element, "filename").text = path.name
        size = ElementTree.SubElement(element, "size")
        for key in ("width", "height"):
            ElementTree.SubElement(size, key).text = str(image[key])
        for _, name, annotation in objects:
            item = ElementTree.SubElement(element, "object")
            ElementTree.SubElement(item, "name").text = name
            x, y, w, h = annotation["bbox"]
            box = ElementTree.SubElement(item, "bndbox")
            for key, value in dict(xmin=x, ymin=y, xmax=x + w, ymax=y + h).items():
                ElementTree.SubElement(box, key).text = repr(value)
        put(root / "Annotations" / f"{path.stem}.xml", ElementTree.tostring(element, encoding="unicode"))
        (root / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        with open(root / f"ImageSets/Main/{split}.txt", "a") as file:
            file.write(f"{path.stem}\n")


def write_labelme(splits, root):
    for split, path, image, objects in parts(splits):
        put(root / split / path.name, image=path)
        shapes = []
        for _, name, annotation in objects:
            (polygon,) = annotation["segmentation"]
            points = list(zip(polygon[::2], polygon[1::2], strict=True))
            shapes.append(dict(label=name, points=points, shape_type="polygon", group_id=None))
        sizes = dict(imageHeight=image["height"], imageWidth=image["width"])
        content = dict(version="5.4.1", shapes=shapes, imagePath=path.name, imageData="Zm9v", **sizes)
        put(root / split / f"{path.stem}.json", json.dumps(content))


WRITERS = {
    "COCO": write_coco,
    "LVIS": write_lvis,
    "YOLO": write_yolo,
    "YOLO boxes": write_yolo_boxes,
    "Pascal VOC": write_voc,
    "LabelMe": write_labelme,
}
