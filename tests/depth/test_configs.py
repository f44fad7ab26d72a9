"""The configs of depth build at every size, say what the recipes say, and train, resume and test through the tools."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
from helpers.repository import REPO, command
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, init_default_scope
from mmengine.utils import import_modules_from_strings

from pe_spatial import VARIANTS
from pe_spatial.errors import DatasetError

pytestmark = pytest.mark.mmseg
SIZES = ["t16_512", "s16_512", "b16_512", "l14_448", "g14_448"]
EVEN = {12: (2, 5, 8, 11), 24: (5, 11, 17, 23), 50: (12, 24, 37, 49)}


def load(name, **options):
    cfg = Config.fromfile(REPO / "configs" / f"pe_spatial_{name}_nyu.py")
    cfg.merge_from_dict(options)
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    return cfg


def build(cfg):
    with torch.device("meta"):
        return MODELS.build(cfg.model)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["lin1", "lin1_dinov2", "lin4", "dpt", "dpt_single"])
def test_builds_at_every_size(name, size):
    options = {"model.backbone.variant": f"pe_spatial_{size}"}
    if name == "dpt_single":
        options["model.backbone.out_indices"] = "last"
    if "token" in load(name).model.decode_head and size == "g14_448":
        options["model.decode_head.token"] = "mean"
    model = build(load(name, **options))
    width, depth = VARIANTS[f"pe_spatial_{size}"].embed_dim, VARIANTS[f"pe_spatial_{size}"].depth
    assert model.backbone.out_indices == (EVEN[depth] if name in ("lin4", "dpt") else (depth - 1,))
    assert model.frozen
    if name.startswith("dpt"):
        assert model.decode_head.project.out_channels == width // 4
        assert model.decode_head.in_index == ((0, 0, 0, 0) if name == "dpt_single" else (0, 1, 2, 3))
    else:
        parts = {"lin1": 1, "lin1_dinov2": 2, "lin4": 8}[name]
        assert model.decode_head.conv.weight.shape == (256, parts * width, 1, 1)


def test_named_presets_are_what_the_references_have():
    heads = {name: load(name).model.decode_head for name in ("lin1", "lin1_dinov2", "lin4", "dpt")}
    assert heads["lin1"] == dict(type="BinsDepthHead", norm="batch", min_depth=1e-3, max_depth=10.0)
    dinov2 = dict(type="BinsDepthHead", norm="layer", token="class", upsample=4, min_depth=1e-3, max_depth=10.0)
    assert heads["lin1_dinov2"] == heads["lin4"] == dinov2
    assert heads["dpt"] == dict(type="DPTDepthHead", norm="batch", min_depth=1e-3, max_depth=10.0)


def test_paper_reads_layer_46_of_g():
    cfg = load("dpt_single")
    assert build(cfg).backbone.out_indices == (45,)
    assert cfg.model.backbone.variant == "pe_spatial_g14_448"
    assert cfg.train_cfg.max_iters == 20 * math.ceil(24231 / 16) == 20 * cfg.train_cfg.val_interval
    assert (cfg.default_hooks.checkpoint.save_best, cfg.default_hooks.checkpoint.rule) == ("rmse", "less")


@pytest.mark.parametrize("name", ["lin1", "lin1_dinov2", "lin4", "dpt", "dpt_single"])
def test_protocol_is_that_of_all(name):
    cfg = load(name)
    assert cfg.model.test_cfg == dict(mode="whole", flip=True)
    assert cfg.test_evaluator == dict(type="CheckedDepthMetric", crop="eigen", min_depth=1e-3, max_depth=10.0)
    for loader, lines in ((cfg.train_dataloader, "nyu_train.txt"), (cfg.test_dataloader, "nyu_test.txt")):
        assert (loader.dataset.ann_file, loader.dataset.expected) == (lines, 24231 if "train" in lines else 654)
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.sync_bn == "torch"
    assert cfg.optim_wrapper.clip_grad.max_norm == 35


def test_recipes_have_the_published_numbers():
    lin1, lin4, dpt = (load(name) for name in ("lin1", "lin4", "dpt"))
    assert lin1.optim_wrapper.optimizer == dict(type="AdamW", lr=3e-4, betas=(0.85, 0.99), weight_decay=1e-4)
    for cfg in (lin4, dpt):
        assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
        assert [(loss.type, loss.loss_weight) for loss in cfg.model.losses] == [("SigLoss", 1.0), ("GradientLoss", 0.5)]
    assert [loss.type for loss in lin1.model.losses] == ["SigLoss"]
    assert lin1.train_cfg.max_iters == dpt.train_cfg.max_iters == 38400
    augment = {step.type: step for step in dpt.train_dataloader.dataset.pipeline}
    assert augment["DepthCrop"].box == (43, 45, 608, 472)
    assert augment["DepthRandomCrop"].size == (416, 544)
    assert (augment["DepthRandomRotate"].degrees, augment["DepthRandomRotate"].prob) == (2.5, 0.5)


def test_schedule_is_that_of_dinov3():
    """Warm-up times cosine over the whole run, and beta1 from 0.85 to 0.95 after it, at a hundredth of the length."""
    cfg = load("lin1")
    total, warm_up = cfg.train_cfg.max_iters // 100, 128
    optimizer = build_optim_wrapper(torch.nn.Linear(1, 1), cfg.optim_wrapper)
    schedulers = [
        PARAM_SCHEDULERS.build({**s, "begin": s.begin // 100, "end": s.end // 100, "optimizer": optimizer})
        for s in cfg.param_scheduler
    ]
    seen = []
    for _ in range(total):
        group = optimizer.optimizer.param_groups[0]
        seen.append((group["lr"], group["betas"][0]))
        optimizer.optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    for step in (0, 1, 64, 127, 200, 300, 380):
        cosine = 3e-4 * (1 + math.cos(math.pi * step / total)) / 2
        lr = cosine * step / warm_up + 3e-7 if step < warm_up else cosine
        momentum = 0.85 if step < warm_up else 0.9 - 0.05 * math.cos(math.pi * (step - warm_up) / (total - warm_up))
        assert seen[step] == pytest.approx((lr, momentum), rel=0.02, abs=2e-6)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Four pairs of 48 x 64 pixels."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    for kind in ("rgb", "depth"):
        (root / kind).mkdir()
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(root / f"rgb/{i}.png")
        Image.fromarray(rng.integers(1000, 5000, (48, 64), dtype=np.uint16)).save(root / f"depth/{i}.png")
    return root


@pytest.mark.slow
def test_trains_resumes_and_tests(world, tmp_path):
    """Through the commands, whole checkpoints, from the config that overfits to seven real images."""
    config = REPO / "projects/nyu_depth/overfit_nyu.py"
    options = [
        "--cfg-options",
        "model.backbone.init_cfg=None",
        "model.frozen=True",
        "default_hooks.checkpoint.interval=2",
        "default_hooks.logger.interval=1",
    ]
    common = [config, "--data-root", world, "--work-dir", tmp_path / "run"]
    command("train", *common, *options, "train_cfg.max_iters=2", "train_cfg.val_interval=2", cwd=tmp_path)
    state = torch.load(tmp_path / "run/iter_2.pth", weights_only=False)["state_dict"]
    out = command(
        "train", *common, "--resume", *options, "train_cfg.max_iters=4", "train_cfg.val_interval=4", cwd=tmp_path
    )
    assert "Iter(train) [3/4]" in out
    assert "Iter(train) [2/4]" not in out
    later = torch.load(tmp_path / "run/iter_4.pth", weights_only=False)["state_dict"]
    assert {name for name in later if not torch.equal(later[name], state[name])} >= {"decode_head.out.weight"}
    assert all(torch.equal(later[name], state[name]) for name in later if name.startswith("backbone."))
    assert "backbone.blocks.4.mlp.fc2.weight" in later
    options = ("--data-root", world, "--work-dir", tmp_path)
    out = command("test", config, tmp_path / "run/iter_4.pth", *options, cwd=tmp_path)
    assert "rmse" in out
    assert "depth of 4 images, from 0.001 m to 10 m, crop eigen" in out


def test_own_data_with_a_shipped_config_is_a_matter_of_options(tmp_path):
    """Ten pairs of 320 x 240; each error names the next option."""
    from mmengine.registry import DATASETS

    for i in range(10):
        for folder, pixels in (("rgb", np.zeros((240, 320, 3), np.uint8)), ("z", np.full((240, 320), 2000, np.uint16))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    lines = [f"rgb/{i}.png z/{i}.png\n" for i in range(10)]
    options = {"data_root": str(tmp_path)}
    train = "train_dataloader.dataset"

    def first():
        cfg = load("dpt", **{f"{train}.{key}": value for key, value in options.items()})
        return DATASETS.build(cfg.train_dataloader.dataset)[0]

    with pytest.raises(DatasetError, match=r"there is no file .*nyu_train\.txt; check .*ann_file"):
        first()
    (tmp_path / "mine.txt").write_text("".join(lines))
    options["ann_file"] = "mine.txt"
    with pytest.raises(DatasetError, match=r"10 pairs instead of 24231; .* expected=None"):
        first()
    options["expected"] = None
    with pytest.raises(DatasetError, match=r"240x320 .*; set box of DepthCrop .* or remove it"):
        first()
    cfg = load("dpt")
    options["pipeline"] = [step for step in cfg.train_pipeline if step.type != "DepthCrop"]
    with pytest.raises(DatasetError, match=r"240x320 .* smaller than the crop of 416x544; make the crop smaller, or"):
        first()
    options["pipeline"] = [dict(s, size=(224, 288)) if "size" in s else s for s in options["pipeline"]]
    options["scale"] = 1
    with pytest.raises(DatasetError, match=r"median depth of 2000 m .* set scale=1000"):
        first()
    options["scale"] = 1000
    sample = first()
    assert sample["inputs"].shape == (3, 224, 288)
    assert sample["data_samples"].gt_depth_map.data.max() == 2
