"""Every config builds, and says what its header and the released recipe say."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.repository import CONFIGS

pytest.importorskip("mmdet")
from helpers.configs import load
from helpers.golden import read_json
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import HOOKS, MODELS
from safetensors.torch import load_file

from pe_spatial import VARIANTS
from pe_spatial.convert.converter import convert
from pe_spatial.encoder.files import CheckpointFile
from pe_spatial.encoder.variants import DETECTOR_PIXELS, VITDET_RECIPES, get_config

pytestmark = pytest.mark.mmdet
COCO = sorted(path for path in CONFIGS.glob("*_coco*.py"))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_header_names_command_hardware_cost_and_expectation(path):
    header = re.match(r"(#.*\n)+", path.read_text())[0]
    assert all(f"#   {word} " in header for word in ("command", "hardware", "cost", "expected"))


@pytest.mark.parametrize("path", COCO, ids=lambda path: path.stem)
def test_builds_at_full_width(path):
    cfg = load(path)
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    encoder, expected = model.backbone.encoder, VARIANTS[cfg.model.backbone.variant]
    assert encoder.config == expected
    assert encoder.patch_size == 16
    assert encoder.geometry.window_size == 32 == encoder.config.grid_size
    assert encoder.geometry.global_attn_indexes == VITDET_RECIPES[expected.depth].global_attn_indexes
    assert encoder.blocks[-1].drop_path == pytest.approx(VITDET_RECIPES[expected.depth].drop_path_rate)
    norms = [m for m in model.roi_head.modules() if type(m).__name__ == "ChannelLayerNorm"]
    assert norms
    assert {norm.eps for norm in norms} == {1e-6}
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="released")


@pytest.mark.parametrize("variant", ["pe_spatial_t16_512", "pe_core_l14_336"])
def test_variant_is_one_option(variant):
    cfg = load(CONFIGS / "pe_spatial_cascade_coco.py")
    cfg.merge_from_dict({"model.backbone.variant": variant})
    with torch.device("meta"):
        assert MODELS.build(cfg.model).backbone.encoder.embed_dim == VARIANTS[variant].embed_dim


# file (Meta's, or what Detectron2 would write) -> config
CONTRACTS = {
    "mask_rcnn_PEspatial_G_coco36ep": "pe_spatial_maskrcnn_coco_g14",
    "mask_rcnn_PEcore_G_coco75ep": "pe_core_maskrcnn_coco_g14",
    "mask_rcnn_PEspatial_G_lvis75ep": "pe_spatial_maskrcnn_lvis_g14",
    "mask_rcnn_PEcore_G_lvis75ep": "pe_core_maskrcnn_lvis_g14",
    "unreleased_cascade_PEspatial_G_coco": "pe_spatial_cascade_coco_g14",
    "unreleased_cascade_PEspatial_G_lvis": "pe_spatial_cascade_coco_g14",
}


@pytest.mark.parametrize("name", CONTRACTS)
def test_released_file_fills_the_config_and_nothing_is_left_over(golden, name):
    contract = read_json(golden / f"maskrcnn/contract_{name}.json")
    cfg = load(CONFIGS / f"{CONTRACTS[name]}.py")
    if name == "unreleased_cascade_PEspatial_G_lvis":
        lvis = load(CONFIGS / "pe_spatial_maskrcnn_lvis_g14.py").model.roi_head
        for head in cfg.model.roi_head.bbox_head:
            head.num_classes = lvis.bbox_head.num_classes
            head.loss_cls = lvis.bbox_head.loss_cls
        cfg.model.roi_head.mask_head.num_classes = lvis.mask_head.num_classes
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in contract["keys"].items()}
        model = MODELS.build(cfg.model)
    done = convert(CheckpointFile(Path(name), state), "mmdet")
    assert set(done.dropped.values()) == {"rotary constants, computed here"}
    shapes = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert {key: tuple(value.shape) for key, value in done.state.items()} == shapes
    assert len(shapes) + len(done.dropped) == len(contract["keys"])


def test_released_recipe():
    cfg = load(CONFIGS / "pe_spatial_maskrcnn_coco_g14.py")
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.lr, optimizer.weight_decay, tuple(optimizer.betas)) == (5e-5, 0.1, (0.9, 0.999))
    assert cfg.optim_wrapper.paramwise_cfg == dict(layer_decay_rate="vitdet", decay_norm_bias=True)
    assert VITDET_RECIPES[50].layer_decay_rate == 0.9
    assert cfg.train_cfg.max_iters == 66375
    warmup, steps = cfg.param_scheduler
    assert (warmup.start_factor, warmup.end) == (0.001, 90)
    assert list(steps.milestones) == [59000, 63916]


def test_preprocessing_pads_squares_with_zeros_after_normalisation():
    cfg = load(CONFIGS / "pe_spatial_cascade_coco.py")
    preprocess = MODELS.build(cfg.model.data_preprocessor)
    image = torch.full((3, 100, 60), 254, dtype=torch.uint8)
    out = preprocess(dict(inputs=[image], data_samples=None))["inputs"]
    assert out.shape == (1, 3, 1024, 1024)
    assert out[0, :, 99, 59].tolist() == [1.0, 1.0, 1.0]
    assert out[0, :, 100:].abs().max() == 0
    assert out[0, :, :, 60:].abs().max() == 0


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_pixels_are_normalized_as_the_encoder_or_the_released_detector_was_trained(path):
    model = load(path).model
    preprocessor, backbone = model.get("data_preprocessor"), model.get("backbone")
    if not preprocessor or backbone.get("geometry") == "deta":  # trackers normalize in the model; DETA as ImageNet
        return
    pe = get_config(backbone.variant)
    detector = (DETECTOR_PIXELS,) * 3
    expected = (detector, detector) if backbone.get("geometry") == "vitdet" else (pe.mean, pe.std)
    assert (tuple(preprocessor.mean), tuple(preprocessor.std)) == expected
    assert preprocessor.bgr_to_rgb


def test_demo_starts_from_the_encoder_that_the_package_ships():
    cfg = load(CONFIGS / "pe_demo_cascade_synthetic.py")
    assert cfg.model.backbone.init_cfg == dict(type="Pretrained", checkpoint="released")
    shipped = CONFIGS.parent / "pe_spatial" / "synthetic" / f"{cfg.model.backbone.variant}.safetensors"
    assert shipped.stat().st_size <= 5_000_000
    backbone = MODELS.build(cfg.model).backbone
    backbone.init_weights()
    weights = load_file(shipped)
    state = backbone.encoder.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[name], weights[name].float()) for name in state)


@pytest.mark.parametrize("first", ["coco/bbox_mAP", "lvis/bbox_AP"])
def test_detectors_keep_the_best_checkpoint_by_box_ap(first, tmp_path):
    cfg = load(CONFIGS / "pe_spatial_cascade_coco.py")
    hook = HOOKS.build(dict(cfg.default_hooks.checkpoint, out_dir=str(tmp_path)))
    saved, message_hub = [], MessageHub(first)
    runner = SimpleNamespace(
        epoch=0,
        work_dir=str(tmp_path),
        message_hub=message_hub,
        logger=MMLogger.get_current_instance(),
        save_checkpoint=lambda _, filename, **options: saved.append((filename, options["save_optimizer"])),
    )
    hook.before_train(runner)
    for runner.iter, score in enumerate((0.1, 0.3, float("nan"), 0.2)):
        hook.after_val_epoch(runner, {first: score, "other": 1 - score})
    names = [f"best_{first.replace('/', '_')}_iter_{i}.pth" for i in (0, 1)]
    assert saved == [(name, False) for name in names]
