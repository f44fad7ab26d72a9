"""The swap: feature specs, what stays, what follows the new backbone, what is refused, and written configs."""

import copy
import json
import runpy
import sys
import warnings

import pytest
import torch
from helpers.repository import REPO

pytest.importorskip("mmdet")
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from pe_spatial import VARIANTS
from pe_spatial.engine.configs import installed_config, read_config
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.swap import check, probe
from pe_spatial.integrations.swap.check import changed_keys, check_family
from pe_spatial.integrations.swap.policy import count_parameters, plan_swap, swap_backbone
from pe_spatial.integrations.swap.probe import Level, probe_backbone
from pe_spatial.integrations.swap.write import difference, write_swapped

pytestmark = pytest.mark.mmdet
SMALL = dict(img_size=64, patch_size=16, embed_dim=64, depth=4, num_heads=2)
B16 = "pe_spatial_b16_512"

A = [(256, 4), (512, 8), (1024, 16), (2048, 32)]
# config -> maps, and the indices of those that nobody reads
FEATURE_SPECS = {
    "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": (A, ()),
    "mmdet::atss/atss_r50_fpn_1x_coco.py": (A, (0,)),
    "mmdet::detr/detr_r50_8xb2-150e_coco.py": ([(2048, 32)], ()),
    "mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py": ([(64, 4), (128, 8), (256, 16), (512, 32)], (0, 1, 2)),
    "mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py": ([(1024, 16)], ()),
    "mmdet::ssd/ssd300_coco.py": ([(512, 8), (1024, 16)], ()),
    "mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py": ([(256, 8), (512, 16), (1024, 32)], ()),
    "mmdet::yolox/yolox_s_8xb8-300e_coco.py": ([(128, 8), (256, 16), (512, 32)], ()),
    "mmdet::cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py": ([(256, 4), (256, 4)], ()),
    "mmdet::detectors/detectors_cascade-rcnn_r50_1x_coco.py": (A, ()),
    "mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py": (
        [(96, 4), (192, 8), (384, 16), (768, 32)], (),
    ),
    "mmdet::clrnet/clrnet.py": (A, (3,)),
    "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py": (A, ()),
    "mmdet::qdtrack/qdtrack_faster-rcnn_r50_fpn_8xb2-4e_mot17halftrain_test-mot17halfval.py": (A, ()),
    "mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py": (
        [(96, 4), (192, 8), (384, 16), (768, 32)], (),
    ),
    "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py": (
        [(256, 4), (512, 8), (1024, 8), (2048, 8)], (0, 1),
    ),
    "mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-40k_cityscapes-512x1024.py": (
        [(256, 4), (512, 8), (1024, 8), (2048, 8)], (1,),
    ),
    "mmseg::encnet/encnet_r50-d8_4xb2-40k_cityscapes-512x1024.py": (  # its in_index names more than the head reads
        [(256, 4), (512, 8), (1024, 8), (2048, 8)], (0, 1),
    ),
    "mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py": (A, ()),
    "mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py": (
        [(1024, 16), (512, 8), (256, 4), (128, 2), (64, 1)], (0, 1, 2),
    ),
    # batch norm in the neck, on levels of one cell where images are small
    "mmdet::nas_fpn/retinanet_r50_nasfpn_crop640-50e_coco.py": (A, (0,)),
    "mmseg::fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py": ([(64, 8), (128, 32), (128, 8)], ()),
    "mmseg::pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py": ([(64, 8), (128, 8), (64, 8)], ()),
    "mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py": ([(384, 16)], ()),
}  # fmt: skip


def config(name):
    pytest.importorskip(name.partition("::")[0])
    try:
        path = installed_config(name)
    except ConfigError as error:  # in CI a skip is a failure
        pytest.skip(str(error))
    return Config.fromfile(path, import_custom_modules=False)


@pytest.fixture(scope="module", autouse=True)
def probe_once():
    """Probe equal backbones once: most tests start from the same few configs, and most time went into this."""
    levels = {}

    def cached(cfg, **options):
        key = json.dumps([cfg, options], default=str)
        if key not in levels:
            levels[key] = probe_backbone(cfg, **options)
        return list(levels[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe, "probe_backbone", cached)
        yield


def core(model):
    """Return the part of a model that has the backbone."""
    while "detector" in model:
        model = model["detector"]
    return model


@pytest.mark.parametrize("name", FEATURE_SPECS, ids=lambda name: name.split("/")[1][:30])
def test_feature_specs_are_found_and_kept(name):
    feature_specs, unused = FEATURE_SPECS[name]
    cfg = config(name)
    before = copy.deepcopy(cfg.to_dict())
    plan = plan_swap(cfg, SMALL, checkpoint=None)
    assert cfg.to_dict() == before
    assert list(plan.feature_specs) == [Level(*level) for level in feature_specs]
    assert plan.unused == unused
    differs = ["neck"] if "detectors" in name else []
    assert changed_keys(cfg, plan.cfg) == differs

    with torch.device("meta"):  # shapes, and which parameters get a gradient, do not depend on numbers
        backbone = MODELS.build(core(plan.cfg.model).backbone)
        out = backbone(torch.randn(1, 3, 70, 100))
    assert [tuple(x.shape) for x in out] == [(1, c, -(-70 // s), -(-100 // s)) for c, s in feature_specs]
    sum(x.sum() for x in out).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


STEPS = {
    "mmdet": ["atss", "cornernet", "detectors", "detr", "faster_rcnn", "mask2former", "mask_rcnn", "soft_teacher",
              "ssd", "yolo", "yolof", "yolox"],
    "mmseg": ["fastscnn", "pidnet", "pspnet", "segformer", "segmenter", "unet", "upernet"],
}  # fmt: skip


def test_other_encoders_come_with_their_own_statistics_and_patch():
    pytest.importorskip("timm")
    plan = plan_swap(config(ATSS), "timm:vit_small_patch14_dinov2.lvd142m")
    assert plan.cfg.model.data_preprocessor.mean == [123.675, 116.28, 103.53]
    assert plan.cfg.model.data_preprocessor.std == [58.395, 57.12, 57.375]
    with torch.device("meta"):
        backbone = MODELS.build(plan.cfg.model.backbone)
        assert [tuple(x.shape[1:]) for x in backbone(torch.zeros(1, 3, 100, 64))][1:] == [
            (512, 13, 8), (1024, 7, 4), (2048, 4, 2),
        ]  # fmt: skip
    assert backbone.encoder.patch_size == 16


@pytest.mark.slow
@pytest.mark.parametrize(("scope", "family"), [(scope, family) for scope, names in STEPS.items() for family in names])
def test_family_trains_a_step_and_predicts(scope, family, monkeypatch):
    """With smaller images and fewer proposals than docs/swap.md: enough for positive and negative ones everywhere."""
    pytest.importorskip(scope)
    monkeypatch.setattr(check, "_LIMITS", dict(nms_pre=50, max_per_img=10, num=16))
    monkeypatch.setattr(check, "DETECTION", (96, 128))
    monkeypatch.setattr(check, "SEGMENTATION", (64, 96))
    row = check_family(scope, family)
    assert row["original"] == "runs"
    assert row["swapped"] == "runs"
    assert row["different"] == (["neck"] if family == "detectors" else [])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mmdet::reid/reid_r50_8xb32-6e_mot17train80_test-mot17val20.py", "keep its ResNet"),
        ("mmdet::tridentnet/tridentnet_r50-caffe_1x_coco.py", "three dilations.*swap faster_rcnn"),
        ("mmdet::misc/d2_mask-rcnn_r50-caffe_fpn_ms-90k_coco.py", r"pe_spatial\.integrations\.detectron2"),
        ("mmseg::dpt/dpt_vit-b16_8xb2-160k_ade20k-512x512.py", "class token.*swap a upernet"),
        ("mmseg::san/san-vit-b16_coco-stuff164k-640x640.py", "CLIP"),
        ("mmseg::vpd/vpd_sd_4xb8-25k_nyu-480x480.py", "diffusion"),
        ("mmseg::swin/swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256.py", "6 channels; PE takes RGB"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(name, words):
    with pytest.raises(ConfigError, match=words):
        plan_swap(config(name), SMALL)


ATSS = "mmdet::atss/atss_r50_fpn_1x_coco.py"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(variant="pe_b16"), "unknown variant 'pe_b16'; allowed are pe_spatial_t16_512"),
        (dict(layers=[12]), r"out_indices is \(12,\), out of range for 12 blocks; -12 to 11"),
        (dict(layers=[3, 7]), "reads one layer but layers is.*use 'fused' or 'single'"),
        (dict(layers=[3, 7], adapter="single"), "one for each of 4 levels"),
        (dict(adapter="sfp"), "allowed are 'simple', 'fused', 'single'"),
        (dict(geometry="deta"), "allowed are .release., .timm., .vitdet."),
        (dict(strides=[4, 8]), "belong together"),
        (dict(strides=[4, 8], channels=[256]), "differ in length"),
        (dict(strides=[8, 12], channels=[256, 256]), "times powers of two"),
    ],
)
def test_bad_options_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        plan_swap(config(ATSS), **{"variant": B16, **options})


def test_bad_configs_are_named():
    with pytest.raises(ConfigError, match="has no model"):
        swap_backbone(Config(dict(default_scope="mmdet")), B16)
    with pytest.raises(ConfigError, match="has no backbone to swap; its keys are type, head"):
        swap_backbone(Config(dict(model=dict(type="Mine", head=dict(type="X")))), B16)
    cfg = config(ATSS)
    cfg.model.backbone = ConfigDict(type="NobodyKnowsIt")
    with pytest.raises(ConfigError, match=r"NobodyKnowsIt cannot be probed .*--strides 4,8,16,32 --channels"):
        plan_swap(cfg, B16)
    plan = plan_swap(cfg, SMALL, strides=[4, 8, 16, 32], channels=[256, 512, 1024, 2048])
    assert plan.unused == (0,)
    cfg = config(ATSS)
    cfg.model.neck.in_channels = [256, 512, 1024, 999]
    with pytest.raises(ConfigError, match="neck or head declares"):
        plan_swap(cfg, B16)
    with pytest.raises(ConfigError, match=r"PE already; .*model\.backbone\.variant"):
        plan_swap(plan.cfg, B16)


def test_probe_needs_no_weights_and_leaves_no_trace():
    with DefaultScope.overwrite_default_scope("mmdet"):
        backbone = dict(
            type="ResNet", depth=50, dcn=dict(type="DCNv2", deform_groups=1), stage_with_dcn=(False, True, True, True),
            init_cfg=dict(type="Pretrained", checkpoint="torchvision://resnet50"),
        )  # fmt: skip
        linspace = torch.linspace
        assert probe_backbone(backbone) == [Level(*level) for level in A]
        assert torch.linspace is linspace
        assert torch.zeros(1).device.type == "cpu"


@pytest.mark.parametrize("variant", [*VARIANTS, "PE-Spatial-B16-512"])
def test_every_variant_takes_the_place(variant):
    plan = plan_swap(config(ATSS), variant)
    with torch.device("meta"):
        backbone = MODELS.build(plan.cfg.model.backbone)
        assert [x.shape[1:] for x in backbone(torch.zeros(1, 3, 512, 512))] == [
            (256, 128, 128), (512, 64, 64), (1024, 32, 32), (2048, 16, 16),
        ]  # fmt: skip
    assert backbone.encoder.patch_size == 16
    assert backbone.encoder.geometry.window_size == backbone.encoder.config.grid_size
    assert len(backbone.encoder.geometry.global_attn_indexes) == 4
    assert bool(plan.notes) == (backbone.encoder.config.depth in (23, 47))


def test_parameters_are_counted_and_a_small_encoder_keeps_a_small_pyramid():
    cfg = read_config("mmdet::atss/atss_r50_fpn_1x_coco.py")
    counts = {
        adapter: count_parameters(plan_swap(cfg, "pe_spatial_t16_512", adapter=adapter).cfg)
        for adapter in ("simple", "single")
    }
    assert counts["simple"]["encoder"] == pytest.approx(5.7e6, rel=0.02)
    assert counts["single"]["pyramid"] < counts["simple"]["pyramid"] < 3.5e6  # 50.3 million with 3x3 of 2048 channels
    assert counts["simple"]["neck"] == counts["single"]["neck"] > 1e6
    assert counts["simple"]["heads"] > 4e6


def test_layers_and_adapters():
    cfg = config("mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py")
    fused = plan_swap(cfg, B16, adapter="fused").cfg.model.backbone
    assert fused.out_indices == [2, 5, 8, 11]
    single = plan_swap(cfg, SMALL, adapter="single", layers=[0, 1, 2, 3], checkpoint=None).cfg.model.backbone
    assert [type(level).__name__ for level in MODELS.build(single).pyramid.levels] == ["Sequential"] * 4
    early = plan_swap(cfg, B16, layers=[7]).cfg.model.backbone
    with torch.device("meta"):
        assert MODELS.build(early).encoder.depth == 8


def test_layers_that_feed_unread_levels_are_not_built():
    clrnet = plan_swap(config("mmdet::clrnet/clrnet.py"), SMALL, adapter="single", layers=[0, 1, 2, 3], checkpoint=None)
    assert MODELS.build(clrnet.cfg.model.backbone).encoder.depth == 3


def test_normalisation_and_padding_follow_the_encoder():
    plan = plan_swap(config("mmdet::yolox/yolox_s_8xb8-300e_coco.py"), B16)
    preprocessor = plan.cfg.model.data_preprocessor
    assert preprocessor.mean == preprocessor.std == [127.0] * 3
    assert preprocessor.bgr_to_rgb is True
    assert preprocessor.batch_augments
    detr = plan_swap(config("mmdet::detr/detr_r50_8xb2-150e_coco.py"), B16, geometry="release").cfg.model
    assert detr.data_preprocessor.mean == [127.5] * 3
    assert detr.data_preprocessor.pad_size_divisor == 32
    name = "mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py"
    teacher = plan_swap(config(name), B16).cfg.model
    assert teacher.data_preprocessor.data_preprocessor.mean == [127.0] * 3
    assert teacher.detector.data_preprocessor.bgr_to_rgb is True


def test_a_teacher_that_stays_keeps_its_images():
    """Both read the preprocessor's images, and PE has to see the same as with a preprocessor of its own."""
    cfg = config("mmdet::lad/lad_r50-paa-r101_fpn_2xb8_coco_1x.py")
    plan = plan_swap(cfg, SMALL, checkpoint=None)
    model = plan.cfg.model
    assert model.data_preprocessor.mean == cfg.model.data_preprocessor.mean
    assert model.teacher_backbone == cfg.model.teacher_backbone
    assert any("teacher" in note for note in plan.notes)
    backbone = MODELS.build(model.backbone).eval()
    images = torch.randint(0, 256, (1, 3, 64, 64)).float()  # R, G, B
    mean, std = (torch.tensor(cfg.model.data_preprocessor[key])[:, None, None] for key in ("mean", "std"))
    torch.testing.assert_close(backbone.normalize((images - mean) / std), (images - 127) / 127, rtol=1e-5, atol=1e-5)


def test_optimizer_becomes_adamw_and_heads_keep_their_rules():
    sgd = plan_swap(config(ATSS), B16).cfg.optim_wrapper
    assert sgd.optimizer == dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.1)
    assert sgd.paramwise_cfg == dict(layer_decay_rate="vitdet")
    name = "mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py"
    adam = plan_swap(config(name), B16).cfg.optim_wrapper
    assert adam.clip_grad == dict(max_norm=0.1, norm_type=2)
    assert set(adam.paramwise_cfg.custom_keys) == {"sampling_offsets", "reference_points"}  # and no 'backbone'
    yolox = plan_swap(config("mmdet::yolox/yolox_s_8xb8-300e_coco.py"), B16).cfg
    assert yolox.optim_wrapper.paramwise_cfg == dict(layer_decay_rate="vitdet", norm_decay_mult=0, bias_decay_mult=0)
    minimum = [s.eta_min for s in yolox.param_scheduler if "eta_min" in s]
    assert minimum == [pytest.approx(1e-4 * 0.05)]  # it was 5% of SGD's rate, five times the new rate itself
    assert plan_swap(config(ATSS), B16, lr=3e-5).cfg.optim_wrapper.optimizer.lr == 3e-5


def test_what_belonged_to_the_old_backbone_goes():
    name = "mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco.py"
    plan = plan_swap(config(name), B16)
    assert plan.cfg.custom_imports.imports == ["pe_spatial.integrations.openmmlab"]
    assert plan.cfg.optim_wrapper.constructor == "LayerDecayOptimWrapperConstructor"
    assert "layer_decay_rate" in plan.cfg.optim_wrapper.paramwise_cfg
    cfg = config(ATSS)
    cfg.load_from, cfg.model.init_cfg = "atss.pth", dict(type="Pretrained", checkpoint="atss.pth")
    plan = plan_swap(cfg, B16)
    assert plan.cfg.load_from is None
    assert plan.cfg.model.init_cfg is None
    assert len(plan.notes) == 2
    with pytest.warns(UserWarning, match=r"load_from atss\.pth belongs to the old backbone"):
        swap_backbone(cfg, B16)


@pytest.mark.parametrize("name", [ATSS, "mmdet::detectors/detectors_cascade-rcnn_r50_1x_coco.py",
                                  "mmseg::pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py",
                                  "mmdet::yolox/yolox_s_8xb8-300e_coco.py"])  # fmt: skip
def test_written_config_inherits_and_means_the_same(name, tmp_path):
    cfg = config(name)
    plan = plan_swap(cfg, B16)
    for base in (name, installed_config(name)):
        text = write_swapped(cfg, plan, base=base, variant=B16)
        (tmp_path / "mine.py").write_text(text)
        again = Config.fromfile(tmp_path / "mine.py", import_custom_modules=False)
        assert plain(again.to_dict()) == plain(plan.cfg.to_dict())
        assert len(text) < 3500
        assert max(len(line) for line in text.splitlines() if not line.startswith("_base_")) <= 120


def plain(node):
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != "_scope_"}
    return [plain(x) for x in node] if isinstance(node, list | tuple) else node


def test_difference_deletes_what_is_gone():
    before = dict(a=dict(type="X", b=1, c=dict(d=1)), e=[1], f=2, g=dict(type="X", h=1))
    after = dict(a=dict(type="X", b=1, c=dict(d=2)), e=[2], g=dict(type="Y", h=1))
    assert difference(before, after) == dict(a=dict(c=dict(d=2)), e=[2], f=None, g=dict(_delete_=True, type="Y", h=1))
    assert difference(dict(a=dict(b=1, c=2)), dict(a=dict(b=1))) == dict(a=dict(_delete_=True, b=1))


@pytest.fixture
def tool(monkeypatch, capsys, tmp_path):
    """Return a function that runs a tool in this process, in an empty folder, and returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runpy.run_path(str(REPO / "tools" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run


def test_tool_writes_or_shows(tool, tmp_path):
    shown = tool("swap_backbone", ATSS, "--variant", B16, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert f"_base_ = '{ATSS}'" in shown
    tool("swap_backbone", ATSS, "--variant", B16, "--out", tmp_path / "configs" / "mine.py")
    assert (tmp_path / "configs" / "mine.py").read_text() == shown
    with pytest.raises(SystemExit, match="already exists; give another --out, or --force"):
        tool("swap_backbone", ATSS, "--variant", B16, "--out", tmp_path / "configs" / "mine.py")
    # a file of one's own is inherited by its relative path
    tool("swap_backbone", ATSS, "--variant", B16, "--out", "b16.py", "--layers", "7", "--lr", "3e-5")
    (tmp_path / "own.py").write_text(f"_base_ = {ATSS!r}\n")
    tool("swap_backbone", "own.py", "--variant", "pe_spatial_s16_512", "--out", "sub/swapped.py")
    assert "_base_ = '../own.py'" in (tmp_path / "sub" / "swapped.py").read_text()
    assert read_config("sub/swapped.py").model.backbone.variant == "pe_spatial_s16_512"
    assert read_config("b16.py").model.backbone.out_indices == [7]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("mmdet::atss/atss_r51_fpn_1x_coco.py", "--variant", B16), "has no config.*similar names: atss_r50_fpn_1x"),
        (("nothing::a/b.py", "--variant", B16), "'nothing' is not installed"),
        (("gone.py", "--variant", B16), "gone.py: No such file"),
        ((ATSS, "--variant", "b16"), "unknown variant 'b16'"),
        ((ATSS, "--variant", B16, "--layers", "12"), "out of range for 12 blocks"),
    ],
)
def test_tool_ends_in_one_sentence(tool, args, words):
    with pytest.raises(SystemExit, match=words) as end:
        tool("swap_backbone", *args)
    assert "\n" not in end.value.code


def test_train_swaps_on_the_fly(tool, monkeypatch):
    from pe_spatial.engine import training

    seen = []
    monkeypatch.setattr(training, "train", seen.append)
    options = ("--cfg-options", "model.backbone.any_size=False")
    tool("train", ATSS, "--swap", "pe_spatial_s16_512", "--layers", "9", "--checkpoint", "none", *options)
    assert seen[0].model.backbone.variant == "pe_spatial_s16_512"
    assert seen[0].model.backbone.out_indices == [9]
    assert seen[0].model.backbone.any_size is False  # --cfg-options come last
    with pytest.raises(SystemExit, match="belong to --swap"):
        tool("train", ATSS, "--layers", "9")


def test_building_block_by_hand_means_the_same(tmp_path):
    name = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    (tmp_path / "mine.py").write_text(
        f"_base_ = [{name!r}, 'pe_spatial::_base_/backbones/pe_vitdet.py']\n"
        "model = dict(backbone=_base_.pe_backbone, data_preprocessor=_base_.pe_preprocessor)\n"
        "optim_wrapper = _base_.pe_optim_wrapper\n"
    )
    mine = plain(read_config(str(tmp_path / "mine.py")).to_dict())
    swapped = plain(plan_swap(config(name), B16).cfg.to_dict())
    for key in ("model", "optim_wrapper", "custom_imports", "train_dataloader"):
        assert mine[key] == swapped[key]
