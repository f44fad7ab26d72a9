"""Segmenters, depth estimators and trackers through `pe_spatial.load` and `pe-spatial predict`."""

import json

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
from helpers.repository import CONFIGS, command
from helpers.videos import TINY, moving
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings
from mmseg.apis import inference_model, init_model

import pe_spatial
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmseg
CLASSES = ("wall", "floor", "cup")
TRACKER = dict(variant=TINY, grid=4, d_model=32, mem_dim=8, layers=1, feedforward=32)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name, size in (("a", (70, 90)), ("b", (70, 90)), ("c", (50, 40))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(root / f"{name}.png")
    return root


def write(cfg, path, randomize=None, **meta):
    """Write a model as training does."""
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if randomize:
        randomize(model)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text, **meta)), path)
    return path


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory, randomize):
    cfg = Config.fromfile(CONFIGS / "pe_spatial_linear_ade20k.py")
    cfg.model.backbone.update(variant=TINY, init_cfg=None)
    cfg.model.decode_head.update(num_classes=len(CLASSES), map_size=(24, 24))
    cfg.model.test_cfg = dict(mode="whole")
    path = tmp_path_factory.mktemp("segmenter")
    cfg.dump(path / "c.py")
    meta = dict(classes=CLASSES, palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200]])
    return write(cfg, path / "w.pth", randomize, dataset_meta=meta)


@pytest.fixture(scope="module")
def depth(tmp_path_factory):
    cfg = Config.fromfile(CONFIGS / "pe_spatial_lin1_nyu.py")
    cfg.model.backbone.update(variant=TINY, init_cfg=None)
    return write(cfg, tmp_path_factory.mktemp("depth") / "w.pth", dataset_meta=dict(image_size=(48, 64)))


def test_a_segmenter_is_that_of_mmsegmentation(segmenter, photos):
    predictor = pe_spatial.load(segmenter)
    files = sorted(photos.iterdir())
    results = predictor(files, batch_size=3)
    assert (predictor.task, predictor.class_names) == ("segmentation", CLASSES)
    theirs = init_model(str(segmenter.parent / "c.py"), str(segmenter), device="cpu")
    for file, result in zip(files, results, strict=True):
        expected = inference_model(theirs, str(file)).pred_sem_seg.data[0].numpy()
        assert len(np.unique(expected)) > 1
        assert (result.labels == expected).all()
        assert result.draw(file).shape == (*result.image_size, 3)
    with pytest.raises(ConfigError, match="score is for detectors"):
        pe_spatial.load(segmenter, score=0.5)


def test_predict_with_a_segmenter(segmenter, photos, tmp_path):
    printed = command("predict", photos, "--checkpoint", segmenter, "--out", tmp_path / "out", "--device", "cpu",
                      "--write", "masks", "csv", "json", cwd=tmp_path)  # fmt: skip
    assert "3 predicted" in printed
    labels = np.array(Image.open(tmp_path / "out" / "masks" / "c.png"))
    assert (labels == pe_spatial.load(segmenter)(photos / "c.png").labels).all()
    tables = json.loads((tmp_path / "out" / "predictions.json").read_text())
    areas = [one["area"] for one in tables["annotations"] if one["image_id"] == 3]
    assert sum(areas) == 50 * 40


def test_a_depth_estimator_gets_images_of_its_training_size(depth, photos):
    predictor = pe_spatial.load(depth)
    assert (predictor.task, predictor.quantity, predictor.size) == ("depth", "meter", 48)
    one, two, three = predictor(sorted(photos.iterdir()), batch_size=2)
    (expected,) = predictor.estimator([np.array(Image.open(photos / "b.png"))], size=48)
    np.testing.assert_allclose(two.depth, expected, rtol=1e-5)
    assert (three.depth.shape, one.quantity) == ((50, 40), "meter")
    assert one.draw(photos / "a.png").shape == (70, 90, 3)
    with pytest.raises(ConfigError, match="is a model for depth, which has no score and no tta; omit"):
        pe_spatial.load(depth, score=0.5, tta=True)


def test_predict_with_a_depth_estimator(depth, photos, tmp_path):
    args = ("--checkpoint", depth, "--out", tmp_path / "out", "--device", "cpu")
    printed = command("predict", photos, *args, "--write", "png", "--batch", 2, cwd=tmp_path)
    assert "3 predicted, 0 kept" in printed
    assert np.load(tmp_path / "out" / "a.npy").shape == (70, 90)
    assert (tmp_path / "out" / "a_depth.png").is_file()
    assert "0 predicted, 3 kept" in command("infer_depth", photos, *args, "--write", "png", cwd=tmp_path)
    with pytest.raises(SystemExit, match="give --tile a number of pixels"):
        command("predict", photos, *args, "--tile", cwd=tmp_path)
    command("predict", photos, *args[:2], "--out", tmp_path / "small", "--size", 32, "--write", "png", cwd=tmp_path)
    assert json.loads((tmp_path / "small" / "metadata.json").read_text())["model"]["size"] == 32


@pytest.fixture(scope="module")
def tracker(tmp_path_factory, randomize):
    pytest.importorskip("sam2")
    import pe_spatial.tracking.sam2.tracker  # noqa: F401  (registers)

    root = tmp_path_factory.mktemp("tracker")
    cfg = Config(dict(model=dict(type="PESAM2", tracker=TRACKER), default_scope="mmengine"))
    model = randomize(MODELS.build(cfg.model))
    model.tracker.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), root / "w.pth")
    for name, rgb, _ in moving(4):
        (root / "frames").mkdir(exist_ok=True)
        Image.fromarray(rgb).save(root / "frames" / f"{name}.png")
    return root


def test_a_tracker(tracker):
    from pe_spatial.tracking.sam2.prompts import Prompt

    predictor = pe_spatial.load(tracker / "w.pth")
    prompts = {0: {2: Prompt(box=(10, 28, 50, 68))}, 1: {5: Prompt(points=[(100, 66)], labels=[1])}}
    tracks = predictor(tracker / "frames", prompts)
    assert (predictor.task, tracks.frames) == ("tracking", ("00000", "00001", "00002", "00003"))
    streaming = predictor.start()
    for number, (_, rgb, _) in enumerate(moving(4)):
        expected = streaming.step(rgb, prompts.get(number))
        found = tracks.masks(number)
        assert all((found.get(i, np.zeros(mask.shape, bool)) == mask.numpy()).all() for i, mask in expected.items())
        assert tracks.draw(rgb, number).shape == rgb.shape
    assert set(tracks.ids) <= {2, 5}
    assert tracks.ids
    assert all(len(one["segmentations"]) == 4 for one in tracks.to_coco())
    with pytest.raises(DatasetError, match="there is no object to track; give prompts"):
        predictor(tracker / "frames")


def test_predict_with_a_tracker(tracker, tmp_path):
    args = ("--checkpoint", tracker / "w.pth", "--out", tmp_path / "out", "--device", "cpu")
    printed = command("predict", tracker / "frames", *args, "--box", "2:10,28,50,68", "--write", "masks", cwd=tmp_path)
    assert "1 objects through 4 frames" in printed
    assert cv2.VideoCapture(str(tmp_path / "out" / "frames.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 4
    assert len(list((tmp_path / "out" / "masks" / "frames").iterdir())) == 4
    with pytest.raises(SystemExit, match="there is no object to track; give --points, --box or --mask"):
        command("predict", tracker / "frames", *args, cwd=tmp_path)
    with pytest.raises(SystemExit, match="prompts belong to one video; give one input"):
        command("predict", tracker / "frames", "other.mp4", *args, cwd=tmp_path)
