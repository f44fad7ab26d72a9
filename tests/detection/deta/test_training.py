"""DETA's training recipe: what the stages say, learn with and start from; and that a small one trains and resumes."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.repository import REPO

pytest.importorskip("mmdet")
from helpers.coco import annotation, write_coco
from helpers.golden import checkpoint_file, read_json
from helpers.reference_deta import ReferenceDETA
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, HOOKS, MODELS, init_default_scope
from mmengine.structures import InstanceData
from mmengine.utils import import_modules_from_strings
from PIL import Image
from torch.testing import assert_close

from pe_spatial.convert.converter import convert
from pe_spatial.detection.deta.stages import LoadPreviousStage
from pe_spatial.detection.deta.transforms import DETAJitter, short_side_size
from pe_spatial.detection.objects365 import CheckedObjects365Dataset
from pe_spatial.encoder.files import CheckpointFile, read_checkpoint
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
FOLDER = REPO / "projects" / "coco_detection" / "deta"
SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)


def load(name):
    cfg = Config.fromfile(FOLDER / f"{name}.py")
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg


# The released scripts of perception_models@3e352cc:apps/detection/DETA_pe/scripts, and their batches.
STAGES = {
    "stage1_objects365_1024": dict(
        canvas=1024, classes=365, epochs=12, drop=10, batch=256, each=2, path=0.5, optimizer="AdamW", lr=2e-4,
        wrapper="OptimWrapper", before=None, new=None),
    "stage2_objects365_1536": dict(
        canvas=1536, classes=365, epochs=6, drop=4, batch=128, each=1, path=0.5, optimizer="AdamW", lr=5e-5,
        wrapper="OptimWrapper", before="stage1_objects365_1024/epoch_12", new=["bbox_head.cls_branches"]),
    "stage3_coco_1728": dict(
        canvas=1728, classes=80, epochs=12, drop=10, batch=64, each=1, path=0.4, optimizer="AdamW", lr=5e-5,
        wrapper="BFloat16OptimWrapper", before="stage2_objects365_1536/epoch_6", new=["bbox_head.cls_branches"]),
    "stage4_coco_1824": dict(
        canvas=1824, classes=80, epochs=3, drop=2, batch=64, each=1, path=0.0, optimizer="SGD", lr=5e-5,
        wrapper="BFloat16OptimWrapper", before="stage3_coco_1728/epoch_12", new=[]),
}  # fmt: skip


@pytest.mark.parametrize("name", STAGES)
def test_stage_is_the_released_one(name):
    cfg, expected = load(name), STAGES[name]
    optimizer = {"type": expected["optimizer"], "lr": expected["lr"], "weight_decay": 1e-4}
    assert cfg.optim_wrapper.optimizer == optimizer | ({"momentum": 0.9} if expected["optimizer"] == "SGD" else {})
    assert (cfg.optim_wrapper.type, cfg.optim_wrapper.clip_grad) == (expected["wrapper"], dict(max_norm=0.1))
    (schedule,) = cfg.param_scheduler
    assert (schedule.type, schedule.milestones, schedule.gamma) == ("MultiStepLR", [expected["drop"]], 0.1)
    assert schedule.by_epoch
    assert (cfg.train_cfg.type, cfg.train_cfg.max_epochs) == ("EpochBasedTrainLoop", expected["epochs"])
    assert cfg.default_hooks.checkpoint.by_epoch
    assert (cfg.auto_scale_lr.base_batch_size, cfg.train_dataloader.batch_size) == (expected["batch"], expected["each"])
    assert not cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt

    before, start = expected["before"], [hook for hook in cfg.custom_hooks if hook.type == "LoadPreviousStage"]
    assert cfg.load_from == (before and f"work_dirs/{before}.pth")
    assert [hook.get("skip", []) for hook in start] == ([expected["new"]] if before else [])
    assert HOOKS.get("LoadPreviousStage") is LoadPreviousStage
    assert cfg.model.backbone.init_cfg == (None if before else dict(type="Pretrained", checkpoint="released"))

    image, boxes, flip, jitter, _ = cfg.train_dataloader.dataset.pipeline
    assert image.color_type == "color_ignore_orientation"
    assert (boxes.type, flip, jitter.canvas) == (
        "LoadAnnotations", dict(type="RandomFlip", prob=0.5), expected["canvas"])  # fmt: skip
    resize = cfg.val_dataloader.dataset.pipeline[1]
    assert resize == dict(
        type="ShortSideResize", short_sides=[expected["canvas"] - 32], max_long_side=expected["canvas"] - 32
    )
    assert cfg.test_dataloader == cfg.val_dataloader
    assert cfg.model.data_preprocessor.pad_size_divisor == expected["canvas"]


@pytest.mark.parametrize("name", STAGES)
def test_stage_builds_at_full_width(name):
    cfg, expected = load(name), STAGES[name]
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    encoder = model.backbone.encoder
    assert (encoder.embed_dim, encoder.depth, encoder.patch_size, encoder.geometry.window_size) == (1536, 50, 16, 24)
    assert tuple(encoder.geometry.global_attn_indexes) == (12, 24, 36, 49)
    assert encoder.geometry.pos_grid == 24
    assert encoder.blocks[-1].drop_path == pytest.approx(expected["path"])
    assert encoder.grad_checkpointing
    assert model.grad_checkpointing
    assert [conv.conv.in_channels for conv in model.neck.convs] == [768, 1536, 1536]
    assert {branch.out_features for branch in model.bbox_head.cls_branches} == {expected["classes"]}
    assert model.num_queries == 900


@pytest.mark.parametrize(("variant", "width"), [("pe_spatial_b16_512", 768), ("pe_spatial_l14_448", 1024)])
def test_variant_is_one_option(variant, width):
    pytest.importorskip("torch", minversion="2.3")  # for checkpoints on the meta device
    cfg = load("deta_distilled_8x24g")
    cfg.merge_from_dict({"model.backbone.variant": variant})
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert [conv.conv.in_channels for conv in model.neck.convs] == [width // 2, width, width]
    assert model.extract_feat(torch.empty(1, 3, 128, 128, device="meta"))[0].shape == (1, 256, 16, 16)
    batch = 8 * cfg.train_dataloader.batch_size * cfg.optim_wrapper.accumulative_counts
    assert batch == cfg.auto_scale_lr.base_batch_size == 64


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[ds]*.py")), ids=lambda p: p.stem)
def test_header_names_command_hardware_cost_and_expectation(path):
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    assert all(f"#   {word} " in header for word in ("command", "hardware", "cost", "expected"))
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_every_parameter_has_the_rate_that_the_release_trained_it_with(golden):
    """Carried through the conversion, the rates of the reference's optimizer are those of ours, one for one."""
    folder = golden / "deta"
    rates = read_json(folder / "deta.json")["learning_rate_by_parameter"]
    file = read_checkpoint(checkpoint_file(folder / "deta.pth"))
    rates |= {name.removeprefix("transformer.decoder."): rate for name, rate in rates.items()}  # the heads' aliases
    state = {
        name: value if "freqs" in name else torch.full_like(value, rates[name])  # the conversion checks rotary tables
        for name, value in file.state.items()
    }
    expected = convert(CheckpointFile(Path("rates"), state), "mmdet", all_classes=True).state
    model = MODELS.build(ReferenceDETA(folder).cfg)
    wrapper = build_optim_wrapper(model, load("stage4_coco_1824").optim_wrapper)
    groups = {id(p): group for group in wrapper.optimizer.param_groups for p in group["params"]}
    found = {name: groups[id(p)]["lr"] for name, p in model.named_parameters()}
    assert {group["weight_decay"] for group in groups.values()} == {1e-4}
    assert found == {name: pytest.approx(value.unique().item()) for name, value in expected.items()}
    assert sorted(set(found.values())) == pytest.approx([5e-6, 5e-5])


def test_as_many_parameters_as_in_the_release_have_the_lower_rate(golden):
    facts = read_json(golden / "deta" / "release_finetune_learning_rates.json")["lr_groups"]
    cfg = load("stage4_coco_1824")
    with torch.device("meta"):
        wrapper = build_optim_wrapper(MODELS.build(cfg.model), cfg.optim_wrapper)
    rates = [group["lr"] for group in wrapper.optimizer.param_groups]
    assert {f"{rate:.0e}": rates.count(rate) for rate in set(rates)} == {k: v["count"] for k, v in facts.items()}


# --- images


def painted(height=300, width=500, box=(100, 60, 380, 250)):
    """A dark image with one bright object that fills its box."""
    image = np.zeros((height, width, 3), np.uint8)
    left, top, right, bottom = box
    image[top:bottom, left:right] = 255
    boxes = HorizontalBoxes(torch.tensor([box], dtype=torch.float32))
    return dict(
        img=image, img_shape=(height, width), gt_bboxes=boxes,
        gt_bboxes_labels=np.zeros(1, np.int64), gt_ignore_flags=np.zeros(1, bool))  # fmt: skip


def test_jitter_draws_the_released_sizes():
    np.random.seed(0)
    jitter, side = DETAJitter(canvas=640), 640 - 32
    whole = {short_side_size(300, 500, short_side=s, max_long_side=side) for s in (480, 512, 544, 576, 608)}
    cut = []
    for _ in range(100):
        size = jitter(painted())["img_shape"]
        assert max(size) <= side
        if size not in whole:  # of a piece between 384 x 384 and 600 x 600 pixels
            assert max(size) >= side - 1
            assert min(size) >= side * 384 / 600 - 1
            cut.append(size)
    assert 30 < len(cut) < 70
    assert len(set(cut)) > 20


def test_jitter_draws_every_short_side():
    np.random.seed(0)
    (resize,) = DETAJitter(canvas=640).transforms[0]
    square = dict(img=np.zeros((30, 30, 3), np.uint8))
    assert {resize(dict(square))["img_shape"][0] for _ in range(60)} == {480, 512, 544, 576, 608}
    first, crop, last = DETAJitter(canvas=640).transforms[1]
    assert {first(dict(square))["img_shape"][0] for _ in range(30)} == {400, 500, 600}
    sizes = {crop(dict(img=np.zeros((700, 500, 3), np.uint8)))["img_shape"] for _ in range(3000)}
    assert [(min(side), max(side)) for side in zip(*sizes, strict=True)] == [(384, 600), (384, 500)]
    assert last(dict(square))["img_shape"] == (608, 608)


def test_boxes_follow_their_objects_through_the_jitter():
    np.random.seed(1)
    jitter = DETAJitter(canvas=640)
    for _ in range(30):
        results = jitter(painted())
        rows, columns = np.nonzero(results["img"][..., 0] > 127)
        seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert_close(results["gt_bboxes"].tensor[0].tolist(), list(map(float, seen)), atol=3, rtol=0)


def test_a_piece_without_objects_stays_and_no_box_is_without_area():
    """The objects are a speck in a corner and the left quarter, so that pieces lose one or both."""
    np.random.seed(0)
    jitter, counts = DETAJitter(canvas=640), []
    for _ in range(60):
        results = painted(400, 800, (796, 396, 800, 400))
        results["gt_bboxes"] = HorizontalBoxes(torch.tensor([[796.0, 396, 800, 400], [0, 0, 200, 400]]))
        results.update(gt_bboxes_labels=np.arange(2), gt_ignore_flags=np.zeros(2, bool))
        results = jitter(results)
        boxes = results["gt_bboxes"].tensor
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert len(boxes) == len(results["gt_bboxes_labels"]) == len(results["gt_ignore_flags"])
        counts.append(len(boxes))
    assert {0, 1, 2} == set(counts)


def test_a_canvas_below_the_shortest_side_is_refused():
    with pytest.raises(ConfigError, match="canvas=480 is not above min_short_side=480"):
        DETAJitter(canvas=480)
    assert DETAJitter(canvas=128, min_short_side=64)(painted())["img_shape"][1] <= 96


def objects365(root, categories, **options):
    """A set of two images, of which one is missing."""
    (root / "train" / "patch8").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(root / "train" / "patch8" / "a.jpg")
    images = [dict(id=i, file_name=f"images/v1/patch8/{name}.jpg", height=30, width=40) for i, name in enumerate("ab")]
    content = dict(images=images, categories=categories)
    content["annotations"] = [annotation(i, i % 2, [1, 2, 20, 10], category) for i, category in enumerate((365, 1))]
    (root / "train.json").write_text(json.dumps(content))
    load("stage1_objects365_1024")
    return DATASETS.build(
        dict(type="CheckedObjects365Dataset", data_root=str(root), ann_file="train.json",
             data_prefix=dict(img="train/"), pipeline=[], **options))  # fmt: skip


def test_objects365(tmp_path):
    categories = [dict(id=i, name=f"kind {i}") for i in range(1, 366)]
    dataset = objects365(tmp_path, categories, skip_missing=True)
    assert isinstance(dataset, CheckedObjects365Dataset)
    assert dataset.metainfo["classes"] == tuple(f"kind {i}" for i in range(1, 366))
    (sample,) = (dataset.get_data_info(i) for i in range(len(dataset)))
    assert sample["img_path"] == str(tmp_path / "train" / "patch8" / "a.jpg")
    assert [instance["bbox_label"] for instance in sample["instances"]] == [364]
    with pytest.raises(DatasetError, match=r"1 of the 2 images .* are missing: .*patch8/b.jpg"):
        objects365(tmp_path, categories)
    with pytest.raises(DatasetError, match="does not have the categories 1 to 365"):
        objects365(tmp_path, categories[::-1], skip_missing=True)


# --- a small DETA, trained


def small(cfg, data, *, classes=("red", "blue")):
    """The config of a stage with a small model, on the set of rectangles in `data`."""
    canvas, width = 128, 32
    model = cfg.model
    model.num_queries = 20  # more than the tokens of the two coarsest levels, which have 4 and 1
    model.data_preprocessor.pad_size_divisor = canvas
    model.backbone.update(
        variant=SMALL, geometry="release", drop_path_rate=0.0, window_size=3, global_attn_indexes=(1, 3),
        pos_embed_mode="tile", rope_mode="interpolate", rope_grid=16, init_cfg=None)  # fmt: skip
    model.neck.out_channels = width
    model.positional_encoding.num_feats = width // 2
    for part in (model.encoder, model.decoder):
        part.num_layers = 2
        for block in part.layer_cfg.values():
            block.embed_dims = width
        part.layer_cfg.ffn_cfg.feedforward_channels = 2 * width
    model.bbox_head.update(embed_dims=width, num_classes=len(classes))
    model.test_cfg.class_ids = None
    pipeline = cfg.train_dataloader.dataset.pipeline
    pipeline[3].update(canvas=canvas, min_short_side=64)
    cfg.val_dataloader.dataset.pipeline[1].update(short_sides=[96], max_long_side=96)
    for loader in (cfg.train_dataloader, cfg.val_dataloader):
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        loader.dataset.update(
            data_root=str(data), ann_file="annotations/instances_train2017.json",
            data_prefix=dict(img="train2017/"), metainfo=dict(classes=classes))  # fmt: skip
    cfg.test_dataloader = cfg.val_dataloader
    cfg.val_evaluator.ann_file = cfg.test_evaluator.ann_file = str(data / "annotations/instances_train2017.json")
    cfg.default_hooks.logger.interval = 1
    return cfg


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with rectangles, a small stage 3, and the end of a stage 2 to start it from."""
    root = tmp_path_factory.mktemp("deta")
    write_coco(root / "data")
    cfg = small(load("stage3_coco_1728"), root / "data")
    cfg.load_from = str(root / "stage2.pth")
    cfg.train_cfg.max_epochs = 1
    cfg.dump(root / "tiny.py")
    torch.manual_seed(0)
    model = cfg.model.copy()
    model.bbox_head.num_classes = 7
    model = MODELS.build(model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), root / "stage2.pth")
    return root


@pytest.fixture
def tool(project, monkeypatch):
    """Return a function that runs a tool in this process, in the project, and returns what it ends with, or None."""

    def run(name, *args):
        monkeypatch.chdir(project)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        try:
            runpy.run_path(str(REPO / "tools" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            return end.code

    return run


def state(path):
    return torch.load(path, weights_only=False)


def test_trains_resumes_and_evaluates(project, tool):
    assert tool("train", "tiny.py", "--work-dir", "run") is None
    first = state(project / "run" / "epoch_1.pth")
    assert (first["meta"]["epoch"], first["meta"]["iter"]) == (1, 2)
    assert first["param_schedulers"]

    more = ("--cfg-options", "train_cfg.max_epochs=2", "load_from=gone.pth")  # which a resumed run does not need
    assert tool("train", "tiny.py", "--work-dir", "run", "--resume", *more) is None
    second = state(project / "run" / "epoch_2.pth")
    assert (second["meta"]["epoch"], second["meta"]["iter"]) == (2, 4)
    moved = [not torch.equal(first["state_dict"][k], v) for k, v in second["state_dict"].items()]
    assert all(moved)

    assert tool("test", "tiny.py", "run/epoch_2.pth", "--work-dir", "run/test", "--out", "run/out.pkl") is None
    assert (project / "run" / "out.pkl").is_file()


def test_a_stage_starts_from_the_one_before_with_new_class_heads(project, tool):
    still = ("--cfg-options", "optim_wrapper.optimizer.lr=0", "optim_wrapper.optimizer.weight_decay=0")
    assert tool("train", "tiny.py", "--work-dir", "still", *still) is None
    before, after = state(project / "stage2.pth")["state_dict"], state(project / "still" / "epoch_1.pth")["state_dict"]
    new = {name for name in after if name not in before or not torch.equal(before[name], after[name])}
    assert new == {name for name in after if name.startswith("bbox_head.cls_branches")}
    bias = after["bbox_head.cls_branches.2.bias"]  # the objectness of the proposals
    assert_close(bias, torch.full((2,), -np.log(99), dtype=torch.float32))

    keep = ("--cfg-options", "custom_hooks.1.skip=[]")
    error = tool("train", "tiny.py", "--work-dir", "kept", *keep)
    assert re.match(r"error: .*stage2.pth does not fit this stage: 6 weights .*cls_branches.0.bias", error)
    some = ("custom_hooks.1.skip=[bbox_head.cls_branches.2.weight]", "load_from=still/epoch_1.pth")
    assert tool("train", "tiny.py", "--work-dir", "some", *still, *some) is None
    some = state(project / "some" / "epoch_1.pth")["state_dict"]
    assert [name for name in some if not torch.equal(some[name], after[name])] == ["bbox_head.cls_branches.2.weight"]


def test_a_stage_needs_the_one_before(tool):
    missing = tool("train", "tiny.py", "--work-dir", "none", "--cfg-options", "load_from=gone.pth")
    assert missing.startswith("error: no checkpoint at gone.pth; ")


def test_images_without_objects_train_every_parameter(project):
    """As one of a batch and as all of it: each parameter has a finite gradient, or DDP would wait for it."""
    model = MODELS.build(Config.fromfile(project / "tiny.py").model)
    model.init_weights()
    for objects in ([1, 0], [0, 0]):
        samples = []
        for number in objects:
            boxes = torch.tensor([[10.0, 10, 60, 50]])[:number]
            sample = DetDataSample(gt_instances=InstanceData(bboxes=boxes, labels=torch.zeros(number).long()))
            sample.set_metainfo(dict(img_shape=(96, 80), ori_shape=(96, 80), batch_input_shape=(128, 128)))
            samples.append(sample)
        model.zero_grad()
        losses = model.loss(torch.rand(2, 3, 128, 128), samples)
        sum(losses.values()).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        assert bool(losses["loss_bbox"]) == any(objects)


def test_more_queries_than_tokens_is_one_sentence(tool):
    error = tool("train", "tiny.py", "--work-dir", "many", "--cfg-options", "model.num_queries=400")
    assert error.startswith("error: num_queries is 400, but an image has only 341 tokens in its 5 levels")


def test_a_image_larger_than_the_canvas_is_one_sentence(tool):
    smaller = ("--cfg-options", "model.data_preprocessor.pad_size_divisor=64")
    error = tool("train", "tiny.py", "--work-dir", "large", *smaller)
    assert re.match(r"error: .*\.png is \d+ x \d+ px when it reaches the model, and its canvas has 64 px", error)


# --- launch scripts


@pytest.fixture
def launch(tmp_path):
    """Return a function that runs a launch script; stand-ins for torchrun and sbatch print what they get."""
    python = tmp_path / "python"
    show = "printf '%s|' \"$@\""
    python.write_text(f'#!/bin/sh\ncase "$1" in *accumulation.py) exec {sys.executable} "$@";; *) {show};; esac\n')
    (tmp_path / "sbatch").write_text(f"#!/bin/sh\n{show}\n")
    for file in (python, tmp_path / "sbatch"):
        file.chmod(0o755)

    def run(script, *args, **environ):
        path = f"{tmp_path}:{os.environ['PATH']}"
        return subprocess.run(
            [FOLDER / script, *args], cwd=REPO, capture_output=True, text=True, check=False,
            env={**os.environ, "PYTHON": str(python), "PATH": path, "PYTHONPATH": str(REPO), **environ})  # fmt: skip

    return run


@pytest.mark.parametrize(("nodes", "steps"), [(1, 8), (2, 4), (8, 1)])
def test_dist_train_keeps_the_total_batch_and_passes_flags_on(launch, nodes, steps):
    environ = dict(NNODES=str(nodes), MASTER_ADDR="node0")
    done = launch("dist_train.sh", "stage3_coco_1728", "8", "--resume", "--work-dir", "a b", **environ)
    flags = f"--launcher|pytorch|--cfg-options|optim_wrapper.accumulative_counts={steps}|--resume|--work-dir|a b|"
    assert done.stdout.endswith(f"stage3_coco_1728.py|{flags}"), done.stderr


def test_slurm_train_likewise(launch):
    done = launch("slurm_train.sh", "long", "stage1_objects365_1024", "--amp", NNODES="4")
    assert re.search(r"--job-name\|stage1_objects365_1024\|--nodes\|4\|.*stage1_objects365_1024.py", done.stdout)
    assert done.stdout.endswith("--cfg-options|optim_wrapper.accumulative_counts=4|--amp|")


def test_a_batch_that_the_gpus_cannot_share_is_refused(launch):
    done = launch("dist_train.sh", "stage3_coco_1728", "7")
    assert done.returncode == 1
    assert "error: a batch of 64 images is not a multiple of 7 GPUs x 1" in done.stderr
    assert launch("dist_train.sh", "stage3_coco_1728").returncode == 2
    assert launch("slurm_train.sh", "long").returncode == 2
