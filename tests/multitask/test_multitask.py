"""Several models on one encoder: the results of each alone, one encode, and one sentence for what cannot share."""

import json

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("mmseg")
pytest.importorskip("sam2")
from helpers import multitask as helper
from helpers.blobs import draw_blobs

import pe_spatial
from pe_spatial.cli.main import build_parser
from pe_spatial.errors import ConfigError
from pe_spatial.multitask.sharing import SharedEncoder
from pe_spatial.tracking.sam2.prompts import Prompt

pytestmark = pytest.mark.slow
PROMPTS = {0: {1: Prompt(box=(10, 10, 60, 60)), 2: Prompt(box=(90, 20, 150, 80))}}


def frames(count=3, size=(192, 192)):
    return [draw_blobs(size, [(10 + 4 * t, 10, 60 + 4 * t, 60, 0), (90, 20, 150, 80, 1)]) for t in range(count)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """A detector, a depth model on four layers, a segmenter and a tracker, all on the encoder in the package."""
    root = tmp_path_factory.mktemp("models")
    return [
        helper.write(root / "detector.pth", helper.detector_config(), seed=0),
        helper.write(root / "depth.pth", helper.depth_config(), seed=1),
        helper.write(root / "segmenter.pth", helper.segmenter_config(), seed=2),
        helper.write_tracker(root / "tracker.pth", seed=3),
    ]


@pytest.fixture(scope="module")
def model(paths):
    return pe_spatial.MultiTask(paths)


def test_each_result_is_that_of_the_model_alone(model, paths):
    """Bit for bit; a tracker normalizes by other numbers, so its masks may differ where a logit is zero to rounding."""
    results = list(model.stream(frames(), PROMPTS))
    assert len(model.shared.inputs) == 1
    assert len(model.shared.inputs[0].readers) == 4
    detector, depth, segmenter, tracker = map(pe_spatial.load, paths)
    for rgb, found in zip(frames(), results, strict=True):
        alone = detector(rgb)
        assert len(alone) > 5
        for name in ("boxes", "scores", "labels"):
            assert np.array_equal(getattr(found["detection"], name), getattr(alone, name)), name
        pairs = zip(found["detection"].crops, alone.crops, strict=True)
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in pairs)
        assert np.array_equal(found["depth"].depth, depth(rgb).depth)
        assert np.array_equal(found["segmentation"].labels, segmenter(rgb).labels)
    session = tracker.start()
    for t, (rgb, found) in enumerate(zip(frames(), results, strict=True)):
        for i, mask in session.step(rgb, PROMPTS.get(t)).items():
            ours = found["tracking"].objects
            shared = ours[i].full((192, 192)) if i in ours else np.zeros((192, 192), bool)
            assert (shared != mask.numpy()).mean() < 1e-3


def test_the_encoder_runs_once_and_the_report_says_what_it_saves(model):
    encoder, calls = model.shared.groups[0].encoder, []
    hook = encoder.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    list(model.stream(frames(4), PROMPTS))
    hook.remove()
    assert len(calls) == 4
    report = model.report()
    assert report["encodes"] == 1
    assert set(report["heads"]) == {"detection", "depth", "segmentation", "tracking"}
    assert report["total"] == pytest.approx(report["encoder"] + sum(report["heads"].values()), abs=0.1)
    assert report["separate"] == pytest.approx(report["total"] + 3 * report["encoder"], rel=0.5)
    assert model.groups() == ["detector.pth, depth.pth, segmenter.pth, tracker.pth: layers [1, 2, 3, 4] of one encode"]


def test_boxes_start_tracks_and_a_common_size_serves_frames_of_any_form(paths):
    detector, depth, _, tracker = paths
    model = pe_spatial.MultiTask([detector, depth, tracker], size=192)
    first, second = model.stream(frames(2, (150, 260)))
    assert first["detection"].image_size == first["depth"].image_size == first["tracking"].image_size == (150, 260)
    assert len(first["tracking"].objects) > 0
    assert set(second["tracking"].objects) <= set(range(1, len(first["detection"]) + 1))
    assert len(model.shared.inputs) == 1
    alone = pe_spatial.load(detector)(cv2.resize(frames(1, (150, 260))[0], (192, 192), interpolation=cv2.INTER_LINEAR))
    expected = alone.boxes * np.float32([260 / 192, 150 / 192] * 2)
    assert np.abs(first["detection"].boxes - expected).max() < 0.5  # shrinks one side, so INTER_AREA or INTER_LINEAR


def test_what_cannot_share_is_one_sentence(paths, tmp_path):
    detector, depth, _, tracker = paths
    tuned = helper.write(tmp_path / "tuned.pth", helper.depth_config(), tuned=True)
    with pytest.raises(ConfigError, match=r"detector.pth and .*tuned.pth have different encoders \(blocks.2.mlp.fc1"):
        pe_spatial.MultiTask([detector, tuned])
    with pytest.raises(ConfigError, match="there is 1 model to share"):
        pe_spatial.MultiTask([detector])
    with pytest.raises(ConfigError, match="two trackers"):
        pe_spatial.MultiTask([tracker, tracker])
    with pytest.raises(ConfigError, match="nothing to track"):
        list(pe_spatial.MultiTask([depth, tracker]).stream(frames(1)))
    with pytest.raises(ConfigError, match=r"260x150 .* 192x192 \(detector.pth\), 264x152 .* no common image size"):
        pe_spatial.MultiTask([detector, depth])(frames(1, (150, 260))[0])
    cfg = helper.depth_config()
    cfg.model.backbone.lora = dict(rank=2)
    adapted = helper.write(tmp_path / "lora.pth", cfg)
    with pytest.raises(ConfigError, match=r"lora.pth has LoRA adapters"):
        pe_spatial.MultiTask([detector, adapted])


def test_geometries_are_encoded_apart(paths, tmp_path):
    """A model with windows gets its own encode of the same image, and the results stay those of the models alone."""
    cfg = helper.depth_config()
    cfg.model.backbone.window_size = 12
    cfg.model.backbone.global_attn_indexes = [2, 4]
    windowed = helper.write(tmp_path / "windowed.pth", cfg, seed=1)
    model = pe_spatial.MultiTask([paths[0], paths[1], windowed])
    assert model.tasks == ("detection", "depth", "depth_2")
    assert [group.members for group in model.shared.groups] == [[str(paths[0]), str(paths[1])], [str(windowed)]]
    result = model(frames(1)[0])
    assert model.report()["encodes"] == 2
    assert np.array_equal(result["depth_2"].depth, pe_spatial.load(windowed)(frames(1)[0]).depth)


def test_a_close_image_is_another_image():
    """One step of one pixel is not rounding."""
    encoder = torch.nn.Module()
    encoder.inner = pe_spatial.PerceptionEncoder(
        pe_spatial.EncoderConfig(img_size=32, patch_size=16, embed_dim=32, depth=1, num_heads=2)
    ).eval()
    shared = SharedEncoder()
    shared.attach("a", encoder)
    images = torch.zeros(1, 3, 32, 32)
    other = images.clone()
    other[0, 0, 0, 0] = 1 / 127.5
    with torch.no_grad():
        maps = [encoder.inner(x)[0] for x in (images, images + 1e-6, other)]
    assert len(shared.inputs) == 2
    assert maps[0] is maps[1]
    assert not torch.equal(maps[0], maps[2])


def test_predict_writes_a_folder_for_each_task_and_continues(paths, tmp_path, capsys):
    from pe_spatial.cli.predict import run

    writer = cv2.VideoWriter(str(tmp_path / "walk.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 12, (192, 192))
    for rgb in frames(3):
        writer.write(rgb[..., ::-1])
    writer.release()
    models = [str(paths[i]) for i in (0, 1, 3)]
    given = [str(tmp_path / "walk.avi"), "--out", str(tmp_path / "out"), "--write", "images", "json", "masks"]
    options = [*given, "--score", "0.05", "--device", "cpu", "--checkpoint", *models]
    for kept in (0, 1):
        run(build_parser("predict").parse_args(options))
        assert f"{1 - kept} predicted, {kept} kept, 0 unreadable" in capsys.readouterr().out
    out = tmp_path / "out"
    assert json.loads((out / "metadata.json").read_text())["costs"]["frames"] == 3
    for task in ("detection", "depth", "tracking"):
        tables = json.loads((out / task / "predictions.json").read_text())
        assert [image["frame"] for image in tables["images"]] == [0, 1, 2]
        assert (out / task / "drawn" / "walk.mp4").is_file()
        about = json.loads((out / task / "metadata.json").read_text())["model"]
        assert about["checkpoint"] == f"{task.replace('detection', 'detector').replace('tracking', 'tracker')}.pth"
    tracks = json.loads((out / "tracking" / "predictions.json").read_text())["annotations"]
    assert 1 in {one["track_id"] for one in tracks}
    depth = cv2.imread(str(out / "depth" / "masks" / "walk" / "000002.png"), cv2.IMREAD_UNCHANGED)
    assert depth.dtype == np.uint16
    with pytest.raises(ConfigError, match="several checkpoints have no --tile"):
        run(build_parser("predict").parse_args([*options, "--tile"]))
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "manifest.json").touch()
    with pytest.raises(ConfigError, match="has 3 frames, so there is no frame 3 to prompt on"):
        run(build_parser("predict").parse_args([*options, "--box", "1@3:1,2,30,40"]))
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metadata.json").write_text('{"model": {}}')
    with pytest.raises(ConfigError, match=r"metadata\.json is not of such predictions; choose another --out"):
        run(build_parser("predict").parse_args([*options, "--out", str(tmp_path / "one")]))
    with pytest.raises(ConfigError, match="is an exported model, which shares no encoder; predict with it alone"):
        run(build_parser("predict").parse_args([*options, str(tmp_path / "exported")]))
    with pytest.raises(ConfigError, match=r"another score; choose another --out"):
        run(build_parser("predict").parse_args([*options, "--score", "0.5"]))
