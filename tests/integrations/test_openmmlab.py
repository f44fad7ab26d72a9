"""Registration in OpenMMLab: what configs can build, how weights get in, how learning rates decay."""

import copy
import logging

import pytest
import torch

pytest.importorskip("mmdet")
from helpers.golden import read_json
from mmengine.config import ConfigDict
from mmengine.hooks import Hook
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS, DefaultScope
from torch import nn

import pe_spatial.engine  # noqa: F401  (registers)
import pe_spatial.integrations.openmmlab as openmmlab
from pe_spatial import EncoderConfig, PerceptionEncoder, SimpleFeaturePyramid
from pe_spatial.encoder.checkpoint import CheckpointError
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet
SMALL = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
GEOMETRY = dict(window_size=2, global_attn_indexes=(1, 3), pos_embed_mode="tile")


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
@pytest.mark.parametrize("name", ["PerceptionEncoder", "SimpleFeaturePyramid", "ChannelLayerNorm"])
def test_every_framework_finds_the_names(scope, name):
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope), MODELS.switch_scope_and_registry(None) as registry:
        assert registry.get(name) is not None


def test_backbone_equals_the_core_and_options_override_the_geometry():
    backbone = MODELS.build(ConfigDict(type="PerceptionEncoder", variant=SMALL, geometry="timm", out_indices=(1, -1)))
    core = PerceptionEncoder(
        EncoderConfig(**SMALL), out_indices=(1, 3), pos_embed_mode="bicubic_antialias", rope_mode="interpolate"
    )
    core.load_state_dict(backbone.state_dict())
    images = torch.randn(1, 3, 96, 64)
    for ours, theirs in zip(backbone.eval()(images), core.eval()(images), strict=True):
        torch.testing.assert_close(ours, theirs)
    other = MODELS.build(dict(type="PerceptionEncoder", variant=SMALL, geometry="timm", pos_embed_mode="tile"))
    assert other.geometry.pos_embed_mode == "tile"
    with pytest.raises(ValueError, match="geometry is 'x'; allowed are"):
        MODELS.build(dict(type="PerceptionEncoder", variant=SMALL, geometry="x"))


@pytest.mark.parametrize("out_indices", [(-1,), (1, 2, 3)])
def test_backbone_with_pyramid_has_the_strides_of_what_it_replaces(out_indices):
    model = MODELS.build(
        dict(
            type="PerceptionEncoderPyramid",
            variant=SMALL,
            out_indices=out_indices,
            pyramid=dict(strides=(4, 8, 16, 32, 64), out_channels=24),
            **GEOMETRY,
        )
    )
    levels = model(torch.randn(2, 3, 128, 64))
    assert [tuple(level.shape) for level in levels] == [(2, 24, 128 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    with torch.autocast("cpu", torch.bfloat16):
        levels = model(torch.randn(2, 3, 128, 64))
    assert all(level.dtype == torch.float32 and level.is_contiguous() for level in levels)


def pyramid_of(**options):
    levels = dict(strides=(4, 8, 32), out_channels=(4, 8, 16))
    return MODELS.build(dict(type="PerceptionEncoderPyramid", variant=SMALL, pyramid=levels) | options)


def test_any_size_gives_the_maps_of_the_padded_image():
    torch.manual_seed(0)
    model = pyramid_of(any_size=True).eval()
    images = torch.randn(2, 3, 70, 65)
    whole = model(nn.functional.pad(images, (0, 31, 0, 26)))  # to 96x96
    for level, expected, stride in zip(model(images), whole, (4, 8, 32), strict=True):
        h, w = -(-70 // stride), -(-65 // stride)
        torch.testing.assert_close(level, expected[..., :h, :w], rtol=0, atol=0)
    with pytest.raises(ValueError, match="70x65 is not a multiple of patch_size 16"):
        pyramid_of()(images)


def test_levels_that_nobody_reads_stay_views_of_one_zero():
    model = pyramid_of(pyramid=dict(strides=(4, 8, 16), out_channels=(8, 8, 8), unused=(0,)), any_size=True)
    with torch.autocast("cpu", torch.bfloat16):
        levels = model(torch.randn(1, 3, 70, 65))
    assert levels[0].shape == (1, 8, 18, 17)
    assert levels[0].untyped_storage().size() == levels[0].element_size() == 4
    assert levels[1].is_contiguous()


def test_evaluation_of_one_level():
    model = pyramid_of(eval_level=1)
    images = torch.randn(1, 3, 64, 64)
    assert len(model.train()(images)) == 3
    assert model.eval()(images).shape == (1, 8, 8, 8)


@pytest.mark.parametrize("bgr", [False, True])
def test_renormalized_images_are_those_of_the_encoder(bgr):
    rgb = torch.randint(0, 256, (2, 3, 32, 32)).float()
    mean, std = [103.0, 116.0, 123.0], [1.0, 57.0, 58.0]
    statistics = dict(mean=mean, std=std, to_mean=[127.0, 120.0, 110.0], to_std=[127.0, 60.0, 50.0])
    model = pyramid_of(renormalize=dict(statistics, bgr=bgr))
    column = {key: torch.tensor(value)[:, None, None] for key, value in statistics.items()}
    came = ((rgb.flip(1) if bgr else rgb) - column["mean"]) / column["std"]
    expected = (rgb - column["to_mean"]) / column["to_std"]
    torch.testing.assert_close(model.normalize(came), expected, rtol=1e-5, atol=1e-5)
    assert set(model.state_dict()) == set(pyramid_of().state_dict())


def test_adapters_by_name():
    assert type(pyramid_of(adapter="single").pyramid).__name__ == "PlainFeaturePyramid"
    levels = pyramid_of(adapter="single", out_indices=(0, 1, 3))(torch.randn(1, 3, 64, 64))
    assert [level.shape[1:] for level in levels] == [(4, 16, 16), (8, 8, 8), (16, 2, 2)]
    with pytest.raises(ConfigError, match="allowed are 'simple', 'fused', 'single', 'deta'"):
        pyramid_of(adapter="sfp")
    for adapter in ("simple", "deta"):
        with pytest.raises(ConfigError, match=f"adapter '{adapter}' reads one layer but out_indices names 2"):
            pyramid_of(adapter=adapter, out_indices=(1, 3))


def test_deta_adapter():
    model = pyramid_of(adapter="deta", pyramid=None, any_size=True)
    images = torch.randn(1, 3, 60, 96)
    with torch.autocast("cpu", torch.bfloat16):
        levels = model(images)
        (expected,) = model.encoder(torch.nn.functional.pad(images, (0, 0, 0, 4)))
    assert [tuple(level.shape[1:]) for level in levels] == [(16, 8, 12), (32, 4, 6), (32, 2, 3)]
    assert all(level.dtype == torch.float32 and level.is_contiguous() for level in levels)
    torch.testing.assert_close(levels[1], expected.float(), rtol=0, atol=0)


def test_neck_equals_the_core():
    neck = MODELS.build(dict(type="SimpleFeaturePyramid", in_channels=32, out_channels=16))
    core = SimpleFeaturePyramid(32, out_channels=16)
    core.load_state_dict(neck.state_dict())
    x = torch.randn(1, 32, 8, 8)
    for ours, theirs in zip(neck((x,)), core(x), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_norm_layer_of_heads_keeps_its_eps():
    cnn = pytest.importorskip("mmcv.cnn")
    conv = cnn.ConvModule(8, 8, 3, norm_cfg=dict(type="ChannelLayerNorm", eps=1e-6))
    assert conv.norm.eps == 1e-6
    assert conv.conv.bias is None
    assert "ln.weight" in conv.state_dict()
    assert conv(torch.randn(2, 8, 5, 5)).shape == (2, 8, 3, 3)


class Detector(BaseModule):
    """A model as mmengine initialises it."""

    def __init__(self, **backbone):
        super().__init__()
        self.backbone = MODELS.build(dict(type="PerceptionEncoderPyramid", variant=SMALL, **GEOMETRY) | backbone)
        self.head = nn.Sequential(nn.Conv2d(256, 3, 1), nn.LayerNorm(4))


@pytest.fixture
def weights(tmp_path):
    path = tmp_path / "encoder.pt"
    torch.save(PerceptionEncoder(EncoderConfig(**SMALL)).state_dict(), path)
    return path


def test_init_weights_loads_once_and_strictly(weights, tmp_path):
    detector = Detector(init_cfg=dict(type="Pretrained", checkpoint=str(weights)))
    detector.init_weights()
    for name, value in torch.load(weights).items():
        torch.testing.assert_close(detector.backbone.encoder.state_dict()[name], value)
    with torch.no_grad():
        detector.backbone.encoder.pos_embed.fill_(7.0)
    detector.backbone.init_weights()  # as mmengine's second calls: nothing happens
    assert (detector.backbone.encoder.pos_embed == 7.0).all()

    state = torch.load(weights)
    del state["norm_pre.bias"]
    torch.save(state, tmp_path / "broken.pt")
    with pytest.raises(CheckpointError, match=r"missing in the file: norm_pre\.bias"):
        Detector(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "broken.pt"))).init_weights()


def test_init_cfg_none_starts_from_random_weights_and_others_are_refused():
    detector = Detector(init_cfg=None)
    before = copy.deepcopy(detector.backbone.state_dict())
    detector.init_weights()
    for name, value in detector.backbone.state_dict().items():
        torch.testing.assert_close(value, before[name])
    with pytest.raises(ConfigError, match="allowed are None and"):
        Detector(init_cfg=dict(type="Xavier"))


@pytest.mark.parametrize(
    ("cfg", "lora", "needed"),
    [
        (dict(resume=True, load_from="a.pth"), None, False),
        (dict(resume=True, load_from="a.pth"), dict(rank=2), True),
        (dict(resume=True), None, True),
        (dict(load_from="a.pth"), None, True),
    ],
)
def test_only_a_run_that_resumes_complete_weights_does_without_pretrained_ones(tmp_path, cfg, lora, needed):
    hook = HOOKS.build(dict(type="ResumeWithoutPretrained"))
    assert isinstance(hook, Hook)
    detector = Detector(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "absent.pt")), lora=lora)
    runner = type("Runner", (), dict(cfg=cfg, work_dir=str(tmp_path), model=detector))
    hook.before_run(runner)
    if needed:
        with pytest.raises(CheckpointError, match="no checkpoint at"):
            detector.init_weights()
    else:
        detector.init_weights()


def wrapper(model, *, lr=1e-3, wrapper_type="OptimWrapper", **paramwise):
    return build_optim_wrapper(
        model,
        dict(
            type=wrapper_type,
            optimizer=dict(type="AdamW", lr=lr, weight_decay=0.1),
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=paramwise,
        ),
    )


def settings(model, optim_wrapper):
    """Name -> (lr, weight decay); fails if a parameter is in two groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    pairs = [
        (names[id(parameter)], (group["lr"], group["weight_decay"]))
        for group in optim_wrapper.optimizer.param_groups
        for parameter in group["params"]
    ]
    assert len(pairs) == len(dict(pairs))
    return dict(pairs)


@pytest.mark.parametrize("case", ["vitdet_window4_layerscale", "vitdet_window3_padded"])
def test_learning_rates_equal_the_reference(golden, case):
    from pe_spatial.encoder.checkpoint import to_timm_names

    reference = read_json(golden / "vitdet" / f"{case}.json")
    backbone = reference["backbone"]
    detector = Detector(
        variant=dict(
            img_size=backbone["pretrain_img_size"],
            patch_size=16,
            embed_dim=48,
            depth=4,
            num_heads=3,
            class_token=False,
            init_values=backbone["init_values"],
        )
    )
    factors = {k.removeprefix("net."): v for k, v in reference["lr_decay"].items() if k.startswith("net.")}
    renamed, _, _ = to_timm_names({name: torch.tensor([[[v]]]) for name, v in factors.items()})
    found = settings(detector, wrapper(detector, layer_decay_rate=0.9))
    encoder = "backbone.encoder."
    ours = {name.removeprefix(encoder): lr for name, (lr, _) in found.items() if name.startswith(encoder)}
    assert ours == {name: pytest.approx(1e-3 * v.item()) for name, v in renamed.items()}
    assert {lr for name, (lr, _) in found.items() if not name.startswith(encoder)} == {1e-3}
    assert set(found) == {name for name, _ in detector.named_parameters()}


def test_weight_decay_of_norms_biases_and_positions():
    detector = Detector()
    everything = settings(detector, wrapper(detector, layer_decay_rate=0.7))
    assert {decay for _, decay in everything.values()} == {0.1}
    some = settings(detector, wrapper(detector, layer_decay_rate=0.7, decay_norm_bias=False))
    exempt = {name for name, (_, decay) in some.items() if decay == 0.0}
    assert {"head.1.weight", "head.0.bias", "backbone.encoder.pos_embed"} <= exempt
    assert not {"head.0.weight", "backbone.encoder.blocks.0.attn.qkv.weight"} & exempt


def test_heads_keep_the_rules_of_mmengine():
    detector = Detector()
    rules = dict(custom_keys={"head.0": dict(lr_mult=0.1)}, norm_decay_mult=0.0, bias_lr_mult=2.0)
    found = settings(detector, wrapper(detector, layer_decay_rate=0.7, **rules))
    assert found["head.0.weight"] == (pytest.approx(1e-4), 0.1)
    assert found["head.1.weight"] == (1e-3, 0.0)
    plain = settings(detector, wrapper(detector, layer_decay_rate=0.7))
    encoder = {name: value for name, value in plain.items() if name.startswith("backbone.encoder.")}
    assert {name: found[name] for name in encoder} == encoder
    assert set(found) == set(plain)


def test_frozen_parameters_are_left_out_and_groups_stay_few():
    detector = Detector(frozen_stages=2)
    optim_wrapper = wrapper(detector, layer_decay_rate=0.7)
    assert not any("blocks.1." in name or "patch_embed" in name for name in settings(detector, optim_wrapper))
    assert len(optim_wrapper.optimizer.param_groups) == 3  # blocks 2 and 3, and the rest


def test_rate_follows_the_depth_and_ddp_is_looked_through():
    class DDP(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    detector = Detector(variant=dict(SMALL, depth=12), global_attn_indexes=(2, 5, 8, 11))
    found = settings(detector, wrapper(DDP(detector), layer_decay_rate="vitdet"))
    assert found["backbone.encoder.pos_embed"][0] == pytest.approx(1e-3 * 0.7**13)
    detector = Detector()  # 4 blocks: the rate of 12
    found = settings(detector, wrapper(detector, layer_decay_rate="vitdet"))
    assert found["backbone.encoder.pos_embed"][0] == pytest.approx(1e-3 * 0.7**5)


@pytest.mark.parametrize("paramwise", [dict(), dict(layer_decay_rate=0.9, num_layers=12), dict(decay_norm_bias=True)])
def test_unknown_or_missing_recipe_options(paramwise):
    with pytest.raises(ConfigError, match="it needs layer_decay_rate"):
        wrapper(Detector(), **paramwise)


def test_model_without_encoder():
    with pytest.raises(ConfigError, match="contains no PerceptionEncoder"):
        wrapper(nn.Linear(2, 2), layer_decay_rate=0.9)


def test_schedules_scale_every_group():
    from mmengine.optim import LinearLR

    detector = Detector()
    optim_wrapper = wrapper(detector, layer_decay_rate=0.5)
    before = [group["lr"] for group in optim_wrapper.optimizer.param_groups]
    scheduler = LinearLR(optim_wrapper, start_factor=0.1, by_epoch=False, begin=0, end=2)
    assert [g["lr"] for g in optim_wrapper.optimizer.param_groups] == pytest.approx([lr / 10 for lr in before])
    optim_wrapper.step()
    scheduler.step()
    assert [g["lr"] for g in optim_wrapper.optimizer.param_groups] == pytest.approx(before)


def test_bfloat16_on_any_device_keeps_the_weights_in_float32():
    detector = Detector()
    optim_wrapper = wrapper(detector, wrapper_type="BFloat16OptimWrapper", layer_decay_rate=0.9)
    with optim_wrapper.optim_context(detector):
        out = detector.head[0](detector.backbone(torch.randn(1, 3, 64, 64))[2])
    assert out.dtype == torch.bfloat16
    before = detector.head[0].weight.detach().clone()
    optim_wrapper.update_params(out.float().square().mean())
    assert detector.head[0].weight.dtype == torch.float32
    assert not torch.equal(detector.head[0].weight, before)


def test_module_registers_without_side_effects_on_logging():
    assert openmmlab.__doc__
    assert logging.getLogger("pe_spatial").level == logging.NOTSET
