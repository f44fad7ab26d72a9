"""Detectors whose classes are words: proposals of RPNs and of DETA, detections relabeled and filtered."""

import json

import numpy as np
import pytest
import torch
from helpers.blobs import draw_blobs, write_blobs
from helpers.language import WORD_CORE, tiny_core
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("open_clip")
from helpers.configs import load as load_config
from helpers.reference_deta import ReferenceDETA
from helpers.repository import CONFIGS
from mmengine.registry import MODELS
from torch.testing import assert_close
from torchvision.ops import box_convert, nms

import pe_spatial
from pe_spatial.cli.main import main
from pe_spatial.errors import ConfigError
from pe_spatial.language.checkpoint import save_core
from pe_spatial.language.regions import RegionClassifier
from pe_spatial.predict.words import _of_deta, name_regions, propose

pytestmark = pytest.mark.mmdet
RGB = draw_blobs((100, 120), [(10, 10, 40, 40, 0), (50, 20, 70, 60, 1)])


@pytest.fixture(scope="module")
def core(tmp_path_factory):
    path = tmp_path_factory.mktemp("core") / "core.safetensors"
    save_core(tiny_core(WORD_CORE), path)
    return path


@pytest.fixture(scope="module")
def blobs(tmp_path_factory):
    return write_blobs(tmp_path_factory.mktemp("blobs"))


@pytest.fixture(scope="module")
def cascade(tmp_path_factory, core):
    """The demo's detector with random heads."""
    cfg = load_config(CONFIGS / "pe_demo_cascade_synthetic.py")
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("cascade") / "w.pth"
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=("a", "b", "c", "d", "e")))
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict(), meta=meta), path)
    return pe_spatial.load(path, words=core)


def test_proposals_get_names(cascade):
    found = cascade(RGB, classes=["a red cone", "犬"])
    assert found.class_names == ("a red cone", "犬")
    assert 0 < len(found) <= 100
    assert (found.boxes[:, 2:] <= (120, 100)).all()
    assert (np.diff(found.scores) <= 0).all()
    several = cascade([RGB, RGB[:60]], classes=["a red cone", "犬"], by="crops", batch_size=2)
    assert [one.image_size for one in several] == [(100, 120), (60, 120)]
    assert cascade(RGB).class_names == ("a", "b", "c", "d", "e")
    with pytest.raises(ConfigError, match="the list names no class"):
        cascade(RGB, classes=[])


def test_proposals_are_the_best_of_the_rpn(cascade):
    (found,) = propose(cascade, [cascade._prepare(RGB)], [RGB])
    assert len(found) == 100
    assert set(found.names) == {"object"}
    assert (np.diff(found.scores) <= 0).all()
    assert (found.boxes >= 0).all()


def test_proposals_of_deta(golden):
    fixture = ReferenceDETA(golden / "deta")
    samples = fixture.samples()
    with torch.inference_mode():
        found = _of_deta(fixture.model, fixture.value("input"), samples)
    for i, (boxes, scores) in enumerate(found):
        height, width = samples[i].ori_shape
        reference = box_convert(fixture.value("enc_boxes")[i], "cxcywh", "xyxy").clamp(0, 1)
        reference = reference * torch.tensor([width, height] * 2)
        distance = (boxes[:, None] - reference).abs().amax(-1)
        assert distance.min(1).values.max() < 0.1  # pixels
        best = distance.argmin(1)
        assert_close(scores, fixture.value("enc_objectness")[i][best].sigmoid(), rtol=1e-3, atol=1e-3)
        assert (scores.diff() <= 0).all()
        assert len(nms(boxes, scores, 0.7)) == len(boxes)


def test_detections_are_relabeled_and_filtered(blobs, core):
    predictor = pe_spatial.load(blobs, words=core)
    plain = predictor(RGB)
    classifier = RegionClassifier(tiny_core(WORD_CORE), ["a red cone", "wood"], background=["an object"])
    probabilities = classifier(RGB, plain.boxes, plain.masks)
    named = name_regions(plain, RGB, classifier)
    kept = probabilities.argmax(1) < 2
    np.testing.assert_allclose(named.scores, (plain.scores * probabilities.max(1))[kept], rtol=1e-5)
    assert named.class_names == ("a red cone", "wood")
    assert len(named.crops) == len(named)
    with pytest.raises(ConfigError, match="a Blobs has no class-agnostic proposals; name its detections"):
        predictor(RGB, classes=["a", "b"])
    with pytest.raises(ConfigError, match="words need a PE-Core"):
        pe_spatial.load(blobs)(RGB, classes=["a", "b"])


def predict(*argv):
    main([*map(str, argv)], "predict")


def test_keep(blobs, core, tmp_path, capsys):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    common = (tmp_path / "a.png", "--checkpoint", blobs, "--device", "cpu", "--write", "json", "--out")
    predict(*common, tmp_path / "one", "--keep", "a red cone", "--words", core, "--score", 0)
    table = json.loads((tmp_path / "one" / "predictions.json").read_text())
    assert [category["name"] for category in table["categories"]] == ["a red cone"]
    predictor = pe_spatial.load(blobs, words=core)
    against = ("an object", "the background")
    expected = predictor.named(["a red cone"], background=against, proposals=False)(RGB)
    assert [one["score"] for one in table["annotations"]] == pytest.approx(expected.scores.tolist())
    capsys.readouterr()
    for options, message in [
        (("--keep", "a"), "--keep needs --words"),
        (("--words", core), "--words and --against are for --keep"),
        (("--keep", "a", "--words", core, "--tile"), "--keep does not go with --classes and --tile"),
        (("--keep", "a", "A", "--words", core), "--keep names A twice"),
        (("--keep", "a", "--words", "PE-Spatial-B16-512"), "has no text space"),
    ]:
        with pytest.raises(SystemExit, match=message):
            predict(*common, tmp_path / "two", *options)


@pytest.mark.slow
def test_masks_of_sam2_get_names(core, tmp_path):
    pytest.importorskip("sam2")
    from pe_spatial.integrations.sam2 import build_sam2
    from pe_spatial.predict.sam2_masks import MaskProposer

    torch.manual_seed(0)
    file = tmp_path / "sam.pt"
    torch.save(dict(model=build_sam2("tiny").state_dict()), file)
    loaded = pe_spatial.load(file, config="sam2:tiny", words=core)
    assert loaded.generator.point_grids[0].shape == (32 * 32, 2)
    proposer = MaskProposer(loaded.model, device="cpu", points=2)
    proposer.words = loaded.words
    proposer.generator.pred_iou_thresh = proposer.generator.stability_score_thresh = -np.inf  # the weights are random
    proposer.generator.box_nms_thresh = 1.0
    plain = proposer(RGB)
    assert len(plain) > 1
    assert set(plain.names) == {"object"}
    assert plain.masks.shape == (len(plain), 100, 120)
    assert (np.diff(plain.scores) <= 0).all()
    named = proposer(RGB, classes=["a red cone", "wood"])
    classifier = RegionClassifier(tiny_core(WORD_CORE), ["a red cone", "wood"])
    expected = plain.scores * classifier(RGB, plain.boxes, plain.masks).max(1)
    np.testing.assert_allclose(named.scores[0], expected.max(), rtol=1e-5)
    assert named.class_names == ("a red cone", "wood")
    with pytest.raises(ConfigError, match=r"the size of SAM 2.1 .*huge"):
        pe_spatial.load("sam2:huge")
    with pytest.raises(ConfigError, match="sam2:tiny finds objects without classes and has no tta"):
        pe_spatial.load(file, config="sam2:tiny", tta=True)
