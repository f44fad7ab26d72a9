"""Each form of a dataset gives the same objects; what a form lacks or has wrong is counted or refused."""

import json

import pytest
from helpers.datasets import WRITERS, convert
from helpers.own_data import CLASSES, make_content, objects, write_images

from pe_spatial.data import open_dataset
from pe_spatial.errors import DatasetError


@pytest.fixture
def splits(tmp_path):
    """COCO content and images of two splits, as `convert` takes them."""
    made = {}
    for split, count in (("train", 5), ("val", 2)):
        names = [f"{split}_{i}.png" for i in range(count)]
        write_images(tmp_path / f"source_{split}", names, shade=count)
        made[split] = (make_content(names, seed=count), tmp_path / f"source_{split}")
    return made


def nuts_splits(shared):
    folder = shared / "data/detection/nuts"
    read = lambda split: json.loads((folder / f"annotations/instances_{split}.json").read_text())  # noqa: E731
    return {split: (read(split), folder / split) for split in ("train", "val")}


def expected(content, form):
    """Return the objects of COCO content: with polygons where the form has them, and their boxes where it has none."""
    files = {image["id"]: image["file_name"] for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    rows = []
    for a in content["annotations"]:
        box, polygons = a["bbox"], a["segmentation"]
        if form in ("YOLO", "LabelMe"):
            xs, ys = polygons[0][::2], polygons[0][1::2]
            box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
        polygons = None if form in ("YOLO boxes", "Pascal VOC") else polygons
        rows.append((files[a["image_id"]], names[a["category_id"]], box, polygons))
    return sorted(rows)


def check_equal(dataset, splits, form):
    assert dataset.form == form.removesuffix(" boxes")
    assert dataset.has_masks is (form not in ("Pascal VOC", "YOLO boxes"))
    digits = 1e-9 if form == "YOLO" else 0  # pixels: its numbers were divided and multiplied by the size
    for split, (content, _) in splits.items():
        own = dataset.splits[split]
        rows, wanted = objects(own), expected(content, form)
        assert [row[:2] for row in rows] == [row[:2] for row in wanted]
        for (*_, box, polygons), (*_, other_box, other_polygons) in zip(rows, wanted, strict=True):
            assert box == pytest.approx(other_box, rel=0, abs=digits)
            assert len(polygons or ()) == len(other_polygons or ())
            for polygon, other in zip(polygons or (), other_polygons or (), strict=True):
                assert polygon == pytest.approx(other, rel=0, abs=digits)
        sizes = {image["file_name"]: (image["height"], image["width"]) for image in content["images"]}
        assert {image["file_name"]: (image["height"], image["width"]) for image in own.content["images"]} == sizes
        assert all((own.root / name).is_file() for name in sizes)


@pytest.mark.parametrize("form", WRITERS)
def test_each_form_has_the_same_objects(form, splits, tmp_path):
    dataset = open_dataset(convert(form, splits, tmp_path / "out"))
    check_equal(dataset, splits, form)
    assert (dataset.classes, dataset.notes) == (CLASSES, ())


@pytest.mark.parametrize("form", WRITERS)
def test_nuts_in_each_form(form, shared, tmp_path):
    splits = nuts_splits(shared)
    dataset = open_dataset(convert(form, splits, tmp_path / "out"))
    check_equal(dataset, splits, form)
    assert dataset.classes == ("date", "fig", "hazelnut")


def test_objects365_is_named_and_its_patches_are_found(tmp_path):
    content = make_content(["a.png", "b.png"])
    content["categories"] = [dict(id=i, name=f"class {i}") for i in range(1, 366)]
    for split in ("train", "val"):
        for image in content["images"]:
            image["file_name"] = f"images/v1/patch8/{split}_{image['id']}.png"
        write_images(tmp_path / split / "patch8", [f"{split}_{i}.png" for i in (1, 2)], shade=len(split))
        (tmp_path / f"zhiyuan_objv2_{split}.json").write_text(json.dumps(content))
    dataset = open_dataset(tmp_path)
    assert dataset.form == "Objects365"
    assert dataset.train.root == tmp_path / "train/patch8"
    assert "images/v1 is now" in dataset.notes[0]


def yolo(splits, tmp_path, **lines):
    """Write a YOLO dataset whose YAML has other lines; None removes one."""
    root = convert("YOLO", splits, tmp_path / "yolo")
    kept = dict(line.split(": ", 1) for line in (root / "data.yaml").read_text().splitlines())
    kept.update(lines)
    text = "\n".join(f"{key}: {value}" for key, value in kept.items() if value is not None)
    (root / "data.yaml").write_text(text)
    return root


def write_lists(root):
    (root / "train.txt").write_text("".join(f"./images/train/train_{i}.png\n" for i in range(3)))
    (root / "rest.txt").write_text("".join(f"/of/another/machine/images/train/train_{i}.png\n" for i in (3, 4)))


YAMLS = {
    "a dictionary of names": dict(names='{0: bolt, 2: washer, 1: "nut"}'),
    "nc": dict(nc=3),
    "folders of another machine": dict(path="/content/datasets", train="/content/datasets/images/train"),
    "relative to its own folder by mistake": dict(path=None, train="../images/train", val="../images/val"),
    "a list of files": dict(train="[train.txt, rest.txt]"),
    "a list of folders": dict(train="[images/train, images/train]"),
    "validation": dict(val=None, validation="images/val"),
    "a test part that was not exported": dict(test="../test/images"),
}


@pytest.mark.parametrize("lines", YAMLS.values(), ids=YAMLS)
def test_yaml_forms(lines, splits, tmp_path):
    plain = open_dataset(convert("YOLO", splits, tmp_path / "plain"))
    root = yolo(splits, tmp_path, **lines)
    write_lists(root)
    for path in (root, root / "data.yaml"):
        dataset = open_dataset(path)
        assert dataset.classes == CLASSES
        assert [objects(part) for part in (dataset.train, dataset.val)] == [objects(plain.train), objects(plain.val)]


BAD_YAMLS = {
    "elsewhere": (dict(train="/data/cars/train"), r"train is /data/cars/train, which exists neither there nor below"),
    "no names": (dict(names=None), r"has no names; add the list of classes"),
    "counts": (dict(nc=5), r"has nc: 5, but 3 names \(bolt, nut, washer\)"),
    "gaps": (dict(names="{1: bolt, 2: nut}"), r"names has the keys 1, 2; number the classes 0, 1, 2"),
    "fewer": (dict(names="[bolt]"), r"txt, line \d has class \d, but names has 0 to 0"),
    "no images": (dict(train="labels/train"), r"train is labels/train, which contains no images"),
    "no YAML": (dict(names="[a"), r"cannot be read as YAML"),
}


@pytest.mark.parametrize(("lines", "message"), BAD_YAMLS.values(), ids=BAD_YAMLS)
def test_bad_yamls(lines, message, splits, tmp_path):
    with pytest.raises(DatasetError, match=message):
        open_dataset(yolo(splits, tmp_path, **lines) / "data.yaml")


ROWS = {
    "7": "has 0 numbers after the class",
    "0 0.5 0.5 0.2": "has 3 numbers after the class",
    "0 0.5 0.5 0.2 0.1 0.9": "has 5 numbers after the class",
    "0 250 100 50 20": "is in pixels",
    "0.5 0.5 0.5 0.2 0.1": "has class 0.5",
    "bolt 0.5 0.5 0.2 0.1": "write a class and numbers",
}


@pytest.mark.parametrize(("row", "message"), ROWS.items())
def test_bad_rows_of_yolo(row, message, splits, tmp_path):
    root = convert("YOLO", splits, tmp_path / "yolo")
    (root / "labels/train/train_2.txt").write_text(f"0 0.5 0.5 0.2 0.1\n{row}\n")
    with pytest.raises(DatasetError, match=rf"train_2\.txt, line 2 .*{message}"):
        open_dataset(root)


def test_negatives_orphans_and_poses_of_yolo(splits, tmp_path):
    root = yolo(splits, tmp_path, kpt_shape="[2, 3]")
    (root / "labels/train/train_0.txt").unlink()
    (root / "labels/train/train_1.txt").write_text("")
    (root / "labels/train/train_2.txt").write_text("1 0.5 0.5 0.25 0.5" + " 0.1 0.2 2" * 2)
    (root / "labels/train/gone.txt").write_text("0 0.5 0.5 0.2 0.1")
    dataset = open_dataset(root)
    assert len(dataset.train.content["images"]) == 5
    assert objects(dataset.train)[0] == ("train_2.png", "nut", [15, 7.5, 10, 15], None)
    assert not dataset.has_masks
    assert dataset.notes[0].startswith("1 of 5 images of ")
    assert "gone.txt" in dataset.notes[1]
    assert "of 9 objects have no mask" in dataset.notes[2]
    for path in (root / "labels/train").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match=r"none of the 5 images of .* has a label file, such as"):
        open_dataset(root)
    (root / "data.yaml").unlink()
    with pytest.raises(DatasetError, match=r"2 label files of YOLO, but no data\.yaml"):
        open_dataset(root)


def test_voc_of_the_challenge(splits, tmp_path):
    root = convert("Pascal VOC", splits, tmp_path / "voc")
    plain = open_dataset(root)
    for path in (root / "Annotations").iterdir():
        text = path.read_text().replace("</filename>", "</filename><source><database>The VOC2007 Database"
                                        "</database></source>").replace("<width>40", "<width>0")  # fmt: skip
        path.write_text(text.replace("</name>", "</name><difficult>1</difficult>", 1))
    lists = root / "ImageSets/Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    (lists / "bolt_train.txt").write_text("train_0 -1\n")
    (lists / "test.txt").write_text("000001\n")
    (lists / "train.txt").unlink()
    dataset = open_dataset(root)
    assert [row[2] for row in objects(dataset.train)] == [
        [x - 1, y - 1, w + 1, h + 1] for _, _, (x, y, w, h), _ in objects(plain.train)
    ]
    assert sum(a.get("ignore", 0) for a in dataset.train.content["annotations"]) == 5
    assert dataset.train.content["images"] == plain.train.content["images"]
    assert dataset.notes == ("1 of 1 images of the test list have no XML file",
                             "7 objects are marked as difficult and ignored, as in the challenge")  # fmt: skip


def test_voc_as_roboflow_exports_it(splits, tmp_path):
    root = convert("Pascal VOC", splits, tmp_path / "voc")
    plain = open_dataset(root)
    for split, folder in (("train", "train"), ("val", "valid")):
        (root / folder).mkdir()
        for path in [*root.glob(f"*/{split}_*")]:
            path.rename(root / folder / path.name)
    for path in (root / "ImageSets/Main").iterdir():
        path.unlink()
    dataset = open_dataset(root)
    assert [objects(part) for part in (dataset.train, dataset.val)] == [objects(plain.train), objects(plain.val)]


VOC = {
    "no class": ("<name>nut</name>", "<name> </name>", "an object has no name"),
    "no box": ("<bndbox>", "<box>", "is not valid XML"),
    "no number": ("<xmin>", "<xmin>a", "bndbox/xmin of an object is 'a"),
    "no corner": ("xmin", "left", "an object has no bndbox/xmin"),
}


@pytest.mark.parametrize(("old", "new", "message"), VOC.values(), ids=VOC)
def test_bad_xml(old, new, message, splits, tmp_path):
    root = convert("Pascal VOC", splits, tmp_path / "voc")
    path = next(path for path in sorted((root / "Annotations").iterdir()) if old in path.read_text())
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DatasetError, match=message):
        open_dataset(root)


def test_shapes_of_labelme(splits, tmp_path):
    root = convert("LabelMe", splits, tmp_path / "labelme")
    path = root / "train/train_0.json"
    content = json.loads(path.read_text())
    triangle = [[1, 2], [5, 2], [5, 6]]
    content["shapes"] = [
        dict(label="nut", points=[[9, 8], [2, 3]], shape_type="rectangle"),
        dict(label="bolt", points=triangle, group_id=1),
        dict(label="bolt", points=[[11, 2], [15, 2], [15, 6]], group_id=1),
        dict(label="bolt", points=triangle, group_id=None),
        dict(label="nut", points=[[4, 4], [5, 5]], shape_type="circle"),
    ]
    content.update(imageHeight=None, imagePath="..\\train\\train_0.png")
    path.write_text(json.dumps(content))
    (root / "train/train_1.json").unlink()
    dataset = open_dataset(root)
    assert objects(dataset.train)[:3] == [
        ("train_0.png", "bolt", [1, 2, 4, 4], [[1, 2, 5, 2, 5, 6]]),
        ("train_0.png", "bolt", [1, 2, 14, 4], [[1, 2, 5, 2, 5, 6], [11, 2, 15, 2, 15, 6]]),
        ("train_0.png", "nut", [2, 3, 7, 5], None),
    ]
    assert dataset.train.content["annotations"][1]["area"] == 16
    assert dataset.notes == (
        "omitted shapes that are neither polygons nor rectangles: 1 circle",
        "1 images have no LabelMe file and are omitted",
        "1 of 13 objects have no mask, so masks are not used",
    )
    with pytest.raises(DatasetError, match="is the LabelMe file of one image; give the folder"):
        open_dataset(path)
    content["shapes"][0].pop("points")
    path.write_text(json.dumps(content))
    with pytest.raises(DatasetError, match=r"train_0.json: shapes\[0\] has no label or no points"):
        open_dataset(root)


def test_labelme_files_in_a_folder_of_their_own(splits, tmp_path):
    root = convert("LabelMe", splits, tmp_path / "labelme")
    plain = open_dataset(root)
    (root / "json").mkdir()
    for path in [*root.glob("*/*.json")]:
        content = json.loads(path.read_text())
        content["imagePath"] = f"..\\{path.parent.name}\\{content['imagePath']}"
        path.write_text(json.dumps(content))
        path.rename(root / "json" / path.name)
    dataset = open_dataset(root)
    assert [objects(part) for part in (dataset.train, dataset.val)] == [objects(plain.train), objects(plain.val)]


def test_folders_above_and_work_dirs_are_not_searched(splits, tmp_path, monkeypatch):
    root = convert("YOLO", splits, tmp_path / "yolo")
    (root / "images/loop").symlink_to(root)
    (root / "work_dirs").mkdir()
    (root / "work_dirs/train.json").write_text(json.dumps(splits["train"][0]))
    monkeypatch.chdir(root)
    dataset = open_dataset(".")
    assert (dataset.form, dataset.train.root, dataset.notes) == ("YOLO", root / "images/train", ())


@pytest.mark.parametrize("form", ["COCO", "YOLO", "Pascal VOC", "LabelMe"])
def test_labels_without_images(form, splits, tmp_path):
    root = convert(form, splits, tmp_path / "out")
    for path in root.rglob("*.png"):
        path.unlink()
    with pytest.raises(DatasetError, match=r"(none of the \d|contains no images)[^;]*; [a-z]+ \w+"):
        open_dataset(root)


def test_two_forms_in_one_folder(splits, tmp_path):
    root = convert("COCO", splits, tmp_path / "out")
    convert("YOLO", splits, root)
    with pytest.raises(DatasetError, match=r"COCO \(annotations/instances_train.json\), YOLO \(data.yaml\); give"):
        open_dataset(root)
    assert open_dataset(root / "data.yaml").form == "YOLO"
    assert open_dataset(root / "annotations/instances_train.json").form == "COCO"
