"""pe-spatial predict: files of every kind, resumed, and one sentence for what cannot be predicted."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
from helpers.blobs import draw_blobs, write_blobs
from helpers.coco import write_coco
from helpers.repository import command
from mmengine.config import Config

from pe_spatial.predict import live

pytestmark = pytest.mark.mmdet
BOXES = [(10, 10, 40, 40, 0), (50, 20, 70, 60, 1), (80, 5, 90, 15, 0)]  # the last has a score of 0.25


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture
def photos(tmp_path):
    """Two images, one of them in a folder, a broken one, and a video of four frames."""
    root = tmp_path / "photos"
    (root / "deep").mkdir(parents=True)
    Image.fromarray(draw_blobs((100, 120), BOXES)).save(root / "a.png")
    Image.fromarray(draw_blobs((90, 80), BOXES[:1])).save(root / "deep" / "b.png")
    (root / "broken.jpg").touch()
    writer = cv2.VideoWriter(str(root / "walk.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (128, 96))
    for i in range(4):
        writer.write(draw_blobs((96, 128), [(10 + 8 * i, 10, 40 + 8 * i, 50, 1)])[..., ::-1])
    writer.release()
    return root


def predict(*args, cwd):
    return command("predict", *args, "--device", "cpu", cwd=cwd)


def test_the_validation_images_of_own_data(checkpoint, tmp_path):
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "own", split=split, images=3)
    printed = predict(
        "--data", tmp_path / "own", "--checkpoint", checkpoint, "--out", "out", "--write", "json", cwd=tmp_path
    )
    assert "3 predicted, 0 kept, 0 unreadable" in printed
    shown = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert {image["file_name"].rpartition("/")[2] for image in shown} == {
        path.name for path in (tmp_path / "own" / "val2017").iterdir()
    }


def test_a_folder(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    printed = predict(
        photos, "--checkpoint", checkpoint, "--out", out, "--write", "images", "json", "csv", "masks", cwd=tmp_path
    )
    assert "3 predicted, 0 kept, 1 unreadable; 7 objects of score 0.3 or more in" in printed
    assert "unreadable: " in printed
    assert "broken.jpg is not a readable image (0 bytes)" in printed
    tables = json.loads((out / "predictions.json").read_text())
    assert [category["name"] for category in tables["categories"]] == ["red", "blue"]
    names = {image["id"]: (image["file_name"], image.get("frame")) for image in tables["images"]}
    assert sorted(names.values(), key=str) == [
        ("a.png", None), ("deep/b.png", None), *(("walk.avi", i) for i in range(4))]  # fmt: skip
    of_a = [one for one in tables["annotations"] if names[one["image_id"]] == ("a.png", None)]
    assert [(one["category_id"], one["bbox"], one["score"], one["area"]) for one in of_a] == [
        (1, [10, 10, 30, 30], 1, 900), (2, [50, 20, 20, 40], 1, 800)]  # fmt: skip
    rows = list(csv.DictReader((out / "predictions.csv").open()))
    assert rows[0] == dict(image="a.png", frame="", score="1.0000", x0="10.00", y0="10.00", x1="40.00", y1="40.00") | {
        "class": "red"}  # fmt: skip
    assert len(rows) == 7
    drawn = np.array(Image.open(out / "drawn" / "a.jpg"))
    assert drawn.shape == (100, 120, 3)
    mask = np.array(Image.open(out / "masks" / "a" / "001.png"))
    assert (mask == 255).sum() == 800
    assert mask[30, 60] == 255
    assert (out / "masks" / "walk" / "000003" / "000.png").is_file()
    capture = cv2.VideoCapture(str(out / "drawn" / "walk.mp4"))
    assert (capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)) == (4, 12)


def test_a_second_call_continues(checkpoint, photos, tmp_path):
    out = tmp_path / "out"
    args = ("--checkpoint", checkpoint, "--out", out, "--write", "json")
    assert "1 predicted, 0 kept" in predict(photos / "a.png", *args, cwd=tmp_path)
    assert not (out / "drawn").exists()
    before = (out / "parts" / "a.jsonl").stat().st_mtime_ns
    assert "2 predicted, 1 kept, 1 unreadable; 7 objects" in predict(photos, *args, cwd=tmp_path)
    assert (out / "parts" / "a.jsonl").stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match="holds predictions with another score; choose another --out, or --overwrite"):
        predict(photos, *args, "--score", 0.2, cwd=tmp_path)
    with pytest.raises(SystemExit, match="holds predictions with another write"):
        predict(photos, *args, "--write", "csv", cwd=tmp_path)
    with pytest.raises(SystemExit, match=r"--score is 2; scores are from 0 to 1"):
        predict(photos, *args, "--score", 2, cwd=tmp_path)
    printed = predict(photos, *args, "--score", 0.2, "--classes", "red", "--overwrite", cwd=tmp_path)
    assert "3 predicted, 0 kept, 1 unreadable; 3 objects" in printed


def test_tiles_and_batches_give_the_same(checkpoint, photos, tmp_path):
    tables = []
    for i, options in enumerate(((), ("--batch", 3), ("--tile", 64, "--overlap", 48), ("--tile",))):
        predict(
            photos, "--checkpoint", checkpoint, "--out", tmp_path / str(i), "--write", "csv", *options, cwd=tmp_path
        )
        tables.append((tmp_path / str(i) / "predictions.csv").read_text())
    assert tables[0] == tables[1] == tables[2] == tables[3]


def test_a_camera(checkpoint, tmp_path, monkeypatch):
    class Frames:
        dropped, reconnected, source = 5, 1, "0"

        def __init__(self, source):
            assert source == "0"

        def __iter__(self):
            yield from [draw_blobs((96, 128), BOXES[:2])] * 3
            raise KeyboardInterrupt

    monkeypatch.setattr(live, "LiveFrames", Frames)
    printed = predict("0", "--checkpoint", checkpoint, "--out", tmp_path / "out", cwd=tmp_path)
    assert "5 frames dropped, 1 times reconnected" in printed
    assert "3 predicted, 0 kept, 0 unreadable; 6 objects" in printed
    assert (tmp_path / "out" / "drawn" / "camera.mp4").is_file()
    printed = predict("0", "--checkpoint", checkpoint, "--out", tmp_path / "2", "--frames", 2, cwd=tmp_path)
    assert "2 predicted" in printed
    with pytest.raises(SystemExit, match="0 is a camera or a stream, which is predicted alone"):
        predict("0", "a.jpg", "--checkpoint", checkpoint, cwd=tmp_path)
    with pytest.raises(SystemExit, match="--frames is for cameras"):
        predict(".", "--checkpoint", checkpoint, "--frames", 2, cwd=tmp_path)


def test_only_broken_inputs_fail(checkpoint, photos, tmp_path):
    (photos / "none.mp4").touch()
    with pytest.raises(SystemExit, match="error: no input could be read"):
        predict(photos / "broken.jpg", photos / "none.mp4", "--checkpoint", checkpoint, cwd=tmp_path)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("absent",), "there is no file or folder absent; check the path"),
        (("*.gif",), r"no file matches \*.gif"),
        (("https://a.org/b.jpg",), "https://a.org/b.jpg is an address; download it"),
        (("photos", "--out", "photos"), "photos is in the folder of the results"),
        (("photos/deep", "--out", "photos"), "deep is in the folder of the results"),
        (("photos", "--out", "photos/a.png/out"), "Not a directory; check the path"),
        (("photos", "--classes", "cat"), "the model has no class 'cat'; its classes are red, blue"),
        (("photos", "--tile", "100"), "attention windows have 64 pixels, so give 128"),
        (("photos", "--batch", "0"), "the batch size is 0"),
        (("photos", "--overlap", "9"), "--overlap is of tiles; give --tile too"),
        (("photos", "--tile", "--overlap", "9999"), "the overlap is 9999; tiles of 1024 pixels allow"),
        (("photos", "--tta"), "no tta_model and no tta_pipeline"),
        (("photos", "--size", "64"), "is a model for detection, which has no --size; it has --write"),
        (("photos", "--box", "1:1,2,3,4"), "is a model for detection, which has no --box; it has --write"),
        (("photos", "--write", "ply"), "a model for detection does not write 'ply' but images, json, csv, masks"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(checkpoint, photos, args, message):
    with pytest.raises(SystemExit, match=message) as error:
        predict(*args, "--checkpoint", checkpoint, cwd=photos.parent)
    assert "\n" not in str(error.value)
    assert not (photos.parent / "predictions").exists()


def test_no_permission_to_write_is_one_sentence(checkpoint, photos, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "out" / "metadata.json"))

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(SystemExit, match="Permission denied; give another folder, or change its permissions"):
        predict(photos, "--checkpoint", checkpoint, "--out", tmp_path / "out", cwd=tmp_path)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (dict(type="ZeroShotTracker"), "use pe-spatial track_zero_shot"),
        (dict(type="PESAM2", tracker=dict(grid=4)), "is a model for tracking, which has no --score"),
        (dict(type="PEDepthEstimator"), "is a model for depth, which has no --score; it has --write, --overwrite"),
        (dict(type="mmpretrain.ImageClassifier"), "a mmpretrain.ImageClassifier of mmpretrain has no predictor"),
    ],
)  # fmt: skip
def test_checkpoints_of_other_tasks(photos, tmp_path, model, message):
    text = Config(dict(model=model, default_scope="mmseg")).pretty_text
    torch.save(dict(state_dict=dict(x=torch.ones(1)), meta=dict(cfg=text)), tmp_path / "w.pth")
    with pytest.raises(SystemExit, match=message):
        predict(photos, "--checkpoint", tmp_path / "w.pth", "--score", 0.5, cwd=tmp_path)
