"""The linear probe: what is frozen, what is learned, how images and labels get in, and a run as a user starts it."""

import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmseg")
from helpers.repository import REPO, command
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, PARAM_SCHEDULERS, init_default_scope

import pe_spatial.segmentation  # noqa: F401  (registers)
from pe_spatial import VARIANTS, EncoderConfig, PerceptionEncoder
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmseg
CONFIG = REPO / "configs" / "pe_spatial_linear_ade20k.py"
SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)


def config(**backbone):
    cfg = Config.fromfile(CONFIG)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(backbone)
    return cfg


@pytest.fixture
def probe(randomize):
    """Return `probe(**backbone)`: the config's model, small, with weights that all matter, in evaluation mode."""

    def build(map_size=(24, 24), **backbone):
        cfg = config(**{"variant": SMALL, "init_cfg": None, **backbone})
        cfg.model.decode_head.map_size = map_size
        model = randomize(MODELS.build(cfg.model))
        model.decode_head.bn.running_mean.uniform_(-1, 1)
        model.decode_head.bn.running_var.uniform_(0.5, 2)
        return model.eval()

    return build


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name.startswith("pe_spatial")])
def test_every_size_is_one_option(variant):
    with torch.device("meta"):
        model = MODELS.build(config(variant=variant).model)
        maps = model.extract_feat(torch.empty(1, 3, 512, 512))
    assert maps[0].shape[-2:] == ((32, 32) if variant.endswith("512") else (37, 37))  # 518 px for patches of 14
    assert model.backbone.config == VARIANTS[variant]
    assert model.decode_head.bn.num_features == model.decode_head.conv_seg.in_channels == VARIANTS[variant].embed_dim
    assert model.decode_head.conv_seg.out_channels == 150
    assert {name.partition(".")[0] for name, p in model.named_parameters() if p.requires_grad} == {"decode_head"}


def test_another_encoder_is_one_option(probe):
    pytest.importorskip("timm")
    model = probe(variant="timm:test_vit.r160_in1k", out_indices=[2])
    assert model.decode_head.bn.num_features == 64
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.inference(torch.randn(1, 3, 512, 520), [dict(ori_shape=(512, 520))]).shape == (1, 150, 512, 520)


@pytest.mark.parametrize("layer", [-1, 0, 2])
def test_logits_are_a_linear_function_of_the_layer_brought_to_the_size(probe, layer):
    """The paper's order (resize, then norm and linear map) gives the same as ours."""
    model = probe(out_indices=[layer])
    core = PerceptionEncoder(EncoderConfig(**SMALL), out_indices=(layer,)).eval()
    core.load_state_dict(model.backbone.state_dict())
    images = torch.randn(2, 3, 64, 96)
    features = F.interpolate(core(images)[0], (24, 24), mode="bilinear")
    bn, linear = model.decode_head.bn, model.decode_head.conv_seg
    normed = (features - bn.running_mean[:, None, None]) / (bn.running_var[:, None, None] + bn.eps).sqrt()
    normed = normed * bn.weight[:, None, None] + bn.bias[:, None, None]
    expected = torch.einsum("bchw,kc->bkhw", normed, linear.weight[:, :, 0, 0]) + linear.bias[:, None, None]
    assert_close(model.decode_head(model.extract_feat(images)), expected, rtol=1e-4, atol=1e-4)


def test_patches_that_do_not_fit_get_zeros_on_all_sides(probe):
    model = probe(variant=dict(SMALL, img_size=56, patch_size=14))
    images = torch.randn(1, 3, 64, 65)
    padded = torch.zeros(1, 3, 70, 70)
    padded[:, :, 3:67, 2:67] = images
    assert_close(model.extract_feat(images), model.backbone(padded))
    assert_close(model.extract_feat(padded), model.backbone(padded))


def test_training_moves_the_head_alone(probe):
    model = probe(variant=dict(SMALL, init_values=0.1), drop_path_rate=0.5).train()
    assert not any(module.training for module in model.backbone.modules())
    assert model.decode_head.bn.training
    state = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    assert_close(model.extract_feat(images), model.extract_feat(images), rtol=0, atol=0)  # no drop path
    maps = model.extract_feat(images)
    assert not maps[0].requires_grad
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.decode_head(maps).square().mean().backward()
    optimizer.step()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    bn = {f"decode_head.bn.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert moved == bn | {"decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    model.eval()
    one, both = model.decode_head(model.extract_feat(images[:1])), model.decode_head(model.extract_feat(images))
    assert_close(one, both[:1], rtol=1e-4, atol=1e-4)  # the running statistics, not the batch's


def test_adapters_train_beside_the_head(probe):
    model = probe(lora=dict(rank=2)).train()
    model.decode_head(model.extract_feat(torch.randn(2, 3, 64, 64))).square().mean().backward()
    found = {name for name, p in model.named_parameters() if p.grad is not None}
    head = {"decode_head.bn.weight", "decode_head.bn.bias", "decode_head.conv_seg.weight", "decode_head.conv_seg.bias"}
    assert found == head | {name for name, _ in model.named_parameters() if ".lora_" in name}


def test_windows_cover_the_image_every_341_pixels(probe):
    model = probe()
    assert (model.test_cfg.mode, model.test_cfg.crop_size, model.test_cfg.stride) == ("slide", (512, 512), (341, 341))
    model.test_cfg.update(crop_size=(64, 64), stride=(43, 43))
    images = torch.randn(1, 3, 64, 107)
    got = model.inference(images, [dict(img_shape=(64, 107), ori_shape=(64, 107))])
    total, count = torch.zeros(1, 150, 64, 107), torch.zeros(1, 1, 64, 107)
    for x in (0, 43):
        logits = model.decode_head(model.extract_feat(images[..., x : x + 64]))
        total[..., x : x + 64] += F.interpolate(logits, (64, 64), mode="bilinear")
        count[..., x : x + 64] += 1
    assert_close(got, total / count, rtol=1e-4, atol=1e-4)


def test_preprocessing_is_that_of_the_encoder():
    preprocess = MODELS.build(config().model.data_preprocessor)
    image = torch.stack([torch.full((512, 512), value) for value in (0, 127, 255)]).byte()  # B, G, R
    out = preprocess(dict(inputs=[image], data_samples=None))["inputs"]
    assert_close(out[0, :, 0, 0], torch.tensor([1.0, 127 / 127.5 - 1, -1.0]))


def test_several_layers_and_a_given_width_are_refused(probe):
    with pytest.raises(ConfigError, match=r"reads one layer but out_indices is \(1, 3\)"):
        probe(out_indices=[1, -1])
    cfg = config(variant=SMALL)
    cfg.model.decode_head.in_channels = 32
    with pytest.raises(ConfigError, match="follows from the encoder"):
        MODELS.build(cfg.model)


def test_recipe():
    cfg = config()
    assert cfg.optim_wrapper.optimizer == dict(type="AdamW", lr=1e-3, betas=(0.9, 0.999), weight_decay=1e-4)
    assert cfg.train_cfg.max_iters == 40000
    assert cfg.train_dataloader.batch_size * 8 == cfg.auto_scale_lr.base_batch_size == 16
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedules = [  # at a hundredth of the length
        PARAM_SCHEDULERS.build({**s, "begin": s.begin // 100, "end": s.end // 100, "optimizer": optimizer})
        for s in cfg.param_scheduler
    ]
    rates = []
    for _ in range(400):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert rates[0] == pytest.approx(1e-6)
    assert rates[7] == pytest.approx((1 - 7 / 400) * 7 / 14, rel=1e-2)
    assert rates[200] == pytest.approx(0.5, rel=5e-3)
    assert rates[-1] < 1e-2


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a set in ADE20k's layout, a config and the encoder's weights."""
    root = tmp_path_factory.mktemp("project")
    rng = np.random.default_rng(0)
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (root / "data" / kind / split).mkdir(parents=True)
        for i in range(4):
            labels = np.zeros((64, 80), np.uint8)  # 0 is not labelled
            labels[8:40, 8:40], labels[30:60, 40:76] = 1, 2  # wall, building
            image = np.array([[90, 90, 90], [250, 20, 20], [20, 20, 250]], np.uint8)[labels]
            image = np.clip(image + rng.integers(-20, 20, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(root / "data" / "images" / split / f"{i}.jpg")
            Image.fromarray(labels).save(root / "data" / "annotations" / split / f"{i}.png")
    torch.manual_seed(0)
    torch.save(PerceptionEncoder(EncoderConfig(**SMALL)).state_dict(), root / "encoder.pt")
    cfg = Config.fromfile(CONFIG)
    cfg.model.backbone.update(variant=SMALL, init_cfg=dict(type="Pretrained", checkpoint=str(root / "encoder.pt")))
    cfg.model.data_preprocessor.size = cfg.model.test_cfg.crop_size = (64, 64)
    cfg.model.test_cfg.stride = (43, 43)
    cfg.model.decode_head.map_size = (70, 70)
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        for step in loader.dataset.pipeline:
            if "scale" in step:
                step.scale = (99999999, 64)
            if "crop_size" in step:
                step.crop_size = (64, 64)
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.default_hooks.logger.interval = 1
    cfg.dump(root / "tiny.py")
    return root


@pytest.mark.slow
def test_commands_train_and_evaluate(project):
    log = command("train", "tiny.py", "--data-root", "data", "--work-dir", "run", cwd=project)
    assert "Iter(train) [2/2]" in log
    assert re.search(r"mIoU: +\d", log)
    assert len(re.findall(r"\| +(wall|building) +\| +\d", log)) == 2
    state = torch.load(project / "run" / "iter_2.pth", weights_only=False)["state_dict"]
    for name, value in torch.load(project / "encoder.pt").items():
        assert_close(state[f"backbone.{name}"], value, rtol=0, atol=0)
    assert state["decode_head.bn.num_batches_tracked"] == 2
    options = ("--data-root", "data", "--work-dir", "test", "--out", "out.pkl")
    log = command("test", "tiny.py", "run/iter_2.pth", *options, cwd=project)
    assert re.search(r"mIoU: +\d", log)
    assert (project / "out.pkl").is_file()


@pytest.fixture
def dataset(project):
    def build(root=project / "data"):
        cfg = Config.fromfile(project / "tiny.py")
        init_default_scope(cfg.default_scope)
        cfg.val_dataloader.dataset.data_root = str(root)
        return DATASETS.build(cfg.val_dataloader.dataset)

    return build


def test_label_zero_is_ignored_and_labels_keep_their_size(dataset):
    item = dataset()[0]
    labels = item["data_samples"].gt_sem_seg.data
    assert item["inputs"].shape == (3, 64, 80)
    assert labels.shape == (1, 64, 80)
    assert labels.unique().tolist() == [0, 1, 255]
    assert labels[0, 0, 0] == 255
    assert labels[0, 20, 20] == 0


@pytest.mark.parametrize("gone", ["images/validation", "annotations/validation/2.png", "images/validation/*.jpg"])
def test_missing_data_are_one_sentence(project, tmp_path, monkeypatch, gone):
    shutil.copytree(project / "data", tmp_path / "data")
    for path in (tmp_path / "data").glob(gone):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    monkeypatch.chdir(project)
    arguments = ["train.py", "tiny.py", "--data-root", str(tmp_path / "data"), "--work-dir", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(REPO / "tools" / "train.py"), run_name="__main__")
    assert end.value.code.startswith("error: ")
    assert gone.rpartition("*")[0].rstrip("/") in end.value.code
    assert "\n" not in end.value.code


def damage(name):
    """Return a function that writes a label map of a kind that cannot be trained on."""
    labels = np.ones((64, 80), np.uint8)
    if name == "value":
        labels[5, 7] = 200
    if name == "size":
        labels = labels[:60]
    image = Image.fromarray(labels)
    if name == "colors":
        image = image.convert("RGB")

    def write(path):
        image.save(path)
        if name == "truncated":
            path.write_bytes(path.read_bytes()[:60])

    return write


DAMAGED = {
    "value": r"2\.png .* label 200.* 150 classes",
    "size": r"2\.png is 60x80 .* 64x80",
    "colors": r"2\.png has 3 channels",
    "truncated": r"2\.png.* cannot be decoded",
}


@pytest.mark.parametrize("kind", DAMAGED)
@pytest.mark.parametrize("split", ["training", "validation"])
def test_label_maps_that_cannot_be_used_are_named(project, tmp_path, kind, split):
    root = tmp_path / "data"
    shutil.copytree(project / "data", root)
    damage(kind)(root / "annotations" / split / "2.png")
    cfg = Config.fromfile(project / "tiny.py")
    init_default_scope(cfg.default_scope)
    loader = cfg.train_dataloader if split == "training" else cfg.val_dataloader
    loader.dataset.data_root = str(root)
    dataset = DATASETS.build(loader.dataset)
    assert dataset[1] is not None
    with pytest.raises(DatasetError, match=DAMAGED[kind]):
        dataset[2]


def test_hidden_images_are_skipped(project, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(project / "data", root)
    for name in ("._0.jpg", ".ipynb_checkpoints/0-checkpoint.jpg"):
        path = root / "images" / "validation" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    cfg = Config.fromfile(project / "tiny.py")
    init_default_scope(cfg.default_scope)
    cfg.val_dataloader.dataset.data_root = str(root)
    assert len(DATASETS.build(cfg.val_dataloader.dataset)) == 4
