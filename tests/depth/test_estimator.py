"""The depth estimator: padding is cut and not squeezed, windows and flips do what they say, frozen is frozen."""

import pytest
import torch
from torch import nn

pytest.importorskip("mmseg")
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

import pe_spatial.depth.dpt  # noqa: F401  (registers)
from pe_spatial.depth.estimator import DepthEstimator, named_layers
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmseg
TINY = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)


@MODELS.register_module()
class _Grid(nn.Module):
    """A 'backbone' of which every patch is the mean of its pixels, so that positions can be followed."""

    embed_dim = 3
    out_indices = (0,)

    def __init__(self, patch_size):
        super().__init__()
        self.patch_size = patch_size
        self.seen = []

    def forward(self, images):
        self.seen.append(tuple(images.shape))
        return (nn.functional.avg_pool2d(images, self.patch_size),)


@MODELS.register_module()
class _Channel(nn.Module):
    """A 'head' whose depth is the first channel."""

    min_depth, max_depth, token = 0.5, 8.0, None

    def __init__(self, in_channels):
        super().__init__()
        assert in_channels == [3]

    def forward(self, maps, class_tokens):
        assert class_tokens == ()
        return maps[0][:, :1]


@MODELS.register_module()
class _L1(nn.Module):
    def forward(self, depth, target):
        return (depth - target)[target > 0].abs().mean()


def grid_model(patch=1, **test_cfg):
    model = DepthEstimator(dict(type="_Grid", patch_size=patch), dict(type="_Channel"), losses=[], test_cfg=test_cfg)
    return model.eval()


def tiny_model(*, head=None, losses=("_L1",), backbone=None, **options):
    torch.manual_seed(0)
    backbone = {"type": "PerceptionEncoder", "variant": TINY, "out_indices": "even", **(backbone or {})}
    return DepthEstimator(
        backbone, head or dict(type="BinsDepthHead"), losses=[dict(type=loss) for loss in losses], **options
    )


def samples(count, h, w, ori=None, depth=None):
    result = []
    for i in range(count):
        sample = SegDataSample(metainfo=dict(img_shape=(h, w), ori_shape=ori or (h, w)))
        if depth is not None:
            sample.gt_depth_map = PixelData(data=depth[i])
        result.append(sample)
    return result


@pytest.mark.parametrize(("h", "w"), [(480, 640), (416, 544), (60, 75)])
def test_padding_to_the_patch_is_cut_and_not_squeezed(h, w):
    """A ramp over the image comes back as that ramp; squeezed, as DINOv2 has it, it would be steeper."""
    model = grid_model(patch=14)
    ramp = torch.linspace(1, 7, w).expand(1, 3, h, w)
    depth = model.depth(ramp)
    padded = (-(-h // 14) * 14, -(-w // 14) * 14)
    assert model.backbone.seen == [(1, 3, *padded)]
    inner = (..., slice(28, -28), slice(28, -28))
    torch.testing.assert_close(depth[inner], ramp[:, :1][inner], rtol=0, atol=0.02 * 600 / w)


def test_padding_is_on_all_sides():
    model = grid_model(patch=16)
    depth = model.depth(torch.full((1, 3, 16, 22), 4.0))  # 22 = 16 + 6, filled up by 5 on each side
    # columns of the three patches' centers: the outer ones hold 11 of 16 pixels of the image
    assert model.backbone.seen == [(1, 3, 16, 32)]
    torch.testing.assert_close(depth[0, 0, 0, [2, 19]], torch.full((2,), 4.0 * 11 / 16))


def test_clamped_to_the_range_before_it_is_resized():
    model = grid_model(patch=4)
    images = torch.tensor([0.0, 20.0]).repeat_interleave(4).expand(1, 3, 4, 8)
    depth = model.infer(images)
    assert (depth.min(), depth.max()) == (0.5, 8.0)
    ramp = 0.5 + 7.5 * torch.tensor([0, 0, 1, 3, 5, 7, 8, 8]) / 8  # between 0.5 and 8; unclamped it would be steeper
    torch.testing.assert_close(depth[0, 0, 0], ramp)
    assert model.depth(images).max() == 20  # in training nothing is clamped


def test_flip_averages_with_the_mirrored_prediction(randomize):
    plain = randomize(tiny_model()).eval()
    flipped = randomize(tiny_model(test_cfg=dict(flip=True))).eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = (plain.infer(images) + plain.infer(images.flip(-1)).flip(-1)) / 2
        torch.testing.assert_close(flipped.infer(images), expected)
        assert (plain.infer(images) - expected).abs().max() > 1e-4


@pytest.mark.parametrize(("size", "runs"), [((64, 80), 1), ((64, 81), 2), ((100, 144), 4), ((30, 40), 1)])
def test_windows_cover_the_image_and_run_once_each(size, runs):
    model = grid_model(mode="slide", crop_size=(64, 80), stride=(40, 64))
    images = torch.rand(2, 3, *size) * 7 + 0.6
    torch.testing.assert_close(model.infer(images), images[:, :1])
    assert len(model.backbone.seen) == runs
    assert {shape[2:] for shape in model.backbone.seen} == {(min(64, size[0]), min(80, size[1]))}


def test_windows_are_averaged_where_they_overlap():
    model = grid_model(mode="slide", crop_size=(4, 6), stride=(4, 4))
    model.depth = lambda x, **_: x[..., :1, :1, :1].expand_as(x[:, :1])  # of a window, the value of its first column
    depth = model.infer(torch.arange(10.0).expand(1, 3, 4, 10))
    assert depth[0, 0, 0].tolist() == [0, 0, 0, 0, 2, 2, 4, 4, 4, 4]


def test_windows_with_flips(randomize):
    options = dict(mode="slide", crop_size=(64, 64), stride=(64, 64))
    model = randomize(tiny_model(test_cfg=dict(options, flip=True))).eval()
    whole = randomize(tiny_model(test_cfg=dict(flip=True))).eval()
    images = torch.randn(1, 3, 64, 128)
    with torch.no_grad():
        expected = torch.cat([whole.infer(images[..., :64]), whole.infer(images[..., 64:])], -1)
        torch.testing.assert_close(model.infer(images), expected)


def test_predictions_lose_the_padding_of_the_batch_and_take_the_original_size():
    model = grid_model()
    images = torch.full((2, 3, 8, 10), 7.0)
    images[0, :, :6, :5] = 2.0
    first, second = model.predict(images, samples(1, 6, 5, ori=(12, 10)) + samples(1, 8, 10))
    torch.testing.assert_close(first.pred_depth_map.data, torch.full((1, 12, 10), 2.0))
    assert second.pred_depth_map.data.shape == (1, 8, 10)
    (alone,) = model.predict(images[:1])
    assert alone.pred_depth_map.data.shape == (1, 8, 10)


def test_modes():
    model = grid_model()
    images = torch.rand(1, 3, 4, 4)
    assert model(images, None, mode="tensor").shape == (1, 1, 4, 4)
    assert isinstance(model(images, None, mode="predict")[0], SegDataSample)
    with pytest.raises(ConfigError, match="mode is 'train'; allowed are 'tensor', 'loss', 'predict'"):
        model(images, None, mode="train")


def test_losses_are_summed_and_see_the_missing_depth():
    model = tiny_model(losses=("_L1", "_L1"))
    images, depth = torch.randn(2, 3, 64, 64), torch.zeros(2, 1, 64, 64)
    depth[:, :, :10] = 3.0
    losses = model(images, samples(2, 64, 64, depth=depth), mode="loss")
    assert list(losses) == ["loss_0__L1", "loss_1__L1"]
    expected = (model.depth(images)[:, :, :10] - 3).abs().mean()
    torch.testing.assert_close(losses["loss_0__L1"], expected)
    assert model.parse_losses(losses)[0] == 2 * losses["loss_0__L1"]


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_backbone_stays_as_it_is(frozen):
    model = tiny_model(frozen=frozen, backbone=dict(drop_path_rate=0.5)).train()
    assert model.backbone.training is not frozen
    assert model.decode_head.training
    recorded = []
    model.backbone.register_forward_pre_hook(lambda *_: recorded.append(torch.is_grad_enabled()))
    losses = model(torch.randn(1, 3, 64, 64), samples(1, 64, 64, depth=torch.ones(1, 1, 64, 64)), mode="loss")
    losses["loss_0__L1"].backward()
    assert recorded == [not frozen]
    assert all((p.grad is None) is frozen for p in model.backbone.blocks[0].parameters())
    assert all(p.grad is not None for p in model.decode_head.parameters())
    assert all(p.requires_grad is not frozen for p in model.backbone.parameters())
    assert any(name.startswith("backbone.") for name in model.state_dict())


def test_adapters_train_in_a_frozen_backbone():
    model = tiny_model(frozen=True, backbone=dict(lora=dict(rank=2))).train()
    losses = model(torch.randn(1, 3, 64, 64), samples(1, 64, 64, depth=torch.ones(1, 1, 64, 64)), mode="loss")
    losses["loss_0__L1"].backward()
    found = {name for name, p in model.backbone.named_parameters() if p.grad is not None}
    assert found == {name for name, _ in model.backbone.named_parameters() if ".lora_" in name}


def test_trained_backbone_takes_layer_decay():
    from mmengine.optim import build_optim_wrapper

    cfg = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW", lr=1.0),
        constructor="LayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    rates = {group["lr"] for group in build_optim_wrapper(tiny_model(frozen=False), cfg).optimizer.param_groups}
    assert rates == {0.5**k for k in range(6)}


@pytest.mark.parametrize("window", [None, 2])
def test_class_tokens_are_those_after_the_same_blocks(tiny, window):
    options = dict(window_size=window, global_attn_indexes=(1, 3)) if window else {}
    encoder = tiny(out_indices=(0, 3, 1), **options)
    images = torch.randn(2, 3, 64, 64)
    seen = {}
    for i, block in enumerate(encoder.blocks):
        block.register_forward_hook(lambda *args, i=i: seen.update({i: args[2]}))
    with torch.no_grad():
        maps, tokens = encoder.forward_with_class_tokens(images)
        plain = encoder(images)
    for i, x, token, same in zip((0, 3, 1), maps, tokens, plain, strict=True):
        torch.testing.assert_close(x, same, rtol=0, atol=0)
        torch.testing.assert_close(token, seen[i][:, 0].unflatten(0, (2, -1)).mean(1))


def test_encoder_without_class_token_gives_none(tiny):
    maps, tokens = tiny(class_token=False).forward_with_class_tokens(torch.randn(1, 3, 64, 64))
    assert (len(maps), tokens) == (1, ())


def test_head_sees_the_class_token(randomize):
    model = randomize(tiny_model(head=dict(type="BinsDepthHead", token="class", upsample=4))).eval()
    images = torch.randn(1, 3, 64, 64)
    seen = []
    model.decode_head.register_forward_hook(lambda *args: seen.append(args[1]))
    with torch.no_grad():
        model.depth(images)
        maps, tokens = model.backbone.forward_with_class_tokens(images)
    assert len(seen[0][0]) == len(seen[0][1]) == 4
    torch.testing.assert_close(seen[0][1], tokens)
    torch.testing.assert_close(seen[0][0], maps)


@pytest.mark.parametrize("depth", [12, 24, 50])
def test_named_layers_reach_the_last_block(depth):
    published = {12: [2, 5, 8, 11], 24: [5, 11, 17, 23], 50: [12, 24, 37, 49]}
    assert named_layers("even", depth) == published[depth]
    assert named_layers("late", depth) == {12: [7, 8, 10, 11], 24: [14, 17, 20, 23], 50: [31, 37, 43, 49]}[depth]
    assert named_layers("last", depth) == [depth - 1]


def test_backbone_of_timm():
    pytest.importorskip("timm")
    model = DepthEstimator(
        dict(type="PerceptionEncoder", variant="timm:vit_tiny_patch16_224", out_indices="late"),
        dict(type="DPTDepthHead", norm="batch"),
        losses=[],
    ).eval()
    assert model.backbone.out_indices == (7, 8, 10, 11)
    with torch.no_grad():
        assert model.infer(torch.randn(1, 3, 40, 64)).shape == (1, 1, 40, 64)


def test_hierarchical_backbone_of_mmsegmentation():
    model = MODELS.build(
        dict(
            type="PEDepthEstimator",
            backbone=dict(type="mmseg.ResNet", depth=18, num_stages=4, out_indices=(0, 1, 2, 3)),
            decode_head=dict(type="BinsDepthHead", in_channels=[64, 128, 256, 512]),
            losses=[],
        )
    ).eval()
    with torch.no_grad():
        assert model.infer(torch.randn(1, 3, 45, 64)).shape == (1, 1, 45, 64)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: tiny_model(
                backbone=dict(variant=dict(TINY, class_token=False)), head=dict(type="BinsDepthHead", token="class")
            ),
            "Backbone has no class token; set decode_head.token to 'mean'",
        ),
        (lambda: tiny_model(head=dict(type="BinsDepthHead", in_channels=[8])), "in_channels follows from the encoder"),
        (
            lambda: DepthEstimator(dict(type="mmseg.ResNet", depth=18), dict(type="BinsDepthHead"), losses=[]),
            "ResNet has no embed_dim; give decode_head.in_channels",
        ),
        (
            lambda: DepthEstimator(
                dict(type="mmseg.ResNet", depth=18, out_indices="even"), dict(type="BinsDepthHead"), losses=[]
            ),
            "out_indices is 'even', but mmseg.ResNet has no variant",
        ),
        (lambda: named_layers("first", 12), "out_indices is 'first'; allowed are block numbers and 'last', 'even'"),
        (lambda: grid_model(mode="slide_flip"), "test_cfg.mode is 'slide_flip'; allowed are 'whole', 'slide'"),
        (lambda: grid_model(mode="slide"), "mode 'slide' needs both"),
        (lambda: grid_model(mode="slide", crop_size=(4, 4), stride=(4, 5)), "would omit pixels"),
        (lambda: grid_model(crop_size=(4, 4)), "need mode 'slide'"),
    ],
)
def test_wrong_configs_are_named(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


def test_unknown_test_option_is_refused():
    with pytest.raises(TypeError, match="flips"):
        grid_model(flips=True)
