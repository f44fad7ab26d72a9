"""Training on cached features is training: the same losses and weights, to the last bit."""

import copy
import errno
import shutil

import pytest
import torch

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from helpers.configs import load
from helpers.repository import CONFIGS
from helpers.tiny_run import losses
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS

from pe_spatial.engine import feature_cache
from pe_spatial.engine.cached_training import CachedFeatures, CacheOptions, frozen_encoder, input_transform
from pe_spatial.engine.recipe import cache_features, read_as_in_testing
from pe_spatial.engine.runner import build_runner, prepare_loaders
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
ENCODER = dict(img_size=64, patch_size=16, embed_dim=32, depth=3, num_heads=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    for split, images in (("train", 6), ("val", 2)):
        write_coco(root, images=images, size=(64, 64), split=split)
    torch.manual_seed(0)
    encoder = MODELS.build(dict(type="PerceptionEncoder", variant=ENCODER))
    torch.save(encoder.state_dict(), root / "encoder.pt")
    return root


@pytest.fixture
def config(world, tmp_path):
    """A small Mask R-CNN on a frozen encoder of random weights, float32, without augmentation."""
    cfg = load(CONFIGS / "pe_demo_cascade_synthetic.py")
    weights = dict(type="Pretrained", checkpoint=str(world / "encoder.pt"))
    cfg.model.backbone.update(variant=ENCODER, frozen_stages=3, init_cfg=weights)
    cfg.model.data_preprocessor.pad_size_divisor = 64
    for head in (*cfg.model.roi_head.bbox_head, cfg.model.roi_head.mask_head):
        head.num_classes = 2
    for name, split in (("train_dataloader", "train"), ("val_dataloader", "val")):
        dataset = cfg[name].dataset
        dataset.update(data_root=str(world), metainfo=dict(classes=("red", "blue")))
        dataset.ann_file = f"annotations/instances_{split}.json"
        cfg[name].batch_size = 2
    cfg.val_dataloader.dataset.pipeline[1].scale = (64, 64)
    cfg.optim_wrapper.type = "OptimWrapper"
    cfg.train_cfg.update(max_iters=5, val_interval=100)
    cfg.param_scheduler = []
    cfg.work_dir = str(tmp_path / "run")
    cfg.log_level = "WARNING"
    read_as_in_testing(cfg)
    for name in ("val_dataloader", "val_evaluator", "val_cfg", "test_dataloader", "test_evaluator", "test_cfg"):
        cfg[name] = None
    cfg.default_hooks.checkpoint = None
    return cfg


def trained(cfg, folder=None, **options):
    """Return the losses of a run, and its weights."""
    cfg = copy.deepcopy(cfg)
    if folder:
        cache_features(cfg, str(folder), **options)
    cfg.experiment_name = f"{cfg.work_dir}_{folder}_{options}"
    runner = build_runner(cfg)
    found = losses(runner)
    runner.train()
    return found, runner.model.state_dict(), runner


def features(cfg, folder, **options):
    """Return the features of a config as the hook makes them."""
    prepare_loaders(cfg)
    torch.manual_seed(1)
    model = MODELS.build(cfg.model).train()
    model.backbone.init_weights()
    dataset = DATASETS.build(cfg.train_dataloader.dataset)
    return CachedFeatures(
        model, dataset, CacheOptions(folder=folder, **options), transform=input_transform(cfg), batch_size=2
    )


def test_training_on_the_cache_is_training_to_the_last_bit(config, tmp_path):
    expected, weights, _ = trained(config)
    assert len(expected) == 5
    for _ in range(2):  # the second run reads what the first one wrote
        found, same, runner = trained(config, tmp_path / "maps")
        assert found == expected
        assert all(torch.equal(same[name], value) for name, value in weights.items())
    calls: list[int] = []
    runner.model.backbone.encoder.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    runner.model.train_step(next(iter(runner.train_dataloader)), runner.optim_wrapper)
    assert not calls
    image = DATASETS.build(config.train_dataloader.dataset)[0]
    runner.model.test_step(pseudo_collate([image]))  # evaluation brings no features, so the encoder runs
    assert calls


def test_a_killed_writer_loses_one_block_and_several_write_together(config, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "_BLOCK_BYTES", 1)  # blocks of one batch
    one = features(config, tmp_path / "maps")
    assert (one.cache.blocks, one.cache.missing, one.cache.bytes_missing) == (3, [0, 1, 2], 6 * 32 * 17 * 4)

    def stop(batches):
        for number, batch in enumerate(batches):
            if number == 2:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        one.fill(stop)
    other = features(config, tmp_path / "maps")
    assert other.cache.missing == [2]
    read = []
    other.fill(lambda batches: (read.append(1) or batch for batch in batches))
    assert len(read) == 1
    assert not one.cache.missing
    whole = features(config, tmp_path / "whole")
    whole.fill()
    for row in range(6):
        assert torch.equal(one.cache.read("layer_02_map", row), whole.cache.read("layer_02_map", row))


def test_a_full_disk_is_one_sentence(config, tmp_path, monkeypatch):
    one = features(config, tmp_path / "maps")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_cache.Path, "open", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*maps/layer_02_map/000000.bin'"):
        one.fill()
    monkeypatch.undo()
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ConfigError, match=r"need 0.0 GB more, but .* choose fewer layers"):
        features(config, tmp_path / "maps")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_smaller_types_are_close_and_say_how_close(config, tmp_path, dtype):
    exact, small = features(config, tmp_path / "exact"), features(config, tmp_path / dtype, dtype=dtype)
    for one in (exact, small):
        one.fill()
    name = "layer_02_map"
    a, b = (torch.stack([one.cache.read(name, row) for row in range(6)]) for one in (exact, small))
    error = float((a - b).square().mean().sqrt() / a.square().mean().sqrt())
    assert 0 < error < 0.01
    assert error == pytest.approx(small.error, rel=0.3)
    assert f"{dtype} (relative error" in small.describe()
    assert "float32 (exact)" in exact.describe()
    sizes = [one.cache.path(name, 0).stat().st_size for one in (exact, small)]
    assert sizes[1] == (sizes[0] // 2 if dtype != "int8" else sizes[0] // 4 + 6 * 32 * 4)


def test_a_cache_of_something_else_is_refused_with_the_reason(config, world, tmp_path):
    folder = tmp_path / "maps"
    features(config, folder).fill()

    def refused(match, cfg, **options):
        with pytest.raises(ConfigError, match=match):
            features(cfg, folder, **options)

    remedy = r".*; use those settings, give another folder, such as .*maps_2, or delete it"
    refused(rf"stored as is float32 there, float16 here{remedy}", config, dtype="float16")
    other = copy.deepcopy(config)
    other.model.backbone.pos_embed_mode = "bicubic"
    refused(rf"geometry.pos_embed_mode is bilinear there, bicubic here{remedy}", other)
    other = copy.deepcopy(config)
    state = torch.load(world / "encoder.pt")
    state["blocks.1.mlp.fc2.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    other.model.backbone.init_cfg.checkpoint = str(tmp_path / "other.pt")
    refused(rf"the weights of the encoder are others \(layer_02_map, layer_02_token\){remedy}", other)
    other = copy.deepcopy(config)
    other.train_dataloader.dataset.indices = 5
    refused("image set.images is 6 there, 5 here", other)
    other = copy.deepcopy(config)
    other.model.data_preprocessor.mean = [100.0] * 3
    refused("input.transform is ", other)
    copied = tmp_path / "world"
    shutil.copytree(world, copied, copy_function=shutil.copy)  # with new times: these may be other images
    other = copy.deepcopy(config)
    other.train_dataloader.dataset.data_root = str(copied)
    refused("image set.files is ", other)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.jpg").touch()
    with pytest.raises(ConfigError, match="is not a folder of features"):
        features(config, tmp_path / "mine")


def test_damage_is_found(config, tmp_path):
    one = features(config, tmp_path)
    one.fill()
    path = one.cache.path("layer_02_map", 0)
    whole = path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(DatasetError, match=r"000000.bin is damaged; delete"):
        features(config, tmp_path)
    path.write_bytes(whole[:-1])
    assert features(config, tmp_path).cache.missing == [0]
    (tmp_path / "about.json").write_text("{")
    with pytest.raises(DatasetError, match=r"about.json is damaged"):
        features(config, tmp_path)


def test_layers_are_added_to_a_cache(config, tmp_path):
    config.model.backbone.out_indices = [1]
    config.model.backbone.frozen_stages = 2
    features(config, tmp_path).fill()
    config.model.backbone.update(out_indices=[2], frozen_stages=3)
    both = features(config, tmp_path)
    assert both.cache.missing
    both.fill()
    config.model.backbone.update(out_indices=[1], frozen_stages=2)
    assert not features(config, tmp_path).cache.missing


def test_what_cannot_be_honored_is_refused(config, tmp_path):
    def refused(match, **options):
        with pytest.raises(ConfigError, match=match):
            features(config, tmp_path, **options)

    pipeline = config.train_dataloader.dataset.pipeline
    refused("4 views of an image are equal: nothing augments it", views=4)
    refused("0 views", views=0)
    refused("the type of cached features is 'int4'; allowed are 'float32'", dtype="int4")
    config.train_dataloader.dataset.pipeline = [*pipeline[:-1], dict(type="RandomFlip", prob=0.5), pipeline[-1]]
    refused(r"augmented at random \(RandomFlip\).*--cache-views K\), or read them without \(--no-augmentation\)")
    config.train_dataloader.dataset.pipeline = pipeline
    config.model.backbone.frozen_stages = 2
    refused(r"12 parameters of the encoder are trained \(such as blocks.2.*freeze the encoder: --freeze 3")
    config.model.backbone.update(frozen_stages=-1, lora=dict(rank=2))
    refused("the encoder trains LoRA adapters")
    with pytest.raises(ConfigError, match="a Linear has no encoder of this package"):
        frozen_encoder(torch.nn.Linear(1, 1))


def test_views_are_fixed_augmentations_and_labels_follow(config, tmp_path):
    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [*pipeline[:-1], dict(type="RandomFlip", prob=0.5), pipeline[-1]]
    one = features(config, tmp_path, views=3)
    one.fill()
    assert one.cache.rows == 18
    data = one.samples()
    flips, before = set(), torch.get_rng_state()
    for _ in range(12):
        item = data[2]
        flipped = item["data_samples"].flip
        _, exact = one._encode([item, item])
        assert torch.equal(item["cached_features"]["layer_02_map"], exact["layer_02_map"][0])
        flips.add(flipped)
    assert flips == {True, False}
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.slow
def test_deterministic_runs_views_and_workers_on_the_cache(config, tmp_path):
    from pe_spatial.engine.determinism import make_deterministic

    pipeline = config.train_dataloader.dataset.pipeline
    config.train_dataloader.dataset.pipeline = [*pipeline[:-1], dict(type="RandomFlip", prob=0.5), pipeline[-1]]
    make_deterministic(config, 0)
    first = trained(config, tmp_path / "maps", views=2)[0]
    config.train_dataloader.num_workers = 1
    config.work_dir += "_2"
    assert trained(config, tmp_path / "maps", views=2)[0] == first
