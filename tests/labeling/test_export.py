"""Labels as files that our own reader, pycocotools and the formats' rules read back."""

import json
from xml.etree import ElementTree as xml

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as run_lengths

from pe_spatial.data import open_dataset
from pe_spatial.errors import DatasetError
from pe_spatial.labeling.export import Labels, export, polygons
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.tracking.vos.datasets import davis_clips

SIZE = (48, 64)


def index(t):
    mask = np.zeros(SIZE, np.uint8)
    cv2.circle(mask, (16 + t, 20), 9, 1, -1)
    mask[30:44, 40:60] = 2
    mask[30:44, 50:54] = 0  # two parts
    if t < 4:
        mask[2:8, 50:60] = 7
    return mask


@pytest.fixture
def labels(tmp_path):
    frames = []
    for t in range(6):
        frames.append(tmp_path / f"{t:05d}.png")
        Image.fromarray(np.random.default_rng(t).integers(0, 255, (*SIZE, 3), np.uint8)).save(frames[-1])
    classes = {1: "ball", 2: "box: tall", 7: "ball"}
    return Labels("walk", frames, SIZE, index, classes, chosen=(0, 2, 4), accepted=frozenset({2}))


def test_coco_is_read_back_with_the_same_objects(labels, tmp_path):
    export(labels, tmp_path / "out", ["coco"])
    content = json.loads((tmp_path / "out" / "coco" / "instances.json").read_text())
    names = {image["id"]: image["frame_id"] for image in content["images"]}
    assert [(names[a["image_id"]], a["track_id"]) for a in content["annotations"]] == [
        (0, 1), (0, 2), (0, 7), (2, 1), (2, 2), (2, 7), (4, 1), (4, 2)
    ]  # fmt: skip
    for one in content["annotations"]:
        expected = index(names[one["image_id"]]) == one["track_id"]
        assert np.array_equal(run_lengths.decode(one["segmentation"]) > 0, expected)
        assert one["bbox"] == run_lengths.toBbox(one["segmentation"]).tolist()
        assert one["area"] == expected.sum()
    assert [image["accepted"] for image in content["images"]] == [False, True, False]
    for path in (tmp_path / "out", tmp_path / "out" / "coco"):
        dataset = open_dataset(path)
        assert dataset.form == "COCO"
        assert dataset.classes == ("ball", "box: tall")
        assert dataset.has_masks
        assert sum(len(split.content["annotations"]) for split in dataset.splits.values()) == 8
    assert (tmp_path / "out" / "review.png").stat().st_size > 10_000


def test_the_labels_of_several_videos_are_one_dataset(labels, tmp_path):
    other = Labels("run", labels.frames, SIZE, lambda t: index(t) % 7, {1: "box: tall", 2: "cat"}, chosen=(1, 3))
    for one in (labels, other):
        export(one, tmp_path / "all" / one.name, ["coco"])
        (tmp_path / "all" / one.name / "journal.jsonl").touch()
    dataset = open_dataset(tmp_path / "all")
    assert dataset.classes == ("box: tall", "cat", "ball")  # in the order of the folders
    splits = dataset.splits.values()
    place = {image["id"]: split.root / image["file_name"] for split in splits for image in split.content["images"]}
    annotations = [one for split in splits for one in split.content["annotations"]]
    assert len(place) == len(set(place.values())) == 5
    found = sorted((place[one["image_id"]].parts[-4], one["category_id"]) for one in annotations)
    assert found == [("run", 1)] * 2 + [("run", 2)] * 2 + [("walk", 1)] * 3 + [("walk", 3)] * 5
    (tmp_path / "all" / "run" / "journal.jsonl").unlink()
    with pytest.raises(DatasetError, match="has several COCO files for train"):
        open_dataset(tmp_path / "all")


def test_polygons_cover_the_pixels_of_the_mask(labels, tmp_path):
    export(labels, tmp_path / "out", ["coco"], outlines=True)
    content = json.loads((tmp_path / "out" / "coco" / "instances.json").read_text())
    for one in content["annotations"]:
        rle = run_lengths.merge(run_lengths.frPyObjects(one["segmentation"], *SIZE))
        expected = index(one["image_id"] - 1) == one["track_id"]
        common = (run_lengths.decode(rle) > 0) & expected
        assert common.sum() / ((run_lengths.decode(rle) > 0) | expected).sum() > 0.9
    xs = polygons(MaskCrop.cut(index(0) == 2))
    assert sorted(map(len, xs)) == [8, 8]
    assert sorted(xs)[0][0] == 40
    assert max(xs[0][::2] + xs[1][::2]) == 60
    assert (min(xs[0][1::2]), max(xs[0][1::2])) == (30, 44)


def test_yolo_is_read_back(labels, tmp_path):
    export(labels, tmp_path / "out", ["yolo"])
    dataset = open_dataset(tmp_path / "out" / "yolo")
    assert dataset.form == "YOLO"
    assert dataset.classes == ("ball", "box: tall")
    annotations = [a for split in dataset.splits.values() for a in split.content["annotations"]]
    assert len(annotations) == 8
    small = [a["bbox"] for a in annotations if a["bbox"] == pytest.approx([50, 2, 10, 6], abs=1e-3)]
    assert len(small) == 2


def test_cvat_masks_are_the_masks(labels, tmp_path):
    export(labels, tmp_path / "out", ["cvat"])
    root = xml.parse(tmp_path / "out" / "cvat" / "annotations.xml").getroot()
    assert [label.text for label in root.findall("meta/task/labels/label/name")] == ["ball", "box: tall"]
    assert [image.get("name") for image in root.findall("image")] == ["00000.jpg", "00002.jpg", "00004.jpg"]
    for t, image in zip(labels.chosen, root.findall("image"), strict=True):
        assert (tmp_path / "out" / "cvat" / "images" / image.get("name")).is_file()
        for mask in image.findall("mask"):
            counts = [int(n) for n in mask.get("rle").split(",")]
            flat = np.repeat(np.arange(len(counts)) % 2, counts)
            left, top, width, height = (int(mask.get(key)) for key in ("left", "top", "width", "height"))
            full = MaskCrop(left, top, flat.reshape(height, width) > 0).full(SIZE)
            assert np.array_equal(full, index(t) == int(mask.find("attribute").text))


def test_davis_is_read_back(labels, tmp_path):
    export(labels, tmp_path / "out", ["davis"])
    (clip,) = davis_clips(tmp_path / "out" / "davis")
    assert clip.name == "walk"
    assert len(clip) == 3
    areas = {i: mask.sum() for i, mask in clip.prompts()["00000"].items()}
    assert areas == {i: (index(0) == i).sum() for i in (1, 2, 7)}


def test_a_second_export_replaces_the_first_and_nothing_is_refused(labels, tmp_path):
    export(labels, tmp_path / "out", ["coco"])
    export(Labels(labels.name, labels.frames, SIZE, index, labels.classes, chosen=(1,)), tmp_path / "out", ["coco"])
    assert len(list((tmp_path / "out" / "coco" / "images").iterdir())) == 1
    empty = Labels(labels.name, labels.frames, SIZE, lambda _: np.zeros(SIZE, np.uint8), {1: "a"}, chosen=(0,))
    with pytest.raises(DatasetError, match="walk has no labeled object"):
        export(empty, tmp_path / "out", ["coco"])
    assert (tmp_path / "out" / "coco" / "instances.json").is_file()
