"""tools/train.py and tools/test.py on a tiny detector and a tiny set, as a user runs them."""

import json
import os
import pickle
import re
import runpy
import shutil
import sys

import pytest
import torch

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import REPO, command, tool
from mmengine.config import Config
from torch.testing import assert_close

from pe_spatial import EncoderConfig, PerceptionEncoder
from pe_spatial.synthetic import write_dataset

pytestmark = [pytest.mark.mmdet, pytest.mark.slow]
ENCODER = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, class_token=False)  # as the detectors'
SMALLER = {1024: 128, 256: 16, 512: 16, 896: 96, 768: 64, 2000: 50, 1000: 20, 100: 10, 80: 2}


def shrink(node):
    """Make a config small: every width, side and count of it."""
    if isinstance(node, dict):
        return {key: shrink(value) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return type(node)(map(shrink, node))
    return SMALLER.get(node, node) if isinstance(node, int) and not isinstance(node, bool) else node


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a set, a config and the encoder's weights."""
    root = tmp_path_factory.mktemp("project")
    for split in ("train2017", "val2017"):
        write_coco(root / "data", split=split)
    torch.manual_seed(0)
    torch.save(PerceptionEncoder(EncoderConfig(**ENCODER)).state_dict(), root / "encoder.pt")
    full = Config.fromfile(REPO / "configs" / "pe_spatial_cascade_coco.py").to_dict()
    cfg = Config(shrink(full))
    cfg.model.backbone.update(
        variant=ENCODER,
        geometry="release",
        drop_path_rate=0.0,
        window_size=2,
        global_attn_indexes=(1,),
        pos_embed_mode="tile",
    )
    cfg.model.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(root / "encoder.pt"))
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.7
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.metainfo = dict(classes=("red", "blue"))
    cfg.train_cfg.update(max_iters=4, val_interval=4)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    cfg.dump(root / "tiny.py")
    cfg.model.backbone.variant = "pe_spatial_t16_512"
    cfg.dump(root / "named.py")
    return root


@pytest.fixture
def sentence(project, monkeypatch):
    """Return a function that runs a tool, in this process, and returns the one sentence that it ends with."""

    def run(name, *args):
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(REPO / "tools" / f"{name}.py"), run_name="__main__")
        # Python prints the text of SystemExit on stderr and exits with 1.
        assert end.value.code.startswith("error: ")
        assert "\n" not in end.value.code
        return end.value.code

    return run


@pytest.fixture(scope="module")
def trained(project):
    workers = ("--cfg-options", *(f"{split}_dataloader.num_workers=1" for split in ("train", "val")))
    workers += ("train_dataloader.persistent_workers=True", "val_dataloader.persistent_workers=True")
    options = ("--data-root", "data", "--work-dir", "run", *workers)
    return project, tool("train", "tiny.py", *options, cwd=project, silent=True)


def test_train_evaluates_and_saves(trained):
    project, log = trained
    assert (project / "run" / "iter_4.pth").is_file()
    assert "Iter(train) [4/4]" in log
    assert "eta: " in log
    assert "coco/bbox_mAP" in log or "results of the whole dataset is empty" in log


def test_weights_came_from_the_file_and_moved(trained):
    project, _ = trained
    state = torch.load(project / "run" / "iter_4.pth", weights_only=False)["state_dict"]
    start = torch.load(project / "encoder.pt")
    moved = {name: (state[f"backbone.encoder.{name}"] - value).abs().max().item() for name, value in start.items()}
    assert 0 < max(moved.values()) < 0.01


def test_detectron2_and_safetensors_files_evaluate_as_they_are(trained):
    """The same weights in three layouts give the same predictions."""
    project, _ = trained
    for path, layout in (("d2.pth", "detectron2"), ("ours.safetensors", "mmdet")):
        command("convert_checkpoint", "run/iter_4.pth", path, "--to", layout, cwd=project)
    results = []
    for path in ("run/iter_4.pth", "d2.pth", "ours.safetensors"):
        options = ("--data-root", "data", "--work-dir", "run/test", "--out", "out.pkl")
        command("test", "tiny.py", path, *options, cwd=project)
        predictions = pickle.loads((project / "out.pkl").read_bytes())
        results.append([torch.cat([p["pred_instances"]["bboxes"] for p in predictions])])
    assert len(results[0][0])
    for other in results[1:]:
        assert_close(other, results[0], rtol=0, atol=0)


def test_resume_continues_without_the_pretrained_file(trained, tmp_path, sentence):
    project, _ = trained
    options = ("--data-root", "data", "--cfg-options", "train_cfg.max_iters=5")
    options += ("model.backbone.init_cfg.checkpoint=gone",)
    log = command("train", "tiny.py", "--work-dir", tmp_path, "--resume", "run/iter_4.pth", *options, cwd=project)
    assert "Iter(train) [5/5]" in log
    assert "Iter(train) [4/5]" not in log
    assert "no checkpoint at gone" in sentence("train", "tiny.py", "--work-dir", tmp_path / "new", "--resume", *options)


def test_auto_scale_lr_and_amp(project, tmp_path):
    log = command(
        "train", "tiny.py", "--data-root", "data", "--work-dir", tmp_path, "--auto-scale-lr", "--amp", "--verbose",
        "--cfg-options", "train_cfg.max_iters=1", "train_cfg.val_interval=9", "optim_wrapper.type=OptimWrapper",
        cwd=project,
    )  # fmt: skip
    assert "Scaling the original LR by 0.03125" in log
    assert "type='BFloat16OptimWrapper'" in log


def test_test_writes_predictions_and_images(trained, tmp_path):
    project, _ = trained
    log = command(
        "test", "tiny.py", "run/iter_4.pth", "--data-root", "data", "--work-dir", tmp_path / "test",
        "--out", tmp_path / "out.pkl", "--show-dir", tmp_path / "shown",
        "--cfg-options", "model.test_cfg.rcnn.score_thr=0.0", "model.backbone.init_cfg.checkpoint=gone",
        cwd=project,
    )  # fmt: skip
    assert "coco/segm_mAP" in log
    predictions = pickle.loads((tmp_path / "out.pkl").read_bytes())
    assert [p["img_id"] for p in predictions] == [1, 2, 3, 4]
    assert len(predictions[0]["pred_instances"]["masks"]) == len(predictions[0]["pred_instances"]["scores"]) > 0
    assert len(list((tmp_path / "shown").glob("*"))) == 4


def test_config_of_a_run_evaluates_as_it_stands(trained, tmp_path):
    """It has the options of its training; its limited test writes COCO's results json."""
    project, _ = trained
    shutil.copy(project / "run" / "tiny.py", tmp_path)
    log = command(
        "test", tmp_path / "tiny.py", "run/iter_4.pth", "--limit", 2, "--out", tmp_path / "results.json",
        "--cfg-options", "model.test_cfg.rcnn.score_thr=0.0", cwd=project,
    )  # fmt: skip
    assert "evaluates the 2 of the 4 images" in log
    assert "indices" in (project / "run" / "test_tiny.py").read_text()
    assert "indices" not in (project / "run" / "tiny.py").read_text()
    results = json.loads((tmp_path / "results.json").read_text())
    assert {result["image_id"] for result in results} == {1, 2}
    assert {result["category_id"] for result in results} <= {1, 7}
    assert {"bbox", "score", "segmentation"} <= results[0].keys()


def test_inferencer_of_mmdetection(trained, log):
    project, _ = trained
    from mmdet.apis import DetInferencer

    weights, image = str(project / "run" / "iter_4.pth"), str(project / "data" / "val2017" / "1.png")
    inferencer = DetInferencer(str(project / "tiny.py"), weights, device="cpu", show_progress=False)
    assert inferencer.model.dataset_meta["classes"] == ("red", "blue")
    (predicted,) = inferencer(image, out_dir=str(project / "inferred"))["predictions"]
    assert set(predicted["labels"]) <= {0, 1}
    assert (project / "inferred" / "vis" / "1.png").is_file()
    assert not [line for line, level in log if level >= 30 and "pe_spatial" in line]


def test_test_with_augmentation_evaluates_boxes(trained, tmp_path):
    project, _ = trained
    log = command(
        "test", "tiny.py", "run/iter_4.pth", "--data-root", "data", "--work-dir", tmp_path, "--tta",
        "--cfg-options", "model.test_cfg.rcnn.score_thr=0.0", cwd=project,
    )  # fmt: skip
    assert "--tta: evaluates bbox only" in log
    assert "coco/bbox_mAP" in log
    assert "segm_mAP" not in log


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("absent.py",), "absent.py"),
        (("tiny.py", "--data-root", "data", "--cfg-options", "model.backbone.type=Nothing"), "Nothing is not in the"),
        (("tiny.py", "--cfg-options", "model.backbone.variant=pe_x"), "=pe_x: the config has a group of options"),
        (
            ("named.py", "--data-root", "data", "--cfg-options", "model.backbone.variant=pe_x"),
            "unknown variant 'pe_x'; allowed are",
        ),
        (
            ("tiny.py", "--data-root", "data", "--cfg-options", "model.roi_head.bbox_head.1.num_classes=5"),
            "the train set has 2 classes .red, blue., but model.roi_head.bbox_head.1.num_classes is 5; set "
            "--cfg-options model.roi_head.bbox_head.num_classes=2",
        ),
        (
            ("tiny.py", "--data-root", "data", "--cfg-options", "val_dataloader.dataset.ann_file=annotations/x.json"),
            "no annotation file at .*x.json; data/annotations contains instances_train2017.json, ",
        ),
        (("tiny.py", "--data-root", "nowhere"), "no annotation file at nowhere/annotations/instances_train2017.json"),
        (("tiny.py", "--resume", "absent.pth"), "no checkpoint at absent.pth"),
        (
            ("tiny.py", "--data-root", "data", "--cfg-options", "model.backbone.init_cfg.checkpoint=gone.pt"),
            "no checkpoint at gone.pt; download it.* --cfg-options model.backbone.init_cfg.checkpoint=FILE; "
            "or train from random weights on purpose with --cfg-options model.backbone.init_cfg=None",
        ),
    ],
)
def test_errors_are_one_sentence(sentence, tmp_path, args, message):
    config, *rest = args
    assert re.search(message, sentence("train", config, "--work-dir", tmp_path, *rest))


def test_checkpoint_of_another_model_or_with_code_is_refused(trained, tmp_path, sentence):
    project, _ = trained
    options = ("--data-root", "data", "--work-dir", tmp_path)
    assert "does not match the model of this config" in sentence("test", "tiny.py", "encoder.pt", *options)
    assert "holds no state of a run" in sentence("train", "tiny.py", "--resume", "encoder.pt", *options)

    class Code:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(dict(state_dict={}, meta=Code()), tmp_path / "code.pth")
    assert "could run code" in sentence("test", "tiny.py", tmp_path / "code.pth", *options)
    assert not (tmp_path / "ran").exists()

    checkpoint = torch.load(project / "run" / "iter_4.pth", weights_only=False)
    checkpoint["state_dict"].pop("backbone.encoder.pos_embed")
    torch.save(checkpoint, tmp_path / "other.pth")
    refused = sentence("test", "tiny.py", tmp_path / "other.pth", *options)
    assert "does not match the model of this config" in refused
    assert "pos_embed" in refused


def test_broken_image_in_a_worker_of_the_test_is_one_sentence(trained, tmp_path, sentence):
    project, _ = trained
    shutil.copytree(project / "data", tmp_path / "data")
    (tmp_path / "data" / "val2017" / "3.png").write_bytes(b"no image")
    refused = sentence(
        "test", "tiny.py", "run/iter_4.pth", "--data-root", tmp_path / "data", "--work-dir", tmp_path,
        "--cfg-options", "test_dataloader.num_workers=1",
    )  # fmt: skip
    assert refused.startswith(f"error: {tmp_path}/data/val2017/3.png ")
    assert "is not a readable image" in refused


@pytest.mark.parametrize(
    ("config", "tracker"),
    [("projects/nyu_depth/synthetic_lin1.py", False), ("projects/video_tracking/synthetic.py", True)],
    ids=["depth", "tracking"],
)
def test_depth_and_tracking_end_with_an_empty_stderr(config, tracker, tmp_path):
    size = (96, 96) if tracker else (48, 48)
    write_dataset(tmp_path / "data", scenes={"train": 2, "val": 1}, frames_per_scene=4, size=size, duration=1.0)
    options = ["train_cfg.max_iters=2", "train_cfg.val_interval=2"]
    for split in ("train", "val"):
        options += [f"{split}_dataloader.num_workers=1", f"{split}_dataloader.persistent_workers=True"]
    if tracker:
        options += ["model.tracker.grid=12", "train_dataloader.dataset.pipeline.2.size=192"]
    shown = tool("train", REPO / config, "--data-root", "data", "--cfg-options", *options, cwd=tmp_path, silent=True)
    assert "vos/J&F" in shown if tracker else "rmse" in shown
