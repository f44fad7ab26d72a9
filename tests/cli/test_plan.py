"""tools/plan.py: one row for each way to hold weights and activations, and numbers that follow from one another."""

import dataclasses
import json

import pytest
import torch
from helpers.encoders import TINY
from helpers.repository import REPO

pytest.importorskip("mmseg")
pytest.importorskip("torch", minversion="2.4")
from mmengine.config import Config
from PIL import Image

from pe_spatial.cli import plan as tool
from pe_spatial.cli.main import build_parser
from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError
from pe_spatial.planning import search
from pe_spatial.planning.planner import measure_weights
from pe_spatial.planning.registry import read_shape
from pe_spatial.planning.report import explain

pytestmark = pytest.mark.mmseg

CONFIG = str(REPO / "configs" / "pe_spatial_linear_ade20k.py")


def plan(capsys, tmp_path, *options, config=CONFIG):
    """What it prints, and the rows that it writes."""
    out = tmp_path / "plan.json"
    tool.run(build_parser("plan").parse_args([config, "--json", str(out), *options]))
    return capsys.readouterr().out, json.loads(out.read_text())


def test_rows_follow_from_one_another(capsys, tmp_path):
    options = ["--gpus", "4", "--batch-size", "3", "--gpu-memory", "6", "--reserve", "1", "--images", "1000"]
    options += ["--efficiency", "0.5", "--float32-rate", "10", "--variants", "t16,s16"]
    out, rows = plan(capsys, tmp_path, *options)
    assert [(row["variant"], row["weights"], row["recomputed"]) for row in rows] == [
        (f"pe_spatial_{size}_512", weights, recomputed)
        for size in ("t16", "s16")
        for recomputed in (False, "selective", True)
        for weights in ("DDP", "FSDP")
    ]
    for row in rows:
        kept = sum(row[key] for key in ("parameters", "gradients", "optimizer", "extra"))
        assert row["total"] == kept + max(row["activations"], row["update"])
        assert row["hours"] == pytest.approx(1000 / 4 * row["step_flops"] / (10e12 * 0.5) / 3600)
        assert not row["bfloat16"]
        assert row["size"] == [512, 512]
        fits = "yes" if row["total"] <= 5e9 else "no"
        assert f"| {row['total'] / 1e9:.2f} | {fits} | {row['largest_batch']} |" in out
        assert (row["largest_batch"] >= 3) == (fits == "yes")
    assert "512 x 512 px, 3 images on each of 4 GPUs of 6 GB, float32" in out
    assert "50% of 65 TFLOP/s in bfloat16 and of 10 TFLOP/s in float32 (T4;" in out
    assert "Counted: backbone, decode head and its loss." in out
    assert "epoch: 1000; run: 40000 iterations." in out
    assert rows[0]["run_hours"] == pytest.approx(40000 * rows[0]["seconds"] / 3600)
    assert "does not reach these rates" in out
    assert len([line for line in out.splitlines() if line.startswith("| pe_")]) == 12


@pytest.mark.parametrize(
    ("memory", "name", "rates"), [(16, "T4", (65, 8.1)), (24, "A10", (125, 31.2)), (48, "A40", (149.7, 37.4)),
                                  (80, "H100", (989, 67)), (141, "H100", (989, 67))],
)  # fmt: skip
def test_rates_are_those_of_a_gpu_with_this_memory(memory, name, rates):
    assert (assumed := search.Hardware(gpu_memory=memory).assumed)[1:] == (name, *rates)
    assert search.Hardware(gpu_memory=memory, float32_rate=10).assumed == assumed._replace(float32=10)


@pytest.mark.parametrize(
    ("model", "place"),
    [(dict(backbone=dict(type="PerceptionEncoderPyramid", variant="x")), "model.backbone"),
     (dict(detector=dict(backbone=dict(type="X", variant="x"))), "model.detector.backbone"),
     (dict(tracker=dict(variant="x")), "model.tracker.encoder_options"),
     (dict(backbone=dict(type="ResNet")), None)],
)  # fmt: skip
def test_text_names_the_options_that_set_a_row(model, place):
    assert search.encoder_place(model) == place
    option = place and f"{place}.grad_checkpointing"
    text = explain([dict(counted="all", option=option, seconds=1, recomputed=True)], search.Hardware(gpu_memory=24))
    assert "train_dataloader.batch_size=N" in text
    assert (f"{option}=True" if option else "with_cp") in text
    assert "A10" in text


def test_largest_batch_is_the_largest_that_fits(capsys, tmp_path):
    memory = ["--gpus", "1", "--gpu-memory", "4", "--reserve", "0.5", "--variants", "s16"]
    _, rows = plan(capsys, tmp_path, *memory)
    largest = rows[0]["largest_batch"]
    assert largest > 2
    totals = [plan(capsys, tmp_path, *memory, "--batch-size", str(b))[1][0]["total"] for b in (largest, largest + 1)]
    assert totals[0] <= 3.5e9 < totals[1]
    assert {row["weights"] for row in rows} == {"DDP"}
    assert rows[0]["extra"] == 0


def test_what_the_optimizer_makes_in_passing_must_fit(capsys, tmp_path, monkeypatch):
    def measure(*args, **options):
        return dataclasses.replace(measure_weights(*args, **options), update=79 * 10**9)

    monkeypatch.setattr(search, "measure_weights", measure)
    _, rows = plan(capsys, tmp_path, "--gpus", "1", "--variants", "t16")
    assert rows[0]["total"] > 79e9 > rows[0]["activations"]
    assert rows[0]["largest_batch"] == 0


def test_a_loss_that_needs_values_is_one_sentence(capsys, tmp_path, monkeypatch):
    def measure(*_, **__):
        return torch.empty(1, device="meta").numpy()

    monkeypatch.setattr(search, "measure_step", measure)
    with pytest.raises(ConfigError, match="cannot be planned: LinearProbe or its losses need values"):
        plan(capsys, tmp_path, "--variants", "t16")


def test_buckets_and_bfloat16_come_from_the_config(capsys, tmp_path):
    config = tmp_path / "tiny.py"
    config.write_text(f"_base_ = {CONFIG!r}\nmodel = dict(backbone=dict(variant=dict(_delete_=True, **{vars(TINY)})))")
    options = ["--gpus", "2", "--batch-size", "1"]
    _, rows = plan(capsys, tmp_path, *options, config=str(config))
    assert rows[0]["extra"] == rows[0]["gradients"]
    options += ["--cfg-options", "model_wrapper_cfg.gradient_as_bucket_view=True"]
    options += ["optim_wrapper.type=BFloat16OptimWrapper"]
    _, rows = plan(capsys, tmp_path, *options, config=str(config))
    assert rows[0]["extra"] == 0
    assert rows[0]["bfloat16"]
    assert rows[0]["variant"] == "own"


@pytest.mark.parametrize(
    ("config", "size"),
    [("configs/pe_spatial_dpt_nyu.py", (416, 544)), ("projects/nyu_depth/overfit_nyu.py", (192, 256))],
)
def test_size_of_depth_images_comes_from_their_augmentation(config, size):
    assert search.batch_shape(read_config(str(REPO / config))) == dict(size=size)


@pytest.mark.parametrize(
    ("pipeline", "size"),
    [
        ([dict(type="Resize", scale=(1333, 800), keep_ratio=True)], (800, 1333)),
        ([dict(type="Resize", scale=(640, 480))], (480, 640)),
        ([dict(type="RandomResize", scale=(100, 60), ratio_range=(0.5, 2.0), keep_ratio=True)], (120, 200)),
        ([dict(type="RandomChoiceResize", scales=[(480, 1333), (800, 1333)], keep_ratio=True)], (800, 1333)),
        ([dict(type="Resize", scale=(99999999, 512), keep_ratio=True), dict(type="RandomCrop", crop_size=8)], (8, 8)),
        ([dict(type="Resize", scale=(60, 60)), dict(type="Pad", size=(64, 96))], (96, 64)),
        ([dict(type="RandomChoice", transforms=[[], [dict(type="Resize", scale=(8, 4))]])], (4, 8)),
        ([dict(type="Pad", size_divisor=32)], None),
    ],
)
def test_size_of_pipelines(pipeline, size):
    assert read_shape(pipeline).get("size") == size


def test_number_and_size_of_the_images_come_from_the_dataset(capsys, tmp_path):
    for folder in ("train", "depth/train"):
        (tmp_path / "data" / folder).mkdir(parents=True)
    for name in ("a", "b"):
        Image.new("RGB", (48, 32)).save(tmp_path / f"data/train/{name}.jpg")
        Image.new("I;16", (48, 32)).save(tmp_path / f"data/depth/train/{name}.png")
    options = ["--gpus", "1", "--cfg-options", f"train_dataloader.dataset.data_root={tmp_path / 'data'}/"]
    out, rows = plan(capsys, tmp_path, *options, config=str(REPO / "projects" / "nyu_depth" / "synthetic_dpt.py"))
    assert rows[0]["size"] == [32, 48]
    assert "epoch: 2; run: 200 iterations" in out
    assert rows[0]["variant"] == "pe_synthetic_xs8_192"


def test_an_assumed_number_is_said(capsys, tmp_path):
    out, _ = plan(capsys, tmp_path, "--variants", "PE-Spatial-T16-512", "--gpus", "1")
    assert "epoch: 117266 (assumed, as in COCO; --images N. The dataset cannot be read: there is no folder" in out


def test_clips_have_the_frames_and_objects_of_the_pipeline(capsys, tmp_path):
    pytest.importorskip("sam2")
    options = ["--variants", "t16", "--gpus", "1", "--cfg-options", "model.tracker.grid=4"]
    options += ["model.prompting.corrections=0"]  # every click is planned, and takes its time
    options += ["train_dataloader.dataset.pipeline.0.num_frames=2", "train_dataloader.dataset.pipeline.3.size=64"]
    out, rows = plan(capsys, tmp_path, *options, config=str(REPO / "configs" / "pe_spatial_sam2_davis.py"))
    assert "64 x 64 px, 1 clips of 2 frames on each of 1 GPUs" in out
    assert [row["objects"] for row in rows] == [3, 3, 3]
    assert rows[0]["variant"] == "pe_spatial_t16_512"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variants", "t16,x"], "unknown variant 'x'"),
        (["--cfg-options", "optim_wrapper=None"], "has no optim_wrapper"),
        (
            ["--cfg-options", "model.data_preprocessor.size=None", "train_dataloader.dataset.pipeline=[]"],
            "give --size HEIGHT WIDTH",
        ),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--gpus", "0"], "--gpus is 0"),
        (["--cfg-options", "train_dataloader=None"], "has no train_dataloader"),
    ],
)
def test_bad_input(options, words, capsys, tmp_path):
    with pytest.raises(ConfigError, match=words):
        plan(capsys, tmp_path, *options)
    assert not list(tmp_path.iterdir())


def test_clips_of_several_sets_are_those_of_the_first():
    cfg = Config.fromfile(REPO / "projects" / "video_tracking" / "stage2_unfrozen.py")
    assert search.batch_shape(cfg) == dict(size=(1024, 1024), frames=8, objects=3)
    cfg.train_dataloader.dataset.datasets = []
    assert search.batch_shape(cfg) == {}


@pytest.mark.mmdet
def test_plain_detectors_are_planned_with_their_losses(capsys, tmp_path):
    pytest.importorskip("mmdet")
    options = ["--size", "64", "64", "--gpus", "1", "--batch-size", "1"]
    out, _ = plan(capsys, tmp_path, *options, config="mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py")
    assert "Counted: backbone, neck, proposals, RoI heads and losses with 20 objects" in out
