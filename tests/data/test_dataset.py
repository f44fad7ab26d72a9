"""Own datasets: each form gives the same objects, and what cannot be used is refused in one sentence."""

import json

import pytest
from helpers.own_data import CLASSES, categories, make_content, objects, write_coco, write_images

from pe_spatial.data import open_dataset, write_splits
from pe_spatial.errors import DatasetError


@pytest.fixture
def coco(tmp_path):
    """A COCO dataset of six and three images in the standard layout; names are the same in both parts."""
    for split, count in (("train", 6), ("val", 3)):
        content = make_content([f"{i}.png" for i in range(count)], seed=count)
        write_coco(tmp_path, content, file=f"annotations/instances_{split}.json", folder=split, shade=count)
    return tmp_path


LAYOUTS = {
    "standard": ("annotations/instances_{}2017.json", "{}2017", ("train", "val")),
    "Roboflow": ("{}/_annotations.coco.json", "{}", ("train", "valid")),
    "images in folders of a folder": ("{}.json", "images/{}", ("train", "val")),
}


@pytest.mark.parametrize(("file", "folder", "words"), LAYOUTS.values(), ids=LAYOUTS)
def test_coco_layouts(tmp_path, file, folder, words):
    for word, count in zip(words, (6, 3), strict=True):
        content = make_content([f"{i}.png" for i in range(count)], seed=count)
        write_coco(tmp_path, content, file=file.format(word), folder=folder.format(word), shade=count)
    dataset = open_dataset(tmp_path)
    assert (dataset.form, dataset.classes, dataset.test, dataset.notes) == ("COCO", CLASSES, None, ())
    assert dataset.has_masks
    for split, word, count in zip((dataset.train, dataset.val), words, (6, 3), strict=True):
        assert split.root == tmp_path / folder.format(word)
        assert len(objects(split)) == 2 * count
        assert split.content == make_content([f"{i}.png" for i in range(count)], seed=count)


def test_written_splits_are_read_by_the_checked_dataset(coco, tmp_path):
    pytest.importorskip("mmdet")
    from pe_spatial.detection.annotations import read_coco

    dataset = open_dataset(coco)
    paths = write_splits(dataset, tmp_path / "written")
    assert sorted(paths) == ["train", "val"]
    content, counts = read_coco(str(paths["train"]), annotated=True, masks=True)
    assert (len(content["annotations"]), counts.total()) == (12, 0)
    assert all((dataset.train.root / image["file_name"]).is_file() for image in content["images"])


def test_without_a_validation_part_one_is_split_off(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    write_coco(tmp_path, make_content(names), file="annotations/instances_default.json", folder="images")
    for copy in ("1.png", "2.png", "3.png"):  # duplicates of 0.png stay with it
        (tmp_path / "images" / copy).write_bytes((tmp_path / "images/0.png").read_bytes())
    first, again, other = open_dataset(tmp_path), open_dataset(tmp_path), open_dataset(tmp_path, seed=1)
    assert first == again
    parts = [{image["file_name"] for image in split.content["images"]} for split in (first.train, first.val)]
    assert not parts[0] & parts[1]
    assert len(parts[1]) in (4, 7)
    assert len({"0.png", "1.png", "2.png", "3.png"} & parts[0]) in (0, 4)
    assert {name for _, name, *_ in objects(first.val)} == set(CLASSES)
    assert "split off (seed 0" in first.notes[0]
    assert "3 duplicates" in first.notes[0]
    assert objects(other.val) != objects(first.val)


def test_images_of_another_machine_are_matched_by_their_ends(coco):
    file = coco / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for image in content["images"]:
        image["file_name"] = "/mnt/other/nuts/train/" + image["file_name"]
    file.write_text(json.dumps(content))
    dataset = open_dataset(coco)
    assert dataset.train.root == coco / "train"
    assert "/mnt/other/nuts is now" in dataset.notes[0]


def change_categories(coco, split, change):
    file = coco / f"annotations/instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_class_lists_are_unified(coco):
    def reverse(content):
        content["categories"] = [dict(c, id=10 - c["id"]) for c in reversed(content["categories"])]
        for annotation in content["annotations"]:
            annotation["category_id"] = 10 - annotation["category_id"]

    expected = objects(open_dataset(coco).val)
    change_categories(coco, "val", reverse)
    dataset = open_dataset(coco)
    assert objects(dataset.val) == expected
    assert dataset.val.content["categories"] == dataset.train.content["categories"]


def test_bad_class_lists(coco):
    change_categories(coco, "val", lambda content: content["categories"].append(dict(id=7, name="screw")))
    with pytest.raises(DatasetError, match="has also screw; give both the same categories"):
        open_dataset(coco)


def test_two_candidates_are_listed(coco):
    content = (coco / "annotations/instances_train.json").read_text()
    (coco / "annotations/train_old.json").write_text(content)
    with pytest.raises(DatasetError, match=r"several COCO files for train: .*train_old\.json; give the path of one"):
        open_dataset(coco)
    dataset = open_dataset(coco / "annotations/instances_train.json")
    assert "validation uses its counterpart" in dataset.notes[0]


def test_other_tasks_are_omitted(coco):
    for name in ("panoptic_train2017", "captions_val2017", "person_keypoints_train2017", "stuff_train2017"):
        (coco / f"annotations/{name}.json").write_text("{}")
    (note,) = open_dataset(coco).notes
    assert note.startswith("omitted by their names: annotations/captions_val2017.json, ")


def test_unusable_folders(tmp_path):
    with pytest.raises(DatasetError, match=r"is empty; give a folder with images and a COCO JSON"):
        open_dataset(tmp_path)
    write_images(tmp_path, ["a.png", "b.png"])
    with pytest.raises(DatasetError, match=r"has 2 images, but no labels; add"):
        open_dataset(tmp_path)
    with pytest.raises(DatasetError, match=r"does not exist; give a folder"):
        open_dataset(tmp_path / "absent")


def test_one_image(tmp_path):
    write_coco(tmp_path, make_content(["0.png"]), file="labels.json", folder="images")
    with pytest.raises(DatasetError, match=r"no validation part, and its 1 image is one; add another image"):
        open_dataset(tmp_path)


def test_validation_images_that_are_also_in_train_are_counted(coco):
    (coco / "val/0.png").write_bytes((coco / "train/5.png").read_bytes())
    (coco / "val/1.png").unlink()
    (coco / "val/1.png").symlink_to(coco / "train/2.png")
    assert open_dataset(coco).notes == ("2 of 3 validation images are also in train, so results are too good",)


def test_val_with_fewer_classes_gets_those_of_train(coco):
    def keep_two(content):
        content["categories"] = [dict(content["categories"][1], id=1), dict(content["categories"][0], id=2)]
        content["annotations"] = [dict(a, category_id=3 - a["category_id"]) for a in content["annotations"]
                                  if a["category_id"] < 3]  # fmt: skip

    wanted = [row for row in objects(open_dataset(coco).val) if row[1] != "washer"]
    change_categories(coco, "val", keep_two)
    dataset = open_dataset(coco)
    assert dataset.val.content["categories"] == dataset.train.content["categories"] == categories(CLASSES)
    assert objects(dataset.val) == wanted
    assert dataset.notes == ("val has no class washer; it gets the 3 classes of train",)


def test_the_parent_that_roboflow_adds_is_removed(coco):
    def add_parent(content):
        parent = dict(id=0, name="parts", supercategory="none")
        content["categories"] = [parent, *(dict(c, supercategory="parts") for c in content["categories"])]

    for split in ("train", "val"):
        change_categories(coco, split, add_parent)
    dataset = open_dataset(coco)
    assert dataset.classes == CLASSES
    assert dataset.notes == ("category 'parts' is the parent of others, has no objects and is omitted",)


def test_one_class_is_enough_and_missing_images_are_counted(coco):
    def merge(content):
        content["categories"] = categories(["part"])
        content["annotations"] = [dict(a, category_id=1) for a in content["annotations"]]

    for split in ("train", "val"):
        change_categories(coco, split, merge)
    (coco / "train/0.png").unlink()
    dataset = open_dataset(coco)
    assert dataset.classes == ("part",)
    assert len(dataset.train.content["images"]) == 5
    assert len(dataset.train.content["annotations"]) == 10
    assert "1 of 6 images of" in dataset.notes[0]


EMPTY = {
    "no image in val": ("val", dict(images=[], annotations=[]), r"the val part \(.*\) contains no images; add some"),
    "no object in val": ("val", dict(annotations=[]), "no objects; add some, or remove it and a part of train is"),
    "no object in train": ("train", dict(annotations=[]), r"the train part .* contains no objects; add some$"),
    "no name": ("train", dict(categories=[dict(id=1)]), r"categories\[0\] has no name; add it"),
    "no file": ("train", dict(images=[dict(id=1)]), r"images\[0\] has no file_name; fix or remove it"),
    "names twice": ("train", dict(categories=categories("aba")), r"several categories named a; rename or merge them"),
}


@pytest.mark.parametrize(("split", "change", "message"), EMPTY.values(), ids=EMPTY)
def test_unusable_contents(coco, split, change, message):
    change_categories(coco, split, lambda content: content.update(change))
    with pytest.raises(DatasetError, match=message):
        open_dataset(coco)


def test_images_of_another_machine_that_match_nothing(coco):
    for path in coco.rglob("*.png"):
        path.rename(path.with_name("renamed_" + path.name))
    with pytest.raises(DatasetError, match=r"none of the 6 images of .*instances_train\.json is below .*; put the"):
        open_dataset(coco)
