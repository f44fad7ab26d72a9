"""timm's encoders behind the same interface: same maps from the same weights, frozen, decayed and loaded as ours."""

import sys

import pytest
import torch
from torch import nn
from torch.testing import assert_close

pytest.importorskip("mmengine")
pytest.importorskip("timm")
import timm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, MODELS

import pe_spatial.engine  # noqa: F401  (registers)
from pe_spatial import PerceptionEncoder
from pe_spatial.encoder.checkpoint import RELEASED_TO_OURS, CheckpointError, load_state
from pe_spatial.encoder.layer_decay import layer_of
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.openmmlab import build_encoder
from pe_spatial.integrations.timm import TimmEncoder

pytestmark = pytest.mark.mmdet
PE = "timm:vit_pe_spatial_tiny_patch16_512.fb"
TINY = "timm:test_vit.r160_in1k"  # of timm's own tests: 6 blocks, 64 channels, class token, last norm, grid of 10 x 10
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CLIP = (0.48145466, 0.4578275, 0.40821073)
NAMES = {
    "vit_small_patch14_dinov2.lvd142m": (384, 14, IMAGENET[0]),
    "vit_small_patch14_reg4_dinov2.lvd142m": (384, 14, IMAGENET[0]),
    "vit_small_patch16_dinov3.lvd1689m": (384, 16, IMAGENET[0]),
    "vit_base_patch16_siglip_512.v2_webli": (768, 16, (0.5, 0.5, 0.5)),
    "eva02_tiny_patch14_224.mim_in22k": (192, 14, CLIP),
    "vit_base_patch16_clip_224.openai": (768, 16, CLIP),
    "deit_tiny_distilled_patch16_224.fb_in1k": (192, 16, IMAGENET[0]),
    "vit_small_patch16_rope_mixed_224.naver_in1k": (384, 16, IMAGENET[0]),
}


@pytest.mark.parametrize("grid", [(32, 32), (20, 28)])
def test_equals_our_encoder_on_the_same_weights(randomize, grid):
    layers = (11, 0, 5)
    theirs = randomize(build_encoder(PE, out_indices=layers)).eval()
    ours = PerceptionEncoder("pe_spatial_t16_512", out_indices=layers, geometry="timm").eval()
    load_state(ours, theirs.model.state_dict())
    assert (theirs.embed_dim, theirs.patch_size, theirs.depth) == (ours.embed_dim, ours.patch_size, ours.depth)
    assert theirs.out_indices == ours.out_indices == layers
    images = torch.randn(1, 3, *(16 * n for n in grid))
    with torch.inference_mode():
        assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_builds_without_weights_and_gives_maps_of_the_right_stride(name):
    channels, patch, mean = NAMES[name]
    encoder = build_encoder(f"timm:{name}", out_indices=(3, 1))
    assert (encoder.embed_dim, encoder.patch_size, encoder.config.mean) == (
        channels, patch, tuple(round(255 * x, 4) for x in mean))  # fmt: skip
    assert len(encoder.blocks) == encoder.depth == 4
    maps = encoder(torch.randn(2, 3, 5 * patch, 3 * patch))
    maps[0].square().sum().backward()
    assert [name for name, p in encoder.named_parameters() if p.grad is None] == []  # DDP would stop at one
    assert [tuple(x.shape) for x in maps] == [(2, channels, 5, 3)] * 2
    tokens = encoder.forward_with_class_tokens(torch.randn(2, 3, 5 * patch, 3 * patch))[1]
    assert [tuple(x.shape) for x in tokens] == [(2, channels)] * 2 * encoder.num_prefix_tokens
    assert not any(name.startswith(("model.head", "model.attn_pool", "model.fc_norm")) for name in encoder.state_dict())


def test_maps_are_the_patches_of_the_layers_asked_for(randomize):
    """Against timm's own tokens: the order of out_indices, the class token stripped, rows and columns not swapped."""
    encoder = randomize(build_encoder(TINY, out_indices=(5, -5, 5), final_norm=False)).eval()
    full = timm.create_model("test_vit.r160_in1k", dynamic_img_size=True).eval()
    full.load_state_dict(encoder.model.state_dict(), strict=False)
    images = torch.randn(2, 3, 48, 80)
    with torch.inference_mode():
        maps, class_tokens = encoder.forward_with_class_tokens(images)
        x = full.norm_pre(full._pos_embed(full.patch_embed(images)))
        tokens = []
        for block in full.blocks:
            x = block(x)
            tokens.append(x)
    for got, token, i in zip(maps, class_tokens, (5, 1, 5), strict=True):
        assert_close(got.flatten(2).transpose(1, 2), tokens[i][:, 1:])
        assert_close(token, tokens[i][:, 0])
    assert got.shape == (2, 64, 3, 5)


def test_final_norm(randomize):
    raw = randomize(build_encoder(TINY, out_indices=(1, 5), final_norm=False)).eval()
    normed = build_encoder(TINY, out_indices=(1, 5)).eval()
    normed.model.load_state_dict(raw.model.state_dict(), strict=False)
    randomize(normed.model.norm)
    images = torch.randn(1, 3, 32, 32)
    for x, y in zip(raw(images), normed(images), strict=True):
        assert_close(normed.model.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), y)
    assert "model.norm.weight" not in raw.state_dict()
    # behind the pooling in timm, on the tokens here
    assert isinstance(build_encoder("timm:eva02_tiny_patch14_224.mim_in22k").model.norm, nn.LayerNorm)


def test_another_patch_size_keeps_learned_positions(randomize, tmp_path):
    full = randomize(timm.create_model("test_vit.r160_in1k"))
    torch.save(full.state_dict(), tmp_path / "full.pt")
    encoder = build_encoder(TINY, patch_size=8, init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "full.pt")))
    encoder.init_weights()
    assert_close(encoder.model.pos_embed, full.pos_embed)
    assert encoder.model.patch_embed.proj.weight.shape[-2:] == (8, 8)
    assert encoder(torch.randn(1, 3, 40, 24))[0].shape == (1, 64, 5, 3)
    with pytest.raises(ValueError, match="image size 40x20 is not a multiple of patch_size 8; pad or resize to 40x24"):
        encoder(torch.randn(1, 3, 40, 20))


def test_frozen_stages():
    encoder = build_encoder(TINY, frozen_stages=2, drop_path_rate=0.1).train()
    encoder(torch.randn(2, 3, 32, 32))[0].sum().backward()
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    blocks = ("model.blocks.0.", "model.blocks.1.", "model.patch_embed.", "model.cls_token", "model.pos_embed")
    assert frozen == {name for name, _ in encoder.named_parameters() if name.startswith(blocks)}
    assert all((p.grad is None) == (name in frozen) for name, p in encoder.named_parameters())
    assert [block.training for block in encoder.blocks] == [False] * 2 + [True] * 4
    everything = build_encoder(TINY, frozen_stages=6).train()
    assert not any(p.requires_grad for p in everything.parameters())
    assert not any(block.training for block in everything.blocks)
    with pytest.raises(ConfigError, match="frozen_stages is 4; -1"):
        build_encoder(TINY, out_indices=(2,), frozen_stages=4)


@pytest.mark.parametrize("frozen_stages", [-1, 2])
def test_checkpointing_leaves_outputs_and_gradients_unchanged(randomize, monkeypatch, frozen_stages):
    runs = []
    checkpoint = timm.models.vision_transformer.checkpoint
    monkeypatch.setattr(
        timm.models.vision_transformer, "checkpoint", lambda *args: (runs.append(1), checkpoint(*args))[1]
    )
    results = []
    for grad_checkpointing in (False, True):
        encoder = build_encoder(TINY, grad_checkpointing=grad_checkpointing, frozen_stages=frozen_stages)
        randomize(encoder).train()
        torch.manual_seed(0)
        out = encoder(torch.randn(1, 3, 32, 48))[0]
        out.square().sum().backward()
        results.append((out, {n: p.grad for n, p in encoder.named_parameters() if p.requires_grad}))
    assert len(runs) == 6
    assert_close(results[0], results[1])


class Detector(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.backbone = MODELS.build(
            dict(
                type="PerceptionEncoderPyramid", variant=TINY, pyramid=dict(strides=(8, 16), out_channels=8), **options
            )
        )
        self.head = nn.Conv2d(8, 1, 1)


def rates(model):
    wrapper = build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type="AdamW", lr=1.0, weight_decay=0.1),
            constructor="LayerDecayOptimWrapperConstructor",
            paramwise_cfg=dict(layer_decay_rate=0.5),
        ),
    )
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g["lr"] for g in wrapper.optimizer.param_groups for p in g["params"]}


def test_layer_decay_is_the_rule_of_ours():
    found = rates(Detector(frozen_stages=1))
    encoder = "backbone.encoder.model."
    assert not any(name.startswith((f"{encoder}blocks.0.", f"{encoder}pos_embed")) for name in found)
    found = rates(Detector())
    for name, lr in found.items():
        inside = name.startswith(encoder) and not name.startswith(f"{encoder}norm.")
        assert lr == (0.5 ** (7 - layer_of(name.removeprefix(encoder), 6)) if inside else 1.0)
    assert found[f"{encoder}pos_embed"] == 0.5**7
    for name in (
        "vit_small_patch14_reg4_dinov2",
        "deit_tiny_distilled_patch16_224",
        "vit_small_patch16_rope_mixed_224",
    ):
        with torch.device("meta"):
            model = build_encoder(f"timm:{name}", out_indices=(1,))
        layers = {model.layer_of(name) for name, _ in model.named_parameters()}
        assert layers == {0, 1, 2, 3}
        assert all(
            model.layer_of(name) == 0
            for name, _ in model.named_parameters()
            if not name.startswith(("model.blocks", "model.norm"))
        )


def test_pyramid_has_the_strides_of_what_it_replaces():
    maps = Detector(out_indices=(1, 3)).backbone(torch.randn(1, 3, 64, 32))
    assert [tuple(x.shape) for x in maps] == [(1, 8, 8, 4), (1, 8, 4, 2)]


@pytest.fixture
def released(randomize, tmp_path):
    full = randomize(timm.create_model("eva02_tiny_patch14_224.mim_in22k", depth=12))
    torch.save(full.state_dict(), tmp_path / "eva.pt")
    return full, tmp_path / "eva.pt"


def test_file_in_timms_layout_loads_once_and_strictly(released):
    full, path = released
    options = dict(out_indices=(1,), init_cfg=dict(type="Pretrained", checkpoint=str(path)))
    encoder = build_encoder("timm:eva02_tiny_patch14_224.mim_in22k", **options)
    encoder.init_weights()
    state = full.state_dict()
    for name, value in encoder.model.state_dict().items():
        assert_close(value, state[name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name])
    with torch.no_grad():
        encoder.model.pos_embed.fill_(7.0)
    encoder.init_weights()
    assert (encoder.model.pos_embed == 7.0).all()

    state.pop("blocks.1.norm1.bias")
    state["extra.weight"] = torch.zeros(3)
    state["cls_token"] = torch.zeros(1, 1, 5)
    torch.save(state, path)
    with pytest.raises(CheckpointError) as error:
        build_encoder("timm:eva02_tiny_patch14_224.mim_in22k", **options).init_weights()
    for text in (
        "missing in the file: blocks.1.norm1.bias",
        "unknown to the model: extra.weight",
        "cls_token (1, 1, 5)",
    ):
        assert text in str(error.value)
    with pytest.raises(CheckpointError, match=r"does not hold the weights of timm:test_vit"):
        build_encoder(TINY, init_cfg=dict(type="Pretrained", checkpoint=str(path))).init_weights()


def test_published_layouts_that_timm_converts(tmp_path):
    """Meta's own file of PE, in the released layout, through timm."""
    ours = PerceptionEncoder("pe_spatial_t16_512", geometry="timm").eval()
    names = {name.format(i): released.format(i) for released, name in RELEASED_TO_OURS.items() for i in range(12)}
    state = {names[name]: value for name, value in ours.state_dict().items()}
    state["class_embedding"] = state["class_embedding"].flatten()
    state["positional_embedding"] = state["positional_embedding"][0]
    torch.save(state, tmp_path / "PE-Spatial-T16-512.pt")
    init_cfg = dict(type="Pretrained", checkpoint=str(tmp_path / "PE-Spatial-T16-512.pt"))
    theirs = build_encoder(PE, init_cfg=init_cfg).eval()
    theirs.init_weights()
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert_close(theirs(images), ours(images), rtol=1e-4, atol=1e-4)


def test_released_weights_come_from_timms_hub_or_say_what_to_download(monkeypatch, released):
    import huggingface_hub

    asked = []

    def download(repo, filename, **_):
        asked.append((repo, filename))
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    options = dict(out_indices=(1,), init_cfg=dict(type="Pretrained", checkpoint="released"))
    encoder = build_encoder("timm:eva02_tiny_patch14_224.mim_in22k", **options)
    with pytest.raises(CheckpointError) as error:
        encoder.init_weights()
    assert set(asked) == {("timm/eva02_tiny_patch14_224.mim_in22k", "model.safetensors")}
    assert "download https://huggingface.co/timm/eva02_tiny_patch14_224.mim_in22k/resolve/main/model.safe" in str(
        error.value
    )
    assert "\n" not in str(error.value)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: str(released[1]))
    encoder.init_weights()
    assert_close(encoder.model.cls_token, released[0].cls_token)


def test_run_that_resumes_does_without_pretrained_weights(tmp_path):
    detector = Detector(init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "absent.pt")))
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        detector.backbone.init_weights()
    cfg = dict(resume=True, load_from="a.pth")
    HOOKS.build(dict(type="ResumeWithoutPretrained")).before_run(
        type("Runner", (), dict(cfg=cfg, work_dir=str(tmp_path), model=detector))
    )
    detector.backbone.init_weights()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_smal_patch14_dinov2", "knows no model 'vit_smal_patch14_dinov2'; nearest are vit_small_patch14_dinov2"),
        ("vit_small_patch14_dinov2.x", "knows no weights 'vit_small_patch14_dinov2.x'; known are .*lvd142m"),
        ("resnet50", "timm:resnet50 is not a plain vision transformer"),
        ("swin_tiny_patch4_window7_224", "is not a plain vision transformer"),
        ("beit_base_patch16_224", "is not a plain vision transformer that takes images of any size"),
        ("vit_tiny_r_s16_p8_224", "is not a plain vision transformer"),
    ],
)
def test_names_that_will_not_do(name, message):
    with pytest.raises(ConfigError, match=message):
        build_encoder(f"timm:{name}")


def test_options_that_will_not_do():
    with pytest.raises(ConfigError, match=r"test_vit.* has no geometry, window_size, unlike a Perception Encoder"):
        build_encoder(TINY, geometry="vitdet", window_size=32)
    assert isinstance(build_encoder(TINY, geometry=None), TimmEncoder)
    with pytest.raises(ConfigError, match=r"out_indices is \(6,\), out of range for 6 blocks"):
        build_encoder(TINY, out_indices=(6,))
    with pytest.raises(ConfigError, match="timm's encoders take True or False"):
        build_encoder(TINY, grad_checkpointing=[1])
    with pytest.raises(ConfigError, match="allowed are None and"):
        build_encoder(TINY, init_cfg=dict(type="Xavier"))


def test_absent_timm_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="needs timm, which is not installed; pip install timm"):
        build_encoder(TINY)


def test_registered_under_the_same_name_as_ours():
    assert isinstance(MODELS.build(dict(type="PerceptionEncoder", variant=TINY)), TimmEncoder)
    assert build_encoder("pe_spatial_t16_512").patch_size == 16
