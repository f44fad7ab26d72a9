"""Own data in the configs of MMDetection's families and in ours: every count, file and evaluator follows."""

import json
import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import CONFIGS
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner

import pe_spatial.detection  # noqa: F401  (registers)
from pe_spatial.data.dataset import OwnDataset, Split
from pe_spatial.detection.own_data import apply_dataset
from pe_spatial.engine import image_size, recipe
from pe_spatial.engine.checks import check_classes
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.nodes import leaves, pipelines, steps
from pe_spatial.engine.schedule import set_length
from pe_spatial.engine.written import write_config
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet
CLASSES = ("date", "fig", "nut")
SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2)
FAMILIES = {  # those of the fast sample of the swap, two of this project, and what has its own way to name classes
    "mmdet::atss/atss_r50_fpn_1x_coco.py": ["bbox_head"],
    "mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py": ["bbox_head"],
    "mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py": ["roi_head"],
    "mmdet::detr/detr_r50_8xb2-150e_coco.py": ["bbox_head"],
    "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": ["roi_head"],
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": ["panoptic_head"],
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco-panoptic.py": ["panoptic_head"],
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": ["roi_head"],
    "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py": ["roi_head"],
    "mmdet::ssd/ssd300_coco.py": ["bbox_head"],
    "mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py": ["bbox_head"],
    "mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py": ["bbox_head"],
    "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py": ["bbox_head"],
    "mmdet::solo/solo_r50_fpn_1x_coco.py": ["mask_head"],
    "mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py": ["bbox_head"],
    "mmdet::htc/htc_r50_fpn_1x_coco.py": ["roi_head"],
    "mmdet::pascal_voc/faster-rcnn_r50_fpn_1x_voc0712.py": ["roi_head"],
    "mmdet::lvis/mask-rcnn_r50_fpn_sample1e-3_ms-1x_lvis-v1.py": ["roi_head"],
    str(CONFIGS / "pe_spatial_cascade_coco.py"): ["roi_head"],
    str(CONFIGS / "pe_core_maskrcnn_lvis_g14.py"): ["roi_head"],
}


def own(root, *, masks=True):
    """Return a dataset of three classes, and its files."""
    path = write_coco(root)
    content = json.loads(path.read_text())
    content["categories"] = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
    for annotation in content["annotations"]:
        annotation["category_id"] = 1 + annotation["id"] % 3
        if not masks:
            del annotation["segmentation"]
    path.write_text(json.dumps(content))
    split = Split(content=content, root=root / "train2017", source=str(path))
    dataset = OwnDataset("COCO", CLASSES, split, split, None, masks, ())
    return dataset, {"train": path, "val": path}


def built_shapes(model):
    with DefaultScope.overwrite_default_scope("mmdet"), torch.device("meta"):
        built = MODELS.build(Config(dict(model=model)).model)
    return {name: tuple(p.shape) for name, p in built.named_parameters()}


def without_weights(node):
    """Remove what would be downloaded, or is large: outputs do not depend on it."""
    if isinstance(node, dict):
        return {k: without_weights(v) for k, v in node.items() if k not in ("pretrained", "init_cfg")}
    return type(node)(map(without_weights, node)) if isinstance(node, list | tuple) else node


@pytest.mark.parametrize("name", FAMILIES, ids=lambda name: Path(name).stem[:34])
def test_every_count_and_file_follows(name, tmp_path):
    """The outputs of the model change by their number of classes and by nothing else, in each head."""
    dataset, files = own(tmp_path)
    cfg = read_config(name)
    before = built_shapes(without_weights(cfg.model.to_dict()))
    number = max(counts(cfg.model.to_dict()))
    apply_dataset(cfg, dataset, files)
    after = built_shapes(without_weights(cfg.model.to_dict()))
    changed = {key for key in before if key in after and before[key] != after[key]}
    heads = {part for part in FAMILIES[name] if any(f"{part}." in key for key in changed)}
    assert heads == set(FAMILIES[name])
    for key in changed:
        for old, new in zip(before[key], after[key], strict=True):
            assert (old - new) % (number - 3) == 0, key
    for split in ("train", "val", "test"):
        found = list(leaves(cfg[f"{split}_dataloader"].dataset))
        assert {leaf.type for leaf in found} == {"CheckedCocoDataset"}
        assert {leaf.ann_file for leaf in found} == {str(files["train"])}
        assert {tuple(leaf.metainfo.classes) for leaf in found} == {CLASSES}
        if split != "train":
            assert cfg[f"{split}_evaluator"].type == "CheckedCocoMetric"
            assert cfg[f"{split}_evaluator"].ann_file == str(files["val"])
    check_classes(cfg.model, {split: dict(classes=CLASSES) for split in ("train", "val", "test")})
    set_length(cfg, epochs=2, steps=2)
    path = tmp_path / "run" / "own.py"
    write_config(path, cfg, base=name)
    assert "_base_ = " in path.read_text()
    again = Config.fromfile(path)
    assert as_lists(again.to_dict()) == as_lists(cfg.to_dict())


def counts(node):
    """Yield every number of classes in a config, except those of stuff beside boxes."""
    if isinstance(node, dict):
        yield node.get("num_classes") or node.get("num_things_classes", 0) + node.get("num_stuff_classes", 0)
        node = [child for key, child in node.items() if key != "semantic_head"]
    for child in node if isinstance(node, list | tuple) else ():
        yield from counts(child)


def as_lists(node):
    if isinstance(node, dict):
        return {key: as_lists(value) for key, value in node.items() if key != "_scope_"}
    return [as_lists(x) for x in node] if isinstance(node, list | tuple) else node


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py", "StandardRoIHead"),
        ("mmdet::ms_rcnn/ms-rcnn_r50-caffe_fpn_1x_coco.py", "StandardRoIHead"),
        ("mmdet::htc/htc_r50_fpn_1x_coco.py", "CascadeRoIHead"),
        (str(CONFIGS / "pe_spatial_cascade_coco.py"), "Detectron2CascadeRoIHead"),
    ],
)
def test_masks_are_dropped_where_the_data_has_none(name, left, tmp_path):
    dataset, files = own(tmp_path, masks=False)
    cfg = read_config(name)
    notes = apply_dataset(cfg, dataset, files)
    assert any("mask heads" in note for note in notes)
    assert cfg.model.roi_head.type == left
    assert not [key for key in built_shapes(without_weights(cfg.model.to_dict())) if "mask" in key]
    assert not any(step.get("with_mask") for pipeline in pipelines(cfg) for step in steps(pipeline))
    assert cfg.val_evaluator.metric == "bbox"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("mmdet::solo/solo_r50_fpn_1x_coco.py", "SOLO learns masks"),
        ("mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py", "Mask2Former learns masks"),
        ("mmdet::fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py", "reads its proposals from a file; train a faster_rcnn"),
        ("mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py", "a map of all pixels"),
        ("mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py", "trains a tracker"),
    ],
)
def test_models_that_cannot_learn_from_it_are_refused(name, sentence, tmp_path):
    dataset, files = own(tmp_path, masks=False)
    with pytest.raises(ConfigError, match=sentence):
        apply_dataset(read_config(name), dataset, files)


ATSS, YOLOX = "mmdet::atss/atss_r50_fpn_1x_coco.py", "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py"
CASCADE = str(CONFIGS / "pe_spatial_cascade_coco.py")


@pytest.mark.parametrize(
    ("name", "length", "loop", "ends"),
    [
        (ATSS, dict(epochs=24), dict(max_epochs=24), [(0, 12), (0, 24, [16, 22])]),
        (ATSS, dict(iterations=60), dict(max_iters=60), [(0, 6), (0, 60, [40, 55])]),
        (ATSS, dict(iterations=12), dict(max_iters=12), [(0, 12, [8, 11])]),  # of one step it would never end
        (CASCADE, dict(epochs=100), dict(max_iters=500), [(0, 50), (0, 500, [444, 481])]),
        (CASCADE, dict(iterations=2000), dict(max_iters=2000), [(0, 90), (0, 2000, [1778, 1926])]),
        (YOLOX, dict(epochs=60), dict(max_epochs=60), [(0, 5), (5, 57), (57, 60)]),
        (YOLOX, dict(iterations=300), dict(max_epochs=60), [(0, 5), (5, 57), (57, 60)]),
    ],
)
def test_warm_up_and_decay_follow_the_length(name, length, loop, ends):
    cfg = read_config(name)
    set_length(cfg, steps=5, **length)
    assert cfg.train_cfg | loop == cfg.train_cfg
    places = [(s.get("begin", 0), s.end, s.get("milestones")) for s in cfg.param_scheduler]
    got = [place[: 2 + (place[2] is not None)] for place in places]
    assert got == ends
    in_iterations = "max_iters" in loop
    assert cfg.default_hooks.checkpoint.by_epoch is not in_iterations
    assert 1 <= cfg.train_cfg.val_interval <= max(5, *(length / 5 for length in loop.values()))
    if name == YOLOX:
        assert next(h for h in cfg.custom_hooks if h.type == "YOLOXModeSwitchHook").num_last_epochs == 3


def test_image_sizes_are_complete_windows():
    cfg = read_config(CASCADE)
    assert "px, complete windows" in image_size.set_image_size(cfg, 700)
    window = 512 if cfg.model.data_preprocessor.pad_size_divisor == 512 else 0
    assert window
    sizes = [step[key] for p in pipelines(cfg) for step in steps(p) for key in ("scale", "crop_size") if key in step]
    assert set(map(tuple, sizes)) >= {(512, 512)}
    assert all(max(size) <= 512 for size in sizes)
    cfg = read_config(ATSS)
    assert image_size.set_image_size(cfg, 640) == "images have 640 px at their longer side"
    assert {tuple(s.scale) for p in pipelines(cfg) for s in steps(p) if "scale" in s} == {(640, math.floor(384.1))}


def test_images_of_a_training_without_resizing_would_keep_their_sizes():
    cfg = read_config("pe_spatial::pe_demo_cascade_synthetic.py")
    image_size.set_image_size(cfg, 256)
    train, val = (cfg[f"{name}_dataloader"].dataset.pipeline for name in ("train", "val"))
    assert [step.scale for pipeline in (train, val) for step in pipeline if "scale" in step] == [(256, 256)] * 2
    train[:] = [step for step in train if step.type != "Resize"]
    with pytest.raises(ConfigError, match=r"the training pipeline of .* has no size to replace"):
        image_size.set_image_size(cfg, 256)


def test_options_become_hooks_and_wrappers():
    cfg = read_config(ATSS)
    recipe.keep_best(cfg)
    recipe.stop_early(cfg, 4)
    recipe.average_weights(cfg, 400)
    recipe.average_weights(cfg, 400)
    recipe.balance(cfg, 0.3)
    recipe.freeze(cfg, 2)
    assert cfg.default_hooks.checkpoint.save_best == "coco/bbox_mAP"
    assert [hook.type for hook in cfg.custom_hooks] == ["EarlyStoppingHook", "EMAHook"]
    assert cfg.train_dataloader.dataset.type == "ClassBalancedDataset"
    assert cfg.train_dataloader.dataset.dataset.type == "CocoDataset"
    assert cfg.model.backbone.frozen_stages == 2
    teacher = read_config("mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py")
    assert recipe.main_metric(teacher) == "teacher/coco/bbox_mAP"
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        recipe.balance(cfg, 3)
    with pytest.raises(ConfigError, match="--patience needs at least one validation"):
        recipe.stop_early(cfg, 0)
    with pytest.raises(ConfigError, match="pip install clearml"):
        recipe.log_to(cfg, ["clearml"])


def test_logs_go_to_tensorboard_where_it_is_installed(monkeypatch):
    installed = {"tensorboard", "wandb"}
    cfg, other = read_config(ATSS), read_config(ATSS)
    monkeypatch.setattr(recipe.importlib.util, "find_spec", lambda name: name in installed or None)
    for _ in range(2):
        recipe.log_to(cfg, ["wandb"])
        kinds = [backend["type"] for backend in cfg.visualizer.vis_backends]
        assert kinds == ["LocalVisBackend", "WandbVisBackend", "TensorboardVisBackend"]
    installed.clear()
    recipe.log_to(other, [])
    assert [backend["type"] for backend in other.visualizer.vis_backends] == ["LocalVisBackend"]
    with pytest.raises(ConfigError, match="needs the package wandb, which is not installed: pip install wandb"):
        recipe.log_to(other, ["wandb"])


def test_rectangular_batches_have_one_orientation_and_complete_windows(tmp_path):
    """Landscape images of 96x128 and portraits of 128x64: none is padded to a square."""
    path = write_coco(tmp_path, images=5)
    content = json.loads(path.read_text())
    portraits = json.loads(write_coco(tmp_path, images=5, size=(128, 64), split="portraits").read_text())
    for kind in ("images", "annotations"):
        for one in portraits[kind]:
            one["id"] += 100
            one["image_id"] = one.get("image_id", 0) + 100
            one["file_name"] = f"../portraits/{one.get('file_name')}"
        content[kind] += portraits[kind]
    path.write_text(json.dumps(content))
    cfg = read_config(CASCADE)
    dataset = OwnDataset("COCO", ("red", "blue"), *[Split(content, tmp_path / "train2017", "")] * 2, None, True, ())
    apply_dataset(cfg, dataset, {"train": path, "val": path})
    cfg.model.backbone.update(variant=dict(SMALL), init_cfg=None)
    cfg.model.data_preprocessor.pad_size_divisor = 64
    image_size.batch_rectangles(cfg)
    cfg.val_dataloader.update(batch_size=2, num_workers=0, persistent_workers=False)
    cfg.val_dataloader.dataset.pipeline[1].scale = (128, 128)
    with DefaultScope.overwrite_default_scope("mmdet"):
        prepare = MODELS.build(cfg.model.data_preprocessor)
        shapes = [tuple(prepare(one)["inputs"].shape) for one in Runner.build_dataloader(cfg.val_dataloader, seed=0)]
    assert sorted(shapes[:4]) == [(2, 3, 128, 64)] * 2 + [(2, 3, 128, 128)] * 2
    assert len(shapes) == 5


@pytest.mark.parametrize(
    ("name", "sentence"), [(YOLOX, "Mosaic mixes images"), ("mmdet::ssd/ssd300_coco.py", "images of one size")]
)
def test_models_of_squares_refuse_rectangles(name, sentence):
    with pytest.raises(ConfigError, match=sentence):
        image_size.batch_rectangles(read_config(name))
