"""Predictors: equal to `pe-spatial test` and to the released detectors, on images of any form; errors are sentences."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.configs import load as load_config
from helpers.golden import checkpoint_file
from helpers.reference_deta import ReferenceDETA
from helpers.reference_maskrcnn import ReferenceMaskRCNN, match
from helpers.repository import CONFIGS, command
from mmdet.apis import inference_detector, init_detector
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import pe_spatial
from pe_spatial.convert.converter import write_checkpoint
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
CLASSES = ("red", "blue")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The demo's detector with random heads, as training writes it, and images of two sizes."""
    root = tmp_path_factory.mktemp("project")
    write_coco(root, images=3, size=(96, 128), split="val2017")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (150, 60, 3), np.uint8)).save(root / "val2017" / "2.png")
    text = (root / "annotations" / "instances_val2017.json").read_text()
    text = text.replace(
        '"file_name": "2.png", "height": 96, "width": 128', '"file_name": "2.png", "height": 150, "width": 60'
    )
    (root / "annotations" / "instances_val2017.json").write_text(text)
    cfg = load_config(CONFIGS / "pe_demo_cascade_synthetic.py")
    for head in cfg.model.roi_head.bbox_head:
        head.num_classes = 2
    cfg.model.roi_head.mask_head.num_classes = 2
    cfg.test_dataloader.dataset.update(
        data_root=str(root), ann_file="annotations/instances_val2017.json", data_prefix=dict(img="val2017"),
        metainfo=dict(classes=CLASSES),
    )  # fmt: skip
    cfg.test_evaluator.ann_file = str(root / "annotations" / "instances_val2017.json")
    cfg.test_dataloader.batch_size = 1
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=CLASSES))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), root / "w.pth")
    cfg.dump(root / "c.py")
    return root


@pytest.fixture(scope="module")
def predictor(project):
    return pe_spatial.load(project / "w.pth")


@pytest.fixture(scope="module")
def files(project):
    return sorted((project / "val2017").iterdir())


def test_detections_are_those_of_the_test_to_the_last_bit(project, predictor, files):
    command("test", "c.py", "w.pth", "--out", "all.pkl", cwd=project)
    expected = pickle.loads((project / "all.pkl").read_bytes())
    assert predictor.task == "detection"
    for result, sample in zip(predictor(files), expected, strict=True):
        theirs = sample["pred_instances"]
        assert len(result) == len(theirs["scores"]) > 5
        assert result.image_size == sample["ori_shape"]
        assert torch.equal(torch.from_numpy(result.boxes), theirs["bboxes"])
        assert torch.equal(torch.from_numpy(result.scores), theirs["scores"])
        assert torch.equal(torch.from_numpy(result.labels), theirs["labels"])
        assert [one["segmentation"]["counts"].encode() for one in result.to_coco()] == [
            one["counts"] for one in theirs["masks"]
        ]


def test_a_batch_changes_nothing(predictor, files):
    for one, other in zip(predictor(files), predictor(files, batch_size=3), strict=True):
        assert_close(one.boxes, other.boxes, rtol=0, atol=1e-4)
        assert_close(one.scores, other.scores, rtol=0, atol=1e-5)
        assert (one.labels == other.labels).all()


def test_only_images_of_one_size_share_a_batch(predictor, files, monkeypatch):
    """Padding to a common size would change the smaller one."""
    monkeypatch.setattr(predictor.model.data_preprocessor, "pad_size_divisor", 8)
    sizes, step = [], predictor.model.test_step
    monkeypatch.setattr(predictor.model, "test_step", lambda data: sizes.append(len(data["inputs"])) or step(data))
    batched = predictor([*files, files[2]], batch_size=3)
    assert sizes == [1, 1, 2]
    assert (batched[1].boxes == predictor(files[1]).boxes).all()


def test_images_of_every_form_are_one_image(predictor, files):
    expected = predictor(files[0])
    pixels = np.array(Image.open(files[0]))
    forms = [str(files[0]), Image.open(files[0]), pixels, torch.from_numpy(pixels).permute(2, 0, 1)]
    for result in [*predictor(forms), predictor(pixels), *predictor(pixels[None])]:
        assert (result.boxes == expected.boxes).all()
        assert result.names == expected.names
    turned = Image.open(files[0]).convert("P", palette=Image.Palette.ADAPTIVE)
    assert predictor(turned).image_size == expected.image_size
    assert predictor([]) == []


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ("https://a.org/b.jpg", "https://a.org/b.jpg is an address; download the image"),
        ("absent.png", "cannot open absent.png"),
        (np.zeros((4, 5), np.uint8), r"image 0 is an array \(4, 5\) of uint8; give \(H, W, 3\) uint8"),
        (np.zeros((4, 5, 3)), r"an array \(4, 5, 3\) of float64; give"),
        (torch.zeros(4, 5, 3), r"a tensor \(4, 5, 3\) of torch.float32; give \(3, H, W\) uint8"),
        (np.zeros((0, 5, 3), np.uint8), r"an array \(0, 5, 3\)"),
        (7, "image 0 is a int; give a path"),
        (Image.new("F", (4, 5)), "image 0 cannot be used: floating-point pixels"),
        (np.zeros((1, 20000, 3), np.uint8), "an image of 20000x1 pixels .* crop or pad"),
    ],
)  # fmt: skip
def test_what_is_no_image_is_named(predictor, image, message):
    with pytest.raises(DatasetError, match=message):
        predictor(image)


def test_unusual_sizes_and_broken_files(predictor, tmp_path):
    assert predictor(np.zeros((1, 1, 3), np.uint8)).image_size == (1, 1)
    (tmp_path / "empty.jpg").touch()
    with pytest.raises(DatasetError, match=r"empty.jpg is not a readable image \(0 bytes\)"):
        predictor(tmp_path / "empty.jpg")


def test_lowest_score_and_class_names(project, predictor, files):
    expected = predictor(files[0])
    score = float(np.median(expected.scores))
    filtered = pe_spatial.load(project / "w.pth", score=score, class_names=("x", "y"))(files[0])
    assert (filtered.scores == expected.filter(score=score).scores).all()
    assert set(filtered.names) <= {"x", "y"}


def test_precision_and_compilation_are_options(project, predictor, files, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    other = pe_spatial.load(project / "w.pth", dtype=torch.bfloat16, compile=True)
    assert compiled == ["PerceptionEncoderPyramid"]
    exact, rough = predictor(files[0]), other(files[0])
    assert rough.boxes.dtype == np.float32
    assert rough.scores.max() == pytest.approx(exact.scores.max(), abs=0.02)
    assert (rough.scores[:5] != exact.scores[:5]).any()


@pytest.mark.parametrize("name", ["maskrcnn", "cascade"])
def test_released_layout_gives_the_golden_boxes(golden, name):
    fixture = ReferenceMaskRCNN(golden / "maskrcnn", name)
    predictor = pe_spatial.load(checkpoint_file(golden / "maskrcnn" / f"{name}.pth"), config=fixture.cfg,
                                class_names=[str(i) for i in range(80)])  # fmt: skip
    for image, result in enumerate(predictor([golden / "maskrcnn" / file for file in fixture.facts["files"]])):
        boxes, scores, labels = (fixture.value(f"det_{image}_{part}") for part in ("boxes", "scores", "classes"))
        ours = [torch.from_numpy(values) for values in (result.boxes, result.labels, result.scores)]
        index = match(*ours, boxes, labels, scores, px=0.01)
        assert_close(ours[2][index], scores, rtol=0, atol=1e-4)
        assert len(result.crops) == len(boxes)


def test_released_deta_gives_the_golden_boxes_after_its_conversion(golden, tmp_path):
    fixture = ReferenceDETA(golden / "deta")
    write_checkpoint(tmp_path / "deta.pth", fixture.weights)
    cfg = load_config(CONFIGS / "pe_spatial_deta_g14.py")
    cfg.model = fixture.cfg
    cfg.model.test_cfg = dict(method="nms")
    for step in cfg.test_dataloader.dataset.pipeline:
        if "short_sides" in step:
            step.update(short_sides=[224], max_long_side=224)
    predictor = pe_spatial.load(tmp_path / "deta.pth", config=cfg, class_names=[str(i) for i in range(91)])
    for image, result in enumerate(predictor([golden / "deta" / file for file in fixture.facts["files"]])):
        boxes, scores, labels = (
            torch.from_numpy(fixture.detections[f"model/nms/{image}_{key}"]) for key in ("boxes", "scores", "labels")
        )
        ours = [torch.from_numpy(values) for values in (result.boxes, result.labels, result.scores)]
        match(*ours, boxes, labels, scores, px=0.01)


def test_init_detector_of_mmdetection(project, predictor, files):
    model = init_detector(str(project / "c.py"), str(project / "w.pth"), device="cpu")
    assert model.dataset_meta["classes"] == CLASSES
    found = inference_detector(model, str(files[0])).pred_instances
    result = predictor(files[0])
    assert torch.equal(found.bboxes, torch.from_numpy(result.boxes))
    assert [model.dataset_meta["classes"][label] for label in found.labels] == result.names


def test_augmentation_is_that_of_the_test(project, files):
    cfg = Config.fromfile(project / "c.py")
    cfg.tta_model = dict(type="BoxTTA", tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=30))
    views = [[dict(type="Resize", scale=(side, side), keep_ratio=True) for side in (192, 160)]]
    views += [[dict(type="RandomFlip", prob=0.0), dict(type="RandomFlip", prob=1.0)], [dict(type="PackDetInputs")]]
    keys = ("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction")
    views[-1][0]["meta_keys"] = keys
    load = dict(type="pe_spatial.LoadImageFromFile")
    cfg.tta_pipeline = [load, dict(type="TestTimeAug", transforms=views)]
    cfg.tta_evaluator = dict(cfg.test_evaluator, metric="bbox")
    cfg.dump(project / "tta.py")
    command("test", "tta.py", "w.pth", "--tta", "--out", "tta.pkl", cwd=project)
    expected = pickle.loads((project / "tta.pkl").read_bytes())
    predictor = pe_spatial.load(project / "w.pth", config=cfg, tta=True)
    for result, sample in zip(predictor(files), expected, strict=True):
        assert torch.equal(torch.from_numpy(result.boxes), sample["pred_instances"]["bboxes"])
        assert result.crops is None
    assert predictor.choose_tiles() == (192, 48)


def test_any_detector_of_mmdetection(tmp_path, files):
    name = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"
    cfg = read_config(name)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        torch.save(MODELS.build(cfg.model).state_dict(), tmp_path / "w.pth")
    predictor = pe_spatial.load(tmp_path / "w.pth", config=name)
    cfg.model.backbone.init_cfg = None
    model = init_detector(cfg, str(tmp_path / "w.pth"), device="cpu", palette="coco")
    found, result = inference_detector(model, str(files[0])).pred_instances, predictor(files[0])
    assert (len(result), len(predictor.class_names), result.crops) == (len(found), 80, None)
    assert torch.equal(found.bboxes, torch.from_numpy(result.boxes))


def test_masks_of_a_huge_image_need_tiles(predictor, monkeypatch):
    monkeypatch.setattr("pe_spatial.predict.predictor.MAX_MASK_PIXELS", 200 * 300)
    with pytest.raises(DatasetError, match=r"an image of 300x201 pixels is too large .* detect in tiles \(--tile"):
        predictor(np.zeros((201, 300, 3), np.uint8))
    assert predictor.tiled(np.zeros((201, 300, 3), np.uint8)).image_size == (201, 300)


def test_without_openmmlab_it_says_what_to_install(project, monkeypatch):
    monkeypatch.setattr("pe_spatial.loading.find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"a predictor needs mmengine: pip install 'pe_spatial\[openmmlab\]'"):
        pe_spatial.load(project / "w.pth")


def test_other_sources(project, files, predictor):
    cfg = Config.fromfile(project / "c.py")
    cfg.load_from = str(project / "w.pth")
    cfg.dump(project / "with_weights.py")
    result = pe_spatial.load(project / "with_weights.py")(files[0])
    assert (result.boxes == predictor(files[0]).boxes).all()
    with pytest.raises(ConfigError, match=r"c.py has no weights \(load_from\)"):
        pe_spatial.load(project / "c.py")
    with pytest.raises(ConfigError, match=r"c\.py is a config already"):
        pe_spatial.load(project / "c.py", config=cfg)
    state = torch.load(project / "w.pth", weights_only=False)["state_dict"]
    torch.save(state, project / "bare.pth")
    with pytest.raises(CheckpointError, match=r"bare\.pth holds no config; name it with --config"):
        pe_spatial.load(project / "bare.pth")
    assert pe_spatial.load(project / "bare.pth", config=cfg).class_names == CLASSES
    with pytest.raises(CheckpointError, match="does not match the model of this config"):
        pe_spatial.load(project / "w.pth", config=CONFIGS / "pe_demo_cascade_synthetic.py")


def test_names_of_the_checkpoint_come_before_those_of_the_config(project):
    state = torch.load(project / "w.pth", weights_only=False)["state_dict"]
    torch.save(dict(state_dict=state, meta=dict(dataset_meta=dict(CLASSES=("x", "y")))), project / "named.pth")
    assert pe_spatial.load(project / "named.pth", config=project / "c.py").class_names == ("x", "y")


def test_missing_labels_and_augmentation_are_named(project):
    cfg = Config.fromfile(project / "c.py")
    cfg.test_dataloader.dataset.type, cfg.test_dataloader.dataset.metainfo = "mmdet.BaseDetDataset", None
    state = torch.load(project / "w.pth", weights_only=False)["state_dict"]
    torch.save(state, project / "bare.pth")
    with pytest.raises(ConfigError, match=r"neither .*bare\.pth nor its config names the classes"):
        pe_spatial.load(project / "bare.pth", config=cfg)
    with pytest.raises(ConfigError, match="no tta_model and no tta_pipeline"):
        pe_spatial.load(project / "w.pth", tta=True)
