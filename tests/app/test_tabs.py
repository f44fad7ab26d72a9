"""What the tabs of the page do, without gradio and without a browser."""

import json
import logging
import socket
from pathlib import Path
from zipfile import ZipFile

import cv2
import numpy as np
import pytest
import torch
from helpers.app import FakeDepth, FakeDetector, fake_models, write_clip
from PIL import Image

from pe_spatial.app import depth, detect, label, together, track
from pe_spatial.app.compare import Comparison
from pe_spatial.app.features import Seen
from pe_spatial.app.models import Limits, Models, load_models, sentence, with_sentences
from pe_spatial.cli.app import check_address
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.features.extract import FeatureExtractor
from pe_spatial.features.patches import similarity
from pe_spatial.features.phrases import PhraseMaps
from pe_spatial.features.sheet import heat
from pe_spatial.tracking.sam2.session import Click

pytest.importorskip("sam2")


@pytest.fixture(scope="module")
def models():
    return fake_models()


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "a <b>.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 128, 3), np.uint8)).save(path)
    return str(path)


def test_detect_shows_and_writes_what_is_above_the_score(models, image, tmp_path):
    found = detect.detect(models, image)
    for score, names in ((0.0, ["cat", "dog"]), (0.5, ["cat"]), (0.95, [])):
        drawn, rows = found.show(score)
        assert [row["name"] for row in rows] == names
        assert drawn.shape == (96, 128, 3)
        assert np.array_equal(drawn, found.rgb) == (not names)
    found.write_json(0.5, tmp_path / "a.json")
    written = json.loads((tmp_path / "a.json").read_text())
    assert [x["category_id"] for x in written["annotations"]] == [1]
    assert written["images"] == [dict(id=0, file_name="a <b>.png", width=128, height=96)]
    assert written["categories"] == [dict(id=1, name="cat"), dict(id=2, name="dog")]


def test_depth_gives_a_pair_of_images_and_points(models, image, tmp_path):
    measured = depth.measure(models, image)
    (photo, colors), text = measured.show()
    assert photo.shape == colors.shape == (96, 128, 3)
    assert text.endswith(" m, red is near")
    assert measured.write_points(60, tmp_path / "a.ply").startswith("12288 points, fx 110.85")
    assert (tmp_path / "a.ply").read_bytes().startswith(b"ply")
    relative = Models(predictors=dict(depth=FakeDepth("relative depth")))
    with pytest.raises(DatasetError, match="predicts relative depth, and points need meters"):
        depth.measure(relative, image).write_points(60, tmp_path / "b.ply")
    with pytest.raises(ConfigError, match="field of view is 0 degrees"):
        measured.write_points(0, tmp_path / "b.ply")


def test_features_of_layers_and_the_similarity_to_a_clicked_patch(models, image):
    seen = Seen.look(models, "tiny", image)
    assert len(seen.maps) == 4
    shown = [seen.photo(None), seen.photo((3, 90)), *(seen.pca(i) for i in range(4))]
    assert {x.shape for x in shown} == {(480, 640, 3)}
    assert not np.array_equal(seen.pca(0), seen.pca(3))
    assert seen.similar(2, None) is None
    at = seen.pixel((620, 10))  # of the image shown, which is 5 times as large
    assert at == (124, 2)
    cells = seen.similar(2, at)[8::80, 8::80].astype(int)  # one pixel of each patch: 6 x 8
    best = np.abs(cells - cells[0, 7]).sum(-1)
    expected = similarity(seen.maps[2][0], (0, 7))
    assert (best == 0).sum() == 1
    assert expected.argmax() == 7
    assert seen.pixel((640, 480)) == (127, 95)  # the last pixel


def test_a_phrase_is_shown_where_the_core_finds_it(models, image):
    pytest.importorskip("open_clip")
    seen = Seen.look(models, "tiny", image)
    shown = seen.phrase(models.words, "a red cone")
    assert shown.shape == (480, 640, 3)
    values = PhraseMaps(models.words, ["a red cone"]).maps(seen.rgb, "a.png")[0]
    assert np.array_equal(shown[80::160, 80::160], heat(values, cv2.COLORMAP_VIRIDIS))  # 3 x 4 patches
    assert not np.array_equal(shown, seen.phrase(models.words, "wood"))
    assert seen.phrase(models.words, " ") is None


def test_compare_runs_an_encoder_once(models, image):
    calls = []
    hook = models.encoders["tiny"].encoder.register_forward_hook(lambda *_: calls.append(1))
    comparison = Comparison(models, image, "tiny", "tiny")
    hook.remove()
    assert len(calls) == 1
    photo, left, right, *similar = comparison.show(0, 3)
    assert similar == [None, None]
    assert not np.array_equal(left, right)
    comparison.point = (10.0, 10.0)
    marked, _, _, first, second = comparison.show(0, 3)
    assert not np.array_equal(photo, marked)
    assert not np.array_equal(first, second)
    two = Comparison(models, image, "tiny", "other").show(3, 99)  # a slider of the encoder before
    assert not np.array_equal(two[1], two[2])


def test_track_a_clip(models, tmp_path):
    session = track.open_video(models, str(write_clip(tmp_path / "discs.mp4", 6)))
    assert track.status(session) == "0 of 6 frames have masks, no object yet"
    with pytest.raises(DatasetError, match="no object to track; click on one"):
        list(track.track(session))
    assert list(track.click(session, 2, Click(1, 38, 48))) == [0, 1, 2, 2]
    assert list(track.track(session)) == [3, 4, 5]
    assert track.status(session) == "6 of 6 frames have masks, objects 1"
    session.write_masks(tmp_path / "m.zip")
    assert session.mask(5).any()
    session.close()
    assert not session.video.frames[0].exists()


def test_several_tasks_of_an_image_and_a_video_side_by_side(models, image, tmp_path):
    (sheet,) = together.predict(models, image)
    rgb = np.asarray(Image.open(image))
    views = FakeDetector()(rgb).draw(rgb), FakeDepth()(rgb).draw(rgb)
    assert np.array_equal(sheet, np.concatenate(views, axis=1))
    said = together.costs(models.predictors["together"].report())
    assert said.startswith("1 frames; medians in ms: 1 encodes 10, detection 20, depth 5, together 35; separate")
    clip = str(write_clip(tmp_path / "discs.mp4", 4))
    assert [one.shape for one in together.predict(models, clip)] == [(96, 256, 3)] * 4
    with pytest.raises(DatasetError, match=r"discs\.mp4 has more than 3 frames; cut it"):
        list(together.predict(Models(predictors=models.predictors, limits=Limits(max_frames=3)), clip))
    with pytest.raises(DatasetError, match="there is no file; upload an image or a video"):
        list(together.predict(models, None))
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    with pytest.raises(DatasetError, match=r"the video broken\.mp4; convert"):
        list(together.predict(models, str(broken)))


def test_label_a_clip_and_continue_with_another_server(tmp_path):
    models, clip = fake_models(labels=tmp_path / "labels"), str(write_clip(tmp_path / "discs.mp4", 6))
    assert label.known(models) == []
    project = label.open_upload(models, clip)
    with pytest.raises(DatasetError, match="no object to track"):
        list(project.track())
    with pytest.raises(DatasetError, match="outside the frame of 128x96"):
        list(label.click(project, 0, Click(1, 128, 2), "disc"))
    assert list(label.click(project, 2, Click(1, 38, 48), "disc")) == [1, 2, 2]  # 0 came before the error
    list(label.click(project, 2, Click(2, 90, 20), ""))
    list(project.track())
    project.accept(label.worst(project))
    assert label.status(project, 5).startswith(
        "6 of 6 frames have masks, 1 accepted; objects: 1 disc, 2 object; confidence on frame 5: 1: "
    )
    with pytest.raises(DatasetError, match="no form is chosen"):
        label.write(models, project, [])
    names = ZipFile(label.write(models, project, ["coco", "yolo"])).namelist()
    assert {"journal.jsonl", "review.png", "coco/instances.json", "coco/images/00002.jpg", "yolo/data.yaml"} <= {*names}
    assert not any("source" in name for name in names)
    expected = [project.session.mask(t) for t in range(6)]
    other = fake_models(labels=tmp_path / "labels")
    assert label.known(other) == ["discs"]
    again = label.open_known(other, "discs")
    list(again.track())
    assert all(np.array_equal(again.session.mask(t), expected[t]) for t in range(6))
    assert label.open_upload(other, clip).session.objects == [1, 2]  # the same video again
    with pytest.raises(DatasetError, match=r"holds the labels of discs\.mp4"):
        label.open_upload(other, str(write_clip(tmp_path / "new" / "discs.mp4", 5)))
    with pytest.raises(DatasetError, match="there is no project 'cats'"):
        label.open_known(other, "cats")
    with pytest.raises(DatasetError, match="there is no video"):
        label.needed(None)


def test_the_file_of_an_image_is_written_once(tmp_path):
    """Else a browser that reads it while the same image is shown again gets a part of it."""
    gr = pytest.importorskip("gradio")
    from pe_spatial.app.widgets import image_view, write_once

    image = np.random.default_rng(0).integers(0, 255, (8, 9, 3), np.uint8)
    for component, value in ((image_view("a", "a"), image), (write_once(gr.ImageSlider(format="png")), (image, image))):
        component.GRADIO_CACHE = str(tmp_path / component.get_block_name())
        found = component.postprocess(value)
        path = Path((found.root[1] if isinstance(value, tuple) else found).path)
        assert np.array_equal(np.asarray(Image.open(path)), image)
        before = path.stat()
        component.postprocess(value)
        assert path.stat().st_mtime_ns == before.st_mtime_ns
        assert path.stat().st_ino == before.st_ino
    assert image_view("a", "a").postprocess(None) is None


def test_missing_and_bad_uploads_are_one_sentence(models, image, tmp_path):
    small = Models(limits=Limits(megabytes=0.01, megapixels=0.01, max_frames=5), predictors=models.predictors)
    with pytest.raises(DatasetError, match="there is no file; upload an image"):
        detect.detect(models, None)
    with pytest.raises(DatasetError, match=r"a <b>.png has 0 MB, and the page takes at most 0.01 MB"):
        detect.detect(small, image)
    few_pixels = Models(limits=Limits(megapixels=0.01))
    with pytest.raises(DatasetError, match=r"has 128x96 pixels, and the page takes at most 0.01 megapixels; resize"):
        few_pixels.read_image(image)
    for name, content in (("text.png", b"no image"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=f"^{name} is not a readable image"):
            models.read_image(str(tmp_path / name))
        with pytest.raises(DatasetError, match=rf"(cannot open the video|no frame of) {name}"):
            track.open_video(models, str(tmp_path / name))
    with pytest.raises(DatasetError, match="has 9 frames, and at most 5"):
        track.open_video(
            Models(limits=Limits(max_frames=5), predictors=models.predictors), str(write_clip(tmp_path / "l.mp4", 9))
        )
    with pytest.raises(DatasetError, match="there is no video; upload one"):
        track.needed(None)
    tiny = tmp_path / "dot.png"
    Image.new("RGB", (1, 1)).save(tiny)
    with pytest.raises(DatasetError, match="has 1x1 pixels, less than one patch"):
        Seen.look(models, "tiny", str(tiny))


def test_errors_of_jobs_and_generators_are_sentences_without_html(caplog):
    def job(kind):
        raise kind

    def steps(kind):
        yield 1
        raise kind

    class Shown(Exception):
        pass

    with pytest.raises(Shown, match=r"a &lt;b&gt;.png is broken") as caught:
        with_sentences(job, Shown)(DatasetError("a <b>.png is broken"))
    assert caught.value.__suppress_context__
    running = with_sentences(steps, Shown)(OSError(28, "No space left on device"))
    assert next(running) == 1
    with pytest.raises(Shown, match="No space left on device; the disk of the server may be full"):
        next(running)
    assert "--device cpu" in sentence(torch.OutOfMemoryError("CUDA out of memory. Tried"))
    with caplog.at_level(logging.ERROR):
        assert sentence(KeyError("x")).startswith("the page failed (KeyError); the terminal")
    assert caplog.records[0].exc_info


def test_addresses_and_limits_that_cannot_be():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"cannot serve at 127.0.0.1:{port} \(Address already in use\); give"):
            check_address("127.0.0.1", port)
    check_address("127.0.0.1", port)
    for host, number in (("127.0.0.1", 99999), ("no.such.host.invalid", 7860)):
        with pytest.raises(
            ConfigError, match=rf"cannot serve at {host}:{number} \(.+\); give another --host or --port"
        ):
            check_address(host, number)
    with pytest.raises(ConfigError, match="--max-frames is 0; it must be more than 0"):
        Limits(max_frames=0)
    with pytest.raises(ConfigError, match="--max-upload is nan"):
        Limits(megabytes=float("nan"))


def test_loading_refuses_a_checkpoint_of_another_task(monkeypatch):
    monkeypatch.setattr("pe_spatial.app.models.load", lambda *_, **__: FakeDetector())
    with pytest.raises(ConfigError, match=r"x.pth is a model for detection, not for depth; give"):
        load_models(dict(detection=None, depth="x.pth"), [], device="cpu", limits=Limits())
    found = load_models(dict(detection="x.pth", depth=None), ["pe_synthetic_xs8_192"], device="cpu", limits=Limits())
    assert list(found.predictors) == ["detection"]
    assert isinstance(found.encoders["pe_synthetic_xs8_192"], FeatureExtractor)
    monkeypatch.setattr("pe_spatial.app.models.MultiTask", lambda *given, **options: (given, options))
    shared = load_models({}, [], device="cpu", limits=Limits(), together=["a.pth", "b.pth"], size=96).predictors
    assert shared == dict(together=((["a.pth", "b.pth"],), dict(device="cpu", score=0.3, size=96)))
    assert found.new_file("a.json").parent != found.new_file("a.json").parent
    with pytest.raises(CheckpointError, match="unknown variant 'nothing_like_it'; allowed are"):
        load_models({}, ["nothing_like_it"], device="cpu", limits=Limits())
