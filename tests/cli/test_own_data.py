"""train CONFIG --data DATA, as a user runs it: a table and images of results, and a config that does the same again."""

import json
import re

import pytest

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.repository import CONFIGS, command
from PIL import Image

pytestmark = [pytest.mark.mmdet, pytest.mark.slow]
ENCODER = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2)
SIZE = ("--image-size", "128")
SHORT = ("--batch", "2", "--iterations", "2", "--seed", "3")
PROBE, DEMO = str(CONFIGS / "pe_spatial_linear_ade20k.py"), str(CONFIGS / "pe_demo_cascade_synthetic.py")
SMALL = (f"model.backbone.variant={ENCODER!r}", "model.backbone.init_cfg=None")
LOADERS = ("--cfg-options", "train_dataloader.num_workers=0", "val_dataloader.num_workers=0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A COCO folder with two classes, for training and validation."""
    root = tmp_path_factory.mktemp("own") / "shapes"
    for split in ("train2017", "val2017"):
        write_coco(root, split=split)
    return root


@pytest.fixture(scope="module")
def nuts(shared, tmp_path_factory):
    """Nuts at a quarter of the size: evaluation in the size of the images then takes no time."""
    root = tmp_path_factory.mktemp("own") / "nuts"
    for path in (shared / "data/detection/nuts").rglob("*"):
        copy = root / path.relative_to(shared / "data/detection/nuts")
        copy.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".json":
            content = json.loads(path.read_text())
            for image in content["images"]:
                image.update(width=image["width"] // 4, height=image["height"] // 4)
            for one in content["annotations"]:
                one["bbox"] = [value / 4 for value in one["bbox"]]
                one["segmentation"] = [[value / 4 for value in polygon] for polygon in one["segmentation"]]
            copy.write_text(json.dumps(content))
        elif path.suffix == ".jpg":
            Image.open(path).reduce(4).save(copy)
    return root


def losses(printed):
    return re.findall(r" loss: ([\d.]+)", printed)


FAMILIES = {  # of the fast sample of the swap; where images have one size, without an option for it
    "mmdet::atss/atss_r50_fpn_1x_coco.py": SIZE,
    "mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py": SIZE,
    "mmdet::detectors/cascade-rcnn_r50-rfp_1x_coco.py": SIZE,
    "mmdet::detr/detr_r50_8xb2-150e_coco.py": SIZE,
    "mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py": SIZE,
    "mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py": SIZE,
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": SIZE,
    "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py": SIZE,
    "mmdet::ssd/ssd300_coco.py": (),
    "mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py": SIZE,
    "mmdet::yolof/yolof_r50-c5_8xb8-1x_coco.py": SIZE,
    "mmdet::yolox/yolox_tiny_8xb8-300e_coco.py": SIZE,
}


QUICK = "mmdet::atss/"  # `make test` runs this one, -m long the others; masks are in the test of a checkpoint below


@pytest.mark.parametrize(
    "config",
    [pytest.param(name, marks=() if name.startswith(QUICK) else pytest.mark.long) for name in FAMILIES],
    ids=[name.split("/")[0][7:] for name in FAMILIES],
)
def test_families_train_report_and_can_be_repeated(config, nuts, tmp_path):
    """Two steps and an evaluation on nuts; the written config alone gives the same losses and detections."""
    swap = ("--swap", json.dumps(ENCODER), "--checkpoint", "none")
    printed = command("train", config, *swap, "--data", nuts, *SHORT, *FAMILIES[config], *LOADERS, cwd=tmp_path)
    assert "COCO: images 8 train, 4 val" in printed
    table = printed[printed.index("Result on the validation set") :]
    assert re.search(r"all classes +[\d.]+ .* 28\n", table)
    assert re.search(r"hazelnut .* 8\n", table)
    (folder,) = (tmp_path / "work_dirs").iterdir()
    assert Image.open(folder / "predictions.png").width > 1000
    written = folder / f"{folder.name}.py"
    assert written.read_text().count("\n") < 200
    assert losses(printed)
    assert losses(command("train", written, "--work-dir", "again", cwd=tmp_path)) == losses(printed)
    checkpoint = re.search(r"  checkpoint +(\S+) \(", table)[1]
    command("test", written, checkpoint, "--out", "again.json", cwd=tmp_path)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((folder / "results.json").read_text())


def test_a_checkpoint_is_tested_on_own_data(data, tmp_path):
    """`test CONFIG CHECKPOINT --data DATA` has the detections of the end of the training, and so the same metrics."""
    printed = command("train", DEMO, "--data", data, "--iterations", "4", "--batch", "2", cwd=tmp_path)
    (folder,) = (tmp_path / "work_dirs").iterdir()
    expected = json.loads((folder / "results.json").read_text())
    checkpoint = re.search(r"  checkpoint +(\S+) \(", printed)[1]
    tested = command("test", DEMO, checkpoint, "--data", data, "--out", "own.json", cwd=tmp_path)
    assert "COCO: images 4 train, 4 val" in tested
    assert expected
    assert json.loads((tmp_path / "own.json").read_text()) == expected
    ap = re.search(r"all classes +([\d.]+)", printed)[1]
    assert f"coco/bbox_mAP: {ap}" in tested


def test_adapters_in_a_swapped_config_are_trained_evaluated_and_merged(data, tmp_path):
    options = (*SIZE, *SHORT, "--swap", "pe_synthetic_xs8_192", *LOADERS, "model.backbone.lora=dict(rank=2)")
    printed = command("train", "mmdet::atss/atss_r50_fpn_1x_coco.py", "--data", data, *options, cwd=tmp_path)
    assert "LoRA rank 2" in printed
    assert "checkpoints do not hold its weights, but name them: " in printed
    (folder,) = (tmp_path / "work_dirs").iterdir()
    checkpoint, written = (folder / "last_checkpoint").read_text(), folder / f"{folder.name}.py"
    assert "tensors of a plain model" in command("merge_lora", checkpoint, "merged.pth", cwd=tmp_path)
    for weights, name in ((checkpoint, "adapters.json"), ("merged.pth", "merged.json")):
        command("test", written, weights, "--out", name, cwd=tmp_path)
    ours, merged = (json.loads((tmp_path / name).read_text()) for name in ("adapters.json", "merged.json"))
    assert len(ours) == len(merged)
    for one, other in zip(ours, merged, strict=True):
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)


def test_browse_draws_own_data_after_the_augmentation_of_a_config(data, tmp_path):
    printed = command("browse", "mmdet::atss/atss_r50_fpn_1x_coco.py", "--data", data, "--count", "2", cwd=tmp_path)
    assert "atss_r50_fpn_1x_coco.py: 4 images, 8 objects in the train set" in printed
    assert Image.open(tmp_path / "sheet.png").width > 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet.png"]


def test_the_layers_of_a_probe_are_swept_on_masks(data, tmp_path):
    options = ("--layers", "0,1", "--limit", "2", "--cfg-options", *SMALL, "train_dataloader.num_workers=0")
    printed = command("sweep_layers", PROBE, "--data", data, "--epochs", "1", *options, cwd=tmp_path)
    assert "masks become label maps of 3 classes" in printed
    assert re.search(r"best by mIoU: layer \d; .*work_dirs/pe_spatial_linear_ade20k_shapes_layers/scores.png", printed)


def test_a_probe_trains_on_masks(data, tmp_path):
    printed = command("train", PROBE, "--data", data, *SHORT, *LOADERS, *SMALL, cwd=tmp_path)
    assert re.search(r"mIoU: [\d.]+", printed)
    assert list(tmp_path.glob("work_dirs/pe_spatial_linear_ade20k_shapes/best_mIoU_iter_*.pth"))
