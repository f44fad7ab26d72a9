"""pe-spatial label: prompts and a detector's boxes become a dataset; a second call goes on."""

import json

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("sam2")
from helpers.blobs import draw_blobs, write_blobs
from helpers.multitask import write_tracker

from pe_spatial.cli.label import run
from pe_spatial.cli.main import build_parser
from pe_spatial.data import open_dataset
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
ENCODER = dict(img_size=64, patch_size=8, embed_dim=32, depth=1, num_heads=2)


@pytest.fixture(scope="module")
def tracker(tmp_path_factory):
    path = tmp_path_factory.mktemp("tracker") / "tracker.pth"
    return write_tracker(path, weights=None, variant=ENCODER, grid=4)


@pytest.fixture
def frames(tmp_path):
    """Two rectangles that move."""
    folder = tmp_path / "walk"
    folder.mkdir()
    for t in range(6):
        rgb = draw_blobs((96, 128), [(10 + 4 * t, 10, 40 + 4 * t, 40, 0), (70, 50, 100, 80, 1)])
        Image.fromarray(rgb).save(folder / f"{t:03d}.png")
    return folder


def label(frames, tracker, *options):
    out = ["--out", str(frames.parent / "labels"), "--device", "cpu"]
    run(build_parser("label").parse_args([str(frames), "--checkpoint", str(tracker), *out, *options]))


def test_prompts_then_corrections_then_a_detector(frames, tracker, tmp_path, capsys):
    label(frames, tracker, "--box", "1:10,10,40,40", "--classes", "1:red", "--every", "2")
    printed = capsys.readouterr().out
    assert "1 objects through 6 frames, 3 of them in coco" in printed
    assert "check frame" in printed
    assert f"--data {tmp_path / 'labels' / 'coco'}" in printed
    detector = ["--from", str(write_blobs(tmp_path)), "--frames", "5"]
    label(frames, tracker, "--points", "1@3:25,25", "1@3:90,60,0", *detector)
    entries = [json.loads(line) for line in (tmp_path / "labels" / "journal.jsonl").read_text().splitlines()]
    prompts = [(entry["frame"], entry["object"]) for entry in entries if entry["op"] == "prompt"]
    assert prompts[:3] == [(0, 1), (3, 1), (3, 1)]
    assert (5, 2) in prompts
    assert {entry["name"] for entry in entries if entry["op"] == "class"} == {"red", "blue"}
    content = json.loads((tmp_path / "labels" / "coco" / "instances.json").read_text())
    assert len(content["images"]) == 6
    dataset = open_dataset(tmp_path / "labels")
    read = sum(len(split.content["annotations"]) for split in dataset.splits.values())
    assert read == len(content["annotations"]) > 0


def test_every_form_in_one_call(frames, tracker, tmp_path):
    mask = np.zeros((96, 128), np.uint8)
    mask[10:40, 10:40] = 3
    Image.fromarray(mask).save(tmp_path / "first.png")
    forms = ["--write", "coco", "yolo", "cvat", "davis", "--polygons"]
    label(frames, tracker, "--mask", str(tmp_path / "first.png"), *forms)
    names = {path.name for path in (tmp_path / "labels").iterdir()}
    assert names == {"coco", "yolo", "cvat", "davis", "review.png", "journal.jsonl"}
    content = json.loads((tmp_path / "labels" / "coco" / "instances.json").read_text())
    assert isinstance(content["annotations"][0]["segmentation"], list)


def test_bad_input_is_one_sentence(frames, tracker):
    folder = frames.parent / "labels"
    for options, message in [
        ([], "no object to label; give --points"),
        (["--frames", "1"], "without --from there is no use of --frames; omit it"),
        (["--score", "0.2"], "without --from there is no use of --score; omit it"),
        (["--from", "d.pth", "--score", "7"], "--score is 7; scores are from 0 to 1"),
        (["--write", "yolo", "--polygons"], "only --write coco has --polygons; omit it"),
        (["--every", "0"], "--every is 0; 1 writes every frame"),
        (["--points", "1:3,3,2"], "has label 2; 1 is on the object"),
        (["--from", str(tracker)], "is a model for tracking; give one for detection"),
    ]:
        with pytest.raises(ConfigError, match=message):
            label(frames, tracker, *options)
        assert not folder.exists()
    exported = frames.parent / "exported"
    exported.mkdir()
    (exported / "manifest.json").touch()
    with pytest.raises(ConfigError, match="is an exported model, and labels need the checkpoint"):
        label(frames, exported, "--box", "1:10,10,40,40")
    with pytest.raises(DatasetError, match="within the frame of 128x96"):
        label(frames, tracker, "--box", "1:10,10,40,40", "2:10,10,40,400")
    with pytest.raises(ConfigError, match="--classes names object 2, but the objects are 1; give it a prompt"):
        label(frames, tracker, "--box", "1:10,10,40,40", "--classes", "2:cat")
    with pytest.raises(ConfigError, match="has no frame 6; it has frames 0 to 5"):
        label(frames, tracker, "--box", "1:10,10,40,40", "2@6:10,10,40,40")
    assert len((folder / "journal.jsonl").read_text().splitlines()) == 1  # no prompt of these
    (frames / "006.png").write_bytes((frames / "005.png").read_bytes())
    with pytest.raises(DatasetError, match=r"holds the labels of walk \(6 frames .* not of walk \(7 frames"):
        label(frames, tracker)
