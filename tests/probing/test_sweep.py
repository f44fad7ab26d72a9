"""The layer sweep: cached maps train the same head as the encoder does, and the layer with the answer wins."""

import copy
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmseg")
from helpers.coco import write_coco
from helpers.configs import load
from helpers.repository import REPO, command
from helpers.videos import write_davis
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import MODELS
from mmengine.runner import Runner

from pe_spatial import EncoderConfig, PerceptionEncoder
from pe_spatial.engine import feature_cache
from pe_spatial.engine.report import best_layer
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.probing.report import choose_score, format_best, format_table, write_report
from pe_spatial.probing.sweep import LayerSweep

pytestmark = pytest.mark.mmseg
TINY = EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2)
FIELDS = {name: getattr(TINY, name) for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")}
CORNERS = torch.tensor([[-1.0, -1], [1, -1], [-1, 1], [1, 1]])  # red and green of a patch; the label is their XOR
ANSWER = torch.tensor([0.0, 1, 1, 0])


@torch.no_grad()
def knows_at_layer_1():
    """An encoder of which block 1 writes the XOR into a channel and block 2 takes it away again.

    Block 0 leaves tokens that change their sign with the image's colors; XOR does not, so no linear map finds it.
    """
    encoder = PerceptionEncoder(TINY).eval()
    torch.nn.init.zeros_(encoder.patch_embed.proj.weight)
    for channel in (0, 1):
        encoder.patch_embed.proj.weight[channel, channel] = 1 / 256
    for parameter in (encoder.pos_embed, encoder.cls_token):
        parameter.zero_()
    for block in encoder.blocks:
        for parameter in (*block.attn.proj.parameters(), *block.mlp.fc2.parameters()):
            parameter.zero_()
    tokens = torch.zeros(4, 32)
    tokens[:, :2] = CORNERS
    tokens = encoder.norm_pre(tokens)
    for block, sign in ((encoder.blocks[1], 1), (encoder.blocks[2], -1)):
        wanted = torch.zeros(4, 32)
        wanted[:, 5] = sign * 3 * ANSWER
        hidden = torch.nn.functional.gelu(block.mlp.fc1(block.norm2(tokens)))
        block.mlp.fc2.weight.copy_(torch.linalg.lstsq(hidden, wanted).solution.T)
        tokens = tokens + block.mlp(block.norm2(tokens))
    return encoder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a set in ADE20k's layout whose labels are the XOR of two colors, and an encoder's weights."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / "data" / kind / split).mkdir(parents=True)
        for i in range(6):
            bits = rng.integers(0, 2, (4, 5, 2), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
            image = np.concatenate([bits * 255, np.zeros((64, 80, 1), np.uint8)], axis=2)
            # JPEG by the folder's suffix, PNG by content: no loss in the colors
            Image.fromarray(image).save(root / "data" / "images" / split / f"{i}.jpg", format="PNG")
            Image.fromarray((bits[..., 0] ^ bits[..., 1]) + 1).save(root / "data" / "annotations" / split / f"{i}.png")
    torch.save(knows_at_layer_1().state_dict(), root / "encoder.pt")
    return root


@pytest.fixture
def config(project):
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_linear_ade20k.py")
    cfg.model.backbone.update(
        variant=FIELDS, init_cfg=dict(type="Pretrained", checkpoint=str(project / "encoder.pt"))
    )
    cfg.model.data_preprocessor.size = cfg.model.test_cfg.crop_size = (64, 64)
    cfg.model.test_cfg.stride = (43, 16)  # windows on the grid of the patches
    cfg.model.decode_head.update(map_size=(64, 64), num_classes=2)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(project / "data"), metainfo=dict(classes=("wall", "building")))
        for step in loader.dataset.pipeline:
            if "scale" in step:
                step.scale = (99999999, 64)
            if "crop_size" in step:
                step.crop_size = (64, 64)
    cfg.train_cfg.update(max_iters=6, val_interval=6)
    cfg.optim_wrapper.optimizer.lr = 0.03
    cfg.param_scheduler = [dict(type="PolyLR", power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=6)]
    return cfg


class Record(Hook):
    """Keeps the losses, and the head before the first step, which it can also set."""

    def __init__(self, head=None):
        self.head, self.losses = head, []

    def before_train(self, runner):
        if self.head is None:
            self.head = copy.deepcopy(runner.model.decode_head.state_dict())
        runner.model.decode_head.load_state_dict(self.head)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):  # noqa: ARG002
        self.losses.append(float(outputs["loss"].detach()))


def swept(cfg, folder, **options):
    sweep = LayerSweep(cfg, **{"layers": None, "folder": folder, **options})
    sweep.fill()
    for layer in sweep.layers:
        sweep.train(layer)
    return sweep


def test_a_head_on_cached_maps_learns_what_it_learns_on_the_encoder(config, tmp_path):
    # random weights: of the constructed ones most channels are constant, and the norm blows rounding up
    torch.manual_seed(0)
    torch.save(PerceptionEncoder(TINY).state_dict(), tmp_path / "random.pt")
    config.model.backbone.init_cfg.checkpoint = str(tmp_path / "random.pt")
    config.optim_wrapper.optimizer.lr = 0.003
    sweep = LayerSweep(config, layers=[1], folder=tmp_path / "sweep")
    sweep.fill()
    cached = Record()
    assert sweep.train(1, [cached])

    config.model.backbone.out_indices = [1]
    scale = dict(type="Resize", scale=(99999999, 64), keep_ratio=True)
    crop = dict(type="mmcv.CenterCrop", crop_size=(64, 64))
    load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations")]
    config.train_dataloader.dataset.pipeline = [*load, scale, crop, dict(type="PackSegInputs")]
    direct = Record(cached.head)
    runner = Runner(
        model=MODELS.build(config.model),
        work_dir=str(tmp_path / "direct"),
        train_dataloader=config.train_dataloader,
        train_cfg=config.train_cfg,
        optim_wrapper=config.optim_wrapper,
        param_scheduler=config.param_scheduler,
        default_hooks=dict(checkpoint=None),
        custom_hooks=[direct],
        log_level="WARNING",
        randomness=dict(seed=0),
        default_scope="mmseg",
        experiment_name="direct",
    )
    model = runner.train()
    assert len(direct.losses) == 6
    assert_close(torch.tensor(cached.losses), torch.tensor(direct.losses), rtol=1e-5, atol=1e-6)
    assert direct.losses[-1] < direct.losses[0]
    assert_close(sweep._models[1].decode_head.state_dict(), model.decode_head.state_dict(), rtol=1e-4, atol=1e-4)

    scores = sweep.evaluate()[1]
    loader = Runner.build_dataloader(config.val_dataloader)
    evaluator = runner.build_evaluator(config.val_evaluator)
    evaluator.dataset_meta = loader.dataset.metainfo
    with torch.no_grad():
        for batch in loader:
            evaluator.process(model.eval().test_step(batch), batch)
    assert scores == pytest.approx(evaluator.evaluate(len(loader.dataset)), abs=0.1)  # per cent


def test_the_layer_that_holds_the_answer_wins(config, tmp_path):
    sweep = swept(config, tmp_path, epochs=25)
    metrics = sweep.evaluate()
    assert sorted(metrics) == [0, 1, 2]
    assert metrics[1]["mIoU"] > 90
    assert max(metrics[0]["mIoU"], metrics[2]["mIoU"]) < 70
    report = write_report(sweep, metrics, score=None, config="probe.py")
    assert (report["score"], report["best"], report["last"], report["higher_is_better"]) == ("mIoU", 1, 2, True)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_table(report).splitlines()]
    assert [row[-1] for row in table] == ["note", "---", "", "best", "deepest"]
    assert [row[:2] for row in table[2:]] == [["0", "1"], ["1", "2"], ["2", "3"]]
    written = json.loads((tmp_path / "scores.json").read_text())
    assert {int(layer): values for layer, values in written.pop("metrics").items()} == metrics
    assert written == {key: value for key, value in report.items() if key != "metrics"}
    assert Image.open(tmp_path / "scores.png").size == (960, 600)


def test_the_encoder_runs_once_per_image_and_a_stopped_sweep_resumes(config, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_BLOCK_BYTES", 1)  # blocks of one batch of 2
    whole = LayerSweep(config, layers=[0, 2], folder=tmp_path / "whole")
    # two layers of 16 patches and a class token of 32 numbers of four bytes
    assert whole.features.cache.bytes_missing == 6 * 2 * (16 * 32 + 32) * 4
    calls = []
    whole.encoder.patch_embed.register_forward_hook(lambda _, images, __: calls.append(len(images[0])))
    whole.fill()
    assert calls == [2] * 3

    def stop(batches):
        for number, batch in enumerate(batches):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    stopped = LayerSweep(config, layers=[0, 2], folder=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        stopped.fill(stop)
    again = LayerSweep(config, layers=[0, 2], folder=tmp_path / "stopped")
    assert again.features.cache.missing == [2]
    again.fill()
    for name in whole.features.cache.arrays:
        for row in range(6):
            a, b = (one.features.cache.read(name, row) for one in (again, whole))
            assert_close(a, b, rtol=0, atol=0)
    assert not LayerSweep(config, layers=[0, 2], folder=tmp_path / "stopped").features.cache.missing


def test_the_cache_is_for_these_weights_these_images_and_this_reading(config, project, tmp_path):
    def cache(**options):
        return LayerSweep(config, **{"layers": [1], "folder": tmp_path, **options}).features.cache

    first = LayerSweep(config, layers=[1], folder=tmp_path)
    first.fill()
    assert cache().bytes_missing == 0
    more = cache(layers=[1, 2])
    assert [name for name in more.arrays if more.has(name, 0)] == ["layer_01_map", "layer_01_token"]
    with pytest.raises(ConfigError, match=r"image set\.images is 6 there, 3 here"):
        cache(limit=3)
    config.model.backbone.pos_embed_mode = "bicubic"
    with pytest.raises(ConfigError, match=r"geometry\.pos_embed_mode is bilinear there, bicubic here"):
        cache()
    config.model.backbone.pop("pos_embed_mode")

    state = torch.load(project / "encoder.pt")
    state["blocks.2.mlp.fc2.bias"] += 1
    torch.save(state, tmp_path / "after.pt")
    state["blocks.1.mlp.fc2.bias"] += 1
    torch.save(state, tmp_path / "before.pt")
    config.model.backbone.init_cfg.checkpoint = str(tmp_path / "after.pt")
    assert cache().bytes_missing == 0  # block 2 comes after the maps
    config.model.backbone.init_cfg.checkpoint = str(tmp_path / "before.pt")
    with pytest.raises(ConfigError, match=r"the weights of the encoder are others \(layer_01_map, layer_01_token\)"):
        cache()


def test_finished_heads_are_kept_for_the_same_recipe_alone(config, tmp_path):
    first = swept(config, tmp_path, layers=[1, 2])
    again = LayerSweep(config, layers=[1, 2], folder=tmp_path)
    again.fill()
    assert not again.train(1)
    assert not again.train(2)
    assert again.evaluate() == first.evaluate()
    config.optim_wrapper.optimizer.lr = 0.02
    other = LayerSweep(config, layers=[1], folder=tmp_path)
    other.fill()
    assert other.train(1)


def test_labels_are_resized_and_cropped_with_the_image(config, tmp_path):
    sample = LayerSweep(config, layers=[0], folder=tmp_path).features.dataset[3]["data_samples"]
    image = np.asarray(Image.open(Path(config.train_dataloader.dataset.data_root) / "annotations/training/3.png"))
    image = image.astype(int) - 1  # 0 is not labelled
    assert np.array_equal(sample.gt_sem_seg.data[0], image[:, 8:72])  # the middle

    config.model.data_preprocessor.size = (32, 32)
    for loader in (config.train_dataloader, config.val_dataloader):
        for step in loader.dataset.pipeline:
            step.update({"scale": (99999999, 32)} if "scale" in step else {})
            step.update({"crop_size": (32, 32)} if "crop_size" in step else {})
    small = LayerSweep(config, layers=[0], folder=tmp_path / "small").features.dataset[3]["data_samples"]
    assert np.array_equal(small.gt_sem_seg.data[0], image[::2, ::2][:, 4:36])  # resized as the image


def test_epochs_compress_the_schedule(config, tmp_path):
    config.param_scheduler = [
        dict(type="LinearLR", start_factor=0.1, by_epoch=False, begin=0, end=150),
        dict(type="MultiStepLR", milestones=[600, 900], by_epoch=False, begin=150, end=1200),
    ]
    config.train_cfg.max_iters = 1200
    cfg = LayerSweep(config, layers=[0], folder=tmp_path, limit=5, epochs=8).cfg
    assert cfg.train_cfg.max_iters == 24  # 3 batches of 2
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.begin, warm_up.end) == (0, 3)
    assert (steps.begin, steps.end, steps.milestones) == (3, 24, [12, 18])


def test_all_layers_negative_ones_and_wrong_ones(config, tmp_path):
    assert LayerSweep(config, layers=[-1, 0, 2], folder=tmp_path).layers == (0, 2)
    assert LayerSweep(config, layers=None, folder=tmp_path).layers == (0, 1, 2)
    for layers in ([3], [-4], [0, 7], []):
        with pytest.raises(ConfigError, match=r"blocks 0 to 2"):
            LayerSweep(config, layers=layers, folder=tmp_path)


def test_limit_spreads_over_the_list(config, tmp_path):
    def names(**options):
        data = LayerSweep(config, layers=[0], folder=tmp_path / str(options), **options).features.dataset
        return [Path(data.get_data_info(i)["img_path"]).stem for i in range(len(data))]

    assert names(limit=3) == ["0", "2", "5"]
    assert names(limit=99) == [str(i) for i in range(6)]


def test_what_cannot_be_swept_is_refused(config, tmp_path):
    def refused(match, **options):
        with pytest.raises(ConfigError, match=match):
            LayerSweep(config, **{"layers": [0], "folder": tmp_path, **options})

    refused("must be at least 1", limit=0)
    refused("must be at least 1", epochs=0)
    config.launcher = "pytorch"
    refused("runs in one process")
    config.launcher = "none"
    config.model.backbone.lora = dict(rank=2)
    refused("this one trains LoRA adapters; omit backbone.lora")
    config.model.backbone.update(lora=None, variant="pe_spatial_x99")
    refused("cannot be built: .*unknown variant 'pe_spatial_x99'")
    config.model.backbone = dict(type="ResNet", depth=18)
    refused("a LinearProbe cannot be swept; give a config with a PerceptionEncoder")


def test_any_segmenter_is_frozen_and_swept(config, tmp_path):
    config.model.type = "EncoderDecoder"  # mmseg's own, which trains its backbone
    config.model.decode_head = dict(
        type="FCNHead", in_channels=32, in_index=0, channels=8, num_classes=2, norm_cfg=dict(type="BN")
    )
    config.train_cfg.max_iters = 2
    assert set(swept(config, tmp_path, layers=[1]).evaluate()) == {1}


@pytest.fixture
def depth_config(tmp_path):
    """Return `depth_config(name)`: one of NYUv2's configs, small, on four generated pairs."""
    rng = np.random.default_rng(1)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(500, 9000, (70, 90), dtype=np.uint16)).save(tmp_path / f"d{i}.png")
    (tmp_path / "pairs.csv").write_text("rgb,depth\n" + "".join(f"{i}.png,d{i}.png\n" for i in range(4)))

    def build(name):
        cfg = Config.fromfile(REPO / "configs" / f"{name}.py")
        cfg.model.backbone.update(variant=FIELDS, init_cfg=None)
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            loader.update(num_workers=0, persistent_workers=False)
            loader.dataset.update(data_root=str(tmp_path), ann_file="pairs.csv", expected=None)
        cfg.train_cfg.max_iters = 4
        return cfg

    return build


@pytest.mark.parametrize("name", ["pe_spatial_lin1_nyu", "pe_spatial_lin1_dinov2_nyu", "pe_spatial_dpt_single_nyu"])
def test_depth(depth_config, tmp_path, name):
    """Heads with a batch norm, with the class token, and with one layer read four times; maps train as images do."""
    cfg = depth_config(name)
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == "DepthRandomCrop":
            step.size = (64, 80)
    cfg.model.backbone.out_indices = [0]
    sweep = LayerSweep(cfg, layers=[1, 2], folder=tmp_path / "sweep", epochs=2)
    assert sweep.features._size == (64, 80)
    sweep.fill()
    record = Record()
    sweep.train(1, [record])
    sweep.train(2)

    cfg.model.backbone.out_indices = [1]
    model = MODELS.build(cfg.model).train()
    model.backbone.load_state_dict(
        {k: v for k, v in sweep.encoder.state_dict().items() if not k.startswith("blocks.2.")}
    )
    model.decode_head.load_state_dict(record.head)
    order = Runner.build_dataloader(dict(batch_size=2, sampler=cfg.train_dataloader.sampler, dataset=range(4)), seed=0)
    rows = next(iter(order))
    samples = [sweep.features.dataset[int(row)] for row in rows]
    assert {tuple(sample["inputs"].shape) for sample in samples} == {(3, 64, 80)}
    assert {tuple(sample["data_samples"].gt_depth_map.shape) for sample in samples} == {(64, 80)}
    batch = dict(inputs=[s["inputs"] for s in samples], data_samples=[s["data_samples"] for s in samples])
    losses = model(**model.data_preprocessor(batch, True), mode="loss")
    assert float(sum(losses.values())) == pytest.approx(record.losses[0], rel=1e-5)

    metrics = sweep.evaluate()
    assert choose_score(metrics[1]) == ("rmse", False)
    assert metrics[1]["rmse"] != metrics[2]["rmse"]
    assert 0 < metrics[1]["rmse"] < 10


def test_depth_of_several_layers_is_refused(depth_config, tmp_path):
    with pytest.raises(ConfigError, match=r"reads layers \(0, 1, 2, 2\); a sweep needs a head that reads one"):
        LayerSweep(depth_config("pe_spatial_lin4_nyu"), layers=[1], folder=tmp_path)


def test_images_of_two_sizes_are_named(config, tmp_path):
    config.model.data_preprocessor.update(size=None, size_divisor=16)
    steps = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [step for step in steps if step.type != "RandomCrop"]
    assert LayerSweep(config, layers=[0], folder=tmp_path).features._size == (64, 80)
    root = tmp_path / "data"
    shutil.copytree(config.train_dataloader.dataset.data_root, root)
    Image.new("RGB", (112, 64)).save(root / "images" / "training" / "4.jpg", format="PNG")
    Image.new("L", (112, 64), 1).save(root / "annotations" / "training" / "4.png")
    config.train_dataloader.dataset.data_root = str(root)
    with pytest.raises(DatasetError, match=r"reach the model as 64x112 and as 64x80; cached features need one size"):
        LayerSweep(config, layers=[0], folder=tmp_path / "sweep").fill()


def test_the_best_layers_of_several_tasks():
    table = format_best({"depth, a": (3, 5, "rmse", 0.5, 0.625), "tracking, b": (4, 5, "J&F", 80.0, 80.0)})
    assert table.splitlines()[2:] == [
        "| depth, a | 3 | 4 of 5 | rmse | 0.5 | 0.625 |",
        "| tracking, b | 4 | 5 of 5 | J&F | 80 | 80 |",
    ]


def test_scores():
    assert choose_score({"coco/segm_mAP": 0.2, "coco/bbox_mAP": 0.3}) == ("coco/bbox_mAP", True)
    assert choose_score({"depth/d1": 0.5, "depth/rmse": 0.3}) == ("depth/rmse", False)
    assert choose_score({"rmse": 0.3, "d1": 0.5}, "d1") == ("d1", True)
    with pytest.raises(ConfigError, match="score is loss; the config's metrics allow rmse"):
        choose_score({"rmse": 0.3}, "loss")
    with pytest.raises(ConfigError, match="allow none"):
        choose_score({"loss": 0.3})
    scores = {0: 2.0, 1: 1.0, 2: float("nan"), 3: 1.0}
    assert best_layer(scores, higher_is_better=False) == 3
    assert best_layer(scores) == 0


@pytest.mark.slow
def test_command(config, tmp_path, monkeypatch):
    config.dump(tmp_path / "probe.py")
    options = ("--layers", "0,1", "--epochs", "4", "--limit", "4", "--work-dir", "out")
    log = command("sweep_layers", "probe.py", *options, cwd=tmp_path)
    assert "features of 4 images, layers 0, 1, float32 (exact)" in log
    assert re.search(r"\| 1 \| 2 \| [\d.]+ \| [\d.]+ \| [\d.]+ \| .*deepest \|", log)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(scores["metrics"]) == {"0", "1"}
    assert scores["score"] == "mIoU"
    assert scores["schedule"]["max_iters"] == 8
    assert (tmp_path / "out" / "scores.png").is_file()
    assert "layer 1: already trained" in command("sweep_layers", "probe.py", *options, cwd=tmp_path)

    monkeypatch.chdir(tmp_path)
    for options, message in (
        (("--layers", "0,7"), "layers are 0, 7; the encoder has blocks 0 to 2"),
        (("--layers", "0", "--score", "rmse"), "--score is rmse; layers are compared for segmentation by mIoU, mDice"),
    ):
        monkeypatch.setattr(sys, "argv", ["sweep_layers.py", "probe.py", *options])
        with pytest.raises(SystemExit, match=f"^error: {message}"):
            runpy.run_path(str(REPO / "tools" / "sweep_layers.py"), run_name="__main__")


@pytest.mark.mmdet
def test_detectors_learn_on_each_layer_in_windows_of_the_pretraining_grid(tmp_path):
    pytest.importorskip("mmdet")
    root = tmp_path / "world"
    for split, images in (("train", 4), ("val", 2)):
        write_coco(root, images=images, size=(128, 128), split=split)
    cfg = load(REPO / "projects" / "coco_detection" / "synthetic_layers.py")
    cfg.model.backbone.update(variant=FIELDS, frozen_stages=3, init_cfg=None)
    cfg.model.data_preprocessor.pad_size_divisor = 128
    cfg.model.roi_head.bbox_head.num_classes = cfg.model.roi_head.mask_head.num_classes = 2
    for name, split in (("train_dataloader", "train"), ("val_dataloader", "val")):
        cfg[name].batch_size = 2
        cfg[name].dataset.update(data_root=str(root), metainfo=dict(classes=("red", "blue")))
        cfg[name].dataset.ann_file = f"annotations/instances_{split}.json"
    cfg.val_dataloader.dataset.pipeline[1].scale = (128, 128)
    cfg.val_evaluator.ann_file = str(root / "annotations" / "instances_val.json")
    cfg.train_cfg.max_iters = 3
    sweep = LayerSweep(cfg, layers=[0, 2], folder=tmp_path / "out")
    assert sweep.encoder.geometry.window_size == 4  # of 8 x 8 patches
    assert sweep.encoder.geometry.global_attn_indexes == ()
    sweep.fill()
    for layer in sweep.layers:
        assert sweep.train(layer)
    metrics = sweep.evaluate()
    assert choose_score(metrics[0]) == ("coco/bbox_mAP", True)
    report = write_report(sweep, metrics, score=None, config="probe.py")
    assert format_table(report).splitlines()[0].count("|") == 8  # layer twice, four scores, note


@pytest.mark.slow
def test_a_table_of_several_tasks(config, tmp_path):
    """Segmentation on the images, and tracking without training on the videos, in one command."""
    config.work_dir = "seg"
    config.train_cfg.max_iters = 2
    config.dump(tmp_path / "seg.py")
    videos = Config.fromfile(REPO / "configs" / "pe_spatial_zeroshot_davis.py")
    videos.model.backbone.update(variant=FIELDS, init_cfg=None)
    videos.model.size = 96
    root = str(write_davis(tmp_path / "davis"))
    videos.data_root = videos.test_dataloader.dataset.data_root = videos.test_evaluator.ann_dir = root
    videos.test_dataloader.dataset.sequences = None
    videos.dump(tmp_path / "videos.py")
    options = ("--layers", "all", "--work-dir", "out")
    for _ in range(2):  # the second call finds everything done
        log = command("sweep_layers", "seg.py", "videos.py", *options, cwd=tmp_path)
        table = log[log.index("| task | best layer") :].splitlines()
        assert re.fullmatch(r"\| segmentation, seg \| \d \| \d of 3 \| mIoU \| [\d.]+ \| [\d.]+ \|", table[2])
        assert re.fullmatch(r"\| tracking, videos \| \d \| \d of 3 \| J&F \| [\d.]+ \| [\d.]+ \|", table[3])
    assert json.loads((tmp_path / "out" / "videos" / "layers.json").read_text())["layers"].keys() == {"0", "1", "2"}
    assert "already trained" in log
