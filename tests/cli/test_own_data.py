"""train CONFIG --data DATA, as a user runs it: a table and images of results, and a config that does the same again."""

import json
import re

import pytest

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import CONFIGS, command
from PIL import Image

pytestmark = [pytest.mark.mmdet, pytest.mark.slow]
SMALL = ("--image-size", "128", "--batch", "2", "--iterations", "2", "--seed", "3")
PROBE = str(CONFIGS / "pe_spatial_linear_ade20k.py")
LOADERS = ("train_dataloader.num_workers=0", "val_dataloader.num_workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A COCO folder with two classes, for training and validation."""
    root = tmp_path_factory.mktemp("own") / "shapes"
    for split in ("train2017", "val2017"):
        write_coco(root, split=split)
    return root


def losses(printed):
    return re.findall(r" loss: ([\d.]+)", printed)


@pytest.mark.parametrize(
    "config",
    [
        "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py",
        "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py",
    ],
)
def test_one_line_trains_reports_and_can_be_repeated(config, data, tmp_path):
    options = ("--cfg-options", "model.backbone.init_cfg=None", *LOADERS)
    printed = command("train", config, "--data", data, *SMALL, *options, cwd=tmp_path)
    assert "COCO: images 4 train, 4 val" in printed
    table = printed[printed.index("Result on the validation set") :]
    assert re.search(r"all classes +[\d.]+ .* 8\n", table)
    assert re.search(r"blue .* 4\n", table)
    (folder,) = (tmp_path / "work_dirs").iterdir()
    assert Image.open(folder / "predictions.png").width > 1000
    results = json.loads((folder / "results.json").read_text())
    assert {one["image_id"] for one in results} <= {1, 2, 3, 4}
    written = folder / f"{folder.name}.py"
    assert written.read_text().count("\n") < 120
    assert losses(printed)
    assert losses(command("train", written, "--work-dir", "again", cwd=tmp_path)) == losses(printed)
    printed = command("test", written, (folder / "last_checkpoint").read_text(), cwd=tmp_path)
    assert "bbox_mAP" in printed or "results of the whole dataset is empty" in printed  # after two steps


def test_browse_draws_own_data_after_the_augmentation_of_a_config(data, tmp_path):
    printed = command("browse", "mmdet::atss/atss_r50_fpn_1x_coco.py", "--data", data, "--count", "2", cwd=tmp_path)
    assert "atss_r50_fpn_1x_coco.py: 4 images, 8 objects in the train set" in printed
    assert Image.open(tmp_path / "sheet.png").width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png"]


def test_the_layers_of_a_probe_are_swept_on_masks(data, tmp_path):
    variant = "model.backbone.variant=pe_synthetic_xs8_192"
    options = ("--layers", "0,1", "--limit", "2", "--cfg-options", variant, "train_dataloader.num_workers=0")
    printed = command("sweep_layers", PROBE, "--data", data, "--epochs", "1", *options, cwd=tmp_path)
    assert "masks become label maps of 3 classes" in printed
    assert re.search(r"best by mIoU: layer \d; .*work_dirs/pe_spatial_linear_ade20k_shapes_layers/scores.png", printed)
