"""SAM 2.1 on a Perception Encoder: geometry of the trunk, shared parameters, the released flags and weights."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from pe_spatial import VARIANTS, EncoderConfig, PerceptionEncoder
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.layer_decay import lr_factors
from pe_spatial.encoder.lora_files import describe_adapters, omit_base
from pe_spatial.errors import ConfigError
from pe_spatial.tracking.sam2.model import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    PENeck,
    PETrunk,
    ResizingMaskDownSampler,
    build_pe_sam2,
    load_sam2_weights,
    load_tracker_weights,
)

pytest.importorskip("sam2")

TINY = EncoderConfig(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
TINY14 = replace(TINY, img_size=56, patch_size=14)
SMALL = dict(d_model=32, mem_dim=8, layers=1, feedforward=32)
WINDOWED = dict(window_size=4, global_attn_indexes=(1,), pos_embed_mode="tile", rope_mode="interpolate", rope_grid=4)


def normalized(images):
    """(B, 3, H, W) in the range 0 to 1, with ImageNet's statistics."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def without_trunk(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items() if ".trunk." not in name}


# -- trunk


@pytest.mark.parametrize(("config", "grid"), [(TINY, 4), (TINY, 3), (TINY14, 4), (TINY14, 2)])
def test_trunk_up_to_the_native_grid_is_the_released_encoder(randomize, config, grid):
    """Behind images in PE's normalization, at `grid` patches whatever their size."""
    trunk = randomize(PETrunk(config, grid=grid, image_size=16 * grid)).eval()
    encoder = PerceptionEncoder(config).eval()
    encoder.load_state_dict(trunk.encoder.state_dict())
    images = torch.rand(2, 3, 16 * grid, 16 * grid)
    (found,) = trunk(normalized(images))
    side = config.patch_size * grid
    pe = F.interpolate(images, (side, side), mode="bilinear", antialias=True) * 2 - 1
    (expected,) = encoder(pe)
    assert found.shape == (2, 32, grid, grid)
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_trunk_above_the_native_grid_sees_windows(randomize):
    """Every window of the pretraining grid is encoded as an image of its own would be, up to the global blocks."""
    config = replace(TINY, depth=12, class_token=False)
    trunk = randomize(PETrunk(config, grid=8, image_size=128, out_index=1)).eval()
    assert trunk.encoder.geometry.window_size == 4
    assert trunk.encoder.geometry.global_attn_indexes == (2, 5, 8, 11)
    assert (trunk.encoder.patch_size, trunk.encoder.geometry.mask_window_padding) == (16, False)
    images = normalized(torch.rand(1, 3, 128, 128))
    (whole,) = trunk(images)
    one = PETrunk(config, grid=4, image_size=64, out_index=1).eval()
    one.load_state_dict(trunk.state_dict())
    (part,) = one(images[..., 64:, :64])
    assert_close(whole[..., 4:, :4], part, rtol=1e-4, atol=1e-4)


def test_windows_that_do_not_divide_the_grid_are_masked_and_drop_path_is_off():
    trunk = PETrunk(replace(TINY, depth=12), grid=6, image_size=96)
    assert trunk.encoder.geometry.mask_window_padding
    assert {block.drop_path for block in trunk.encoder.blocks} == {0.0}


@pytest.mark.parametrize(
    ("variant", "grid", "window"),
    [
        ("pe_spatial_t16_512", 32, None),
        ("pe_spatial_t16_512", 64, 32),
        ("pe_spatial_b16_512", 72, 32),
        ("pe_spatial_l14_448", 32, None),
        ("pe_spatial_l14_448", 64, 32),
        ("pe_spatial_g14_448", 72, 32),
    ],
)
def test_released_variants_at_the_grids_of_sam(variant, grid, window):
    with torch.device("meta"):
        model = build_pe_sam2(variant, grid, layers=1)
    trunk = model.image_encoder.trunk
    assert trunk.encoder.geometry.window_size == window
    assert trunk.input_size == grid * VARIANTS[variant].patch_size
    assert (model.image_size, model.sam_image_embedding_size) == (16 * grid, grid)
    assert trunk.channel_list == [VARIANTS[variant].embed_dim]


def test_options_with_a_window_size_are_the_whole_geometry():
    plain = PETrunk(TINY, grid=8, image_size=128, options=dict(window_size=None)).encoder.geometry
    assert (plain.window_size, plain.pos_embed_mode, plain.rope_mode) == (None, "bilinear", "extrapolate")
    windowed = PETrunk(TINY, grid=8, image_size=128, options=WINDOWED).encoder.geometry
    assert (windowed.window_size, windowed.pos_embed_mode) == (4, "tile")
    added = PETrunk(TINY, grid=4, image_size=64, options=dict(grad_checkpointing=True)).encoder
    assert added.grad_checkpointing == {0: "full", 1: "full"}


def test_a_frozen_trunk_has_no_gradients_and_the_neck_has():
    model = build_pe_sam2(TINY, 4, **SMALL).train()
    trunk = model.image_encoder.trunk
    assert not any(parameter.requires_grad for parameter in trunk.parameters())
    assert not any(block.training for block in trunk.encoder.blocks)
    (output,) = trunk(torch.rand(1, 3, 64, 64))
    assert not output.requires_grad
    model.forward_image(torch.rand(1, 3, 64, 64))["backbone_fpn"][0].sum().backward()
    assert model.image_encoder.neck.pyramid.levels[0][0].weight.grad is not None


def test_a_trained_trunk_has_gradients_and_layers():
    model = build_pe_sam2(TINY, 4, frozen=False, **SMALL).train()
    trunk = model.image_encoder.trunk
    model.forward_image(torch.rand(1, 3, 64, 64))["vision_features"].sum().backward()
    assert all(parameter.grad is not None for parameter in trunk.parameters())
    factors = set(lr_factors(trunk.encoder, 0.5).values())
    assert factors == {0.5, 0.25, 0.125}
    half = build_pe_sam2(TINY, 4, encoder_options=dict(frozen_stages=1), **SMALL)
    assert [p.requires_grad for p in half.image_encoder.trunk.encoder.blocks[1].parameters()].count(False) == 0


def test_blocks_after_the_one_read_are_not_built():
    trunk = PETrunk(replace(TINY, depth=4), grid=4, image_size=64, out_index=-3)
    assert len(trunk.encoder.blocks) == 2
    assert trunk.encoder.frozen_stages == 2


# -- neck and model


def test_levels_come_from_fine_to_coarse_with_their_positions():
    model = build_pe_sam2(TINY14, 4, **SMALL)
    assert isinstance(model.image_encoder.neck, PENeck)
    out = model.forward_image(torch.rand(2, 3, 64, 64))
    # the mask decoder has already brought the two fine levels to its widths
    assert [tuple(x.shape) for x in out["backbone_fpn"]] == [(2, 4, 16, 16), (2, 8, 8, 8), (2, 32, 4, 4)]
    assert [tuple(x.shape) for x in out["vision_pos_enc"]] == [(2, 32, n, n) for n in (16, 8, 4)]
    assert_close(out["vision_features"], out["backbone_fpn"][-1])


def test_patches_of_14_and_16_share_everything_but_the_encoder():
    models = [build_pe_sam2(config, grid, **SMALL) for config in (TINY, TINY14) for grid in (2, 4)]
    models.append(build_pe_sam2(TINY14, 4, true_stride=True, **SMALL))
    names = [without_trunk(model) for model in models]
    assert len(names[0]) > 200
    assert all(other == names[0] for other in names[1:])
    assert {(model.image_size, model.backbone_stride) for model in models} == {(32, 16), (64, 16), (56, 14)}
    assert isinstance(models[-1].memory_encoder.mask_downsampler, ResizingMaskDownSampler)
    assert not isinstance(models[2].memory_encoder.mask_downsampler, ResizingMaskDownSampler)


def test_the_logical_stride_makes_patch_14_run_like_patch_16(randomize):
    """With an encoder that gives the same map, nothing behind it can tell one from the other."""
    sixteen, fourteen = (randomize(build_pe_sam2(config, 4, **SMALL)) for config in (TINY, TINY14))
    rest = {name: x for name, x in sixteen.state_dict().items() if ".trunk." not in name}
    assert not fourteen.load_state_dict(rest, strict=False).unexpected_keys
    features = torch.randn(1, 32, 4, 4)
    outs = []
    for model in (sixteen, fourteen):
        model.image_encoder.trunk.forward = lambda _: [features]
        with torch.no_grad():
            out = model.forward_image(torch.rand(1, 3, 64, 64))
            sam = model._use_mask_as_output(out["vision_features"], out["backbone_fpn"][:2], torch.ones(1, 1, 64, 64))
            tokens = [out["vision_features"].flatten(2).permute(2, 0, 1)]
            memory, _ = model._encode_new_memory(tokens, [(4, 4)], sam[4], sam[6], False)
        outs.append((sam[3], sam[5], memory))
    assert_close(outs[0], outs[1], rtol=0, atol=0)


def test_classes_and_flags():
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    class Mine(SAM2Base):
        pass

    assert type(build_pe_sam2(TINY, 4, **SMALL)) is SAM2Base
    assert type(build_pe_sam2(TINY, 4, cls=Mine, **SMALL)) is Mine
    video = build_pe_sam2(TINY, 4, cls="video", flags=dict(non_overlap_masks=True, num_maskmem=3), **SMALL)
    assert type(video) is SAM2VideoPredictor
    assert (video.non_overlap_masks, video.num_maskmem, len(video.maskmem_tpos_enc)) == (True, 3, 3)
    assert not video.training
    with pytest.raises(TypeError, match="no_such_flag"):
        build_pe_sam2(TINY, 4, flags=dict(no_such_flag=1), **SMALL)


# -- weights


@pytest.fixture(scope="module")
def released():
    """The package's own SAM 2.1, with random weights: its flags and the names in its checkpoints."""
    from sam2.build_sam import build_sam2

    return build_sam2("configs/sam2.1/sam2.1_hiera_t.yaml", device="cpu", apply_postprocessing=False)


def test_release_flags(released):
    ours = build_pe_sam2(TINY, 64, encoder_options=WINDOWED)
    simple = (bool, int, float, str, type(None))
    for a, b in [
        (released, ours),
        *((x, y) for (n, x), (m, y) in zip(inner(released), inner(ours), strict=True) if n == m),
    ]:
        found = {name: value for name, value in vars(b).items() if isinstance(value, simple)}
        assert found == {name: value for name, value in vars(a).items() if isinstance(value, simple)}


def inner(model):
    """All modules that are not the image encoder, by name."""
    return [(name, x) for name, x in model.named_modules() if name and not name.startswith("image_encoder")]


@pytest.mark.parametrize("grid", [32, 64])
def test_released_weights_load_at_every_grid(released, tmp_path, grid):
    state = {name: x.half() for name, x in released.state_dict().items() if not name.startswith("image_encoder.trunk")}
    assert any(name.startswith("image_encoder.") for name in state)
    torch.save({"model": state}, tmp_path / "sam2.1.pt")
    options = WINDOWED | dict(window_size=4)
    model = build_pe_sam2(TINY, grid, encoder_options=options)
    neck = model.image_encoder.neck.pyramid.levels[0][0].weight.clone()
    load_sam2_weights(model, tmp_path / "sam2.1.pt")
    found = model.state_dict()
    mine = [name for name in found if not name.startswith("image_encoder.")]
    assert len(mine) == len([name for name in state if not name.startswith("image_encoder.")]) > 250
    for name in mine:
        assert_close(found[name], state[name].float(), rtol=0, atol=0)
    assert_close(model.image_encoder.neck.pyramid.levels[0][0].weight, neck)


@pytest.fixture
def model():
    return build_pe_sam2(TINY, 4, **SMALL)


def test_weights_that_do_not_fit_are_listed_and_change_nothing(model, tmp_path):
    ours = {name: x for name, x in model.state_dict().items() if not name.startswith("image_encoder.")}
    state = {name: torch.ones_like(x) for name, x in ours.items()}
    del state["no_mem_embed"]
    state["strange"] = torch.zeros(1)
    state["maskmem_tpos_enc"] = torch.zeros(6, 1, 1, 8)
    torch.save({"model": state}, tmp_path / "sam2.pt")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        load_sam2_weights(model, tmp_path / "sam2.pt")
    for part in ("missing in the file: no_mem_embed", "strange", r"maskmem_tpos_enc (6, 1, 1, 8) in the file"):
        assert part in str(caught.value)
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_missing_file_is_one_sentence(model, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        load_sam2_weights(model, tmp_path / "absent.pt")


@pytest.mark.parametrize("prefix", ["", "sam2.", "module.tracker."])
def test_a_trained_tracker_loads_from_any_place_in_a_larger_model(model, randomize, tmp_path, prefix):
    trained = randomize(build_pe_sam2(TINY, 4, **SMALL))
    state = {prefix + name: x for name, x in trained.state_dict().items()}
    if prefix:
        state["data_preprocessor.mean"] = torch.zeros(3)
    torch.save({"state_dict": state, "meta": {"iter": 3}}, tmp_path / "trained.pth")
    load_tracker_weights(model, tmp_path / "trained.pth")
    assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)
    del state[f"{prefix}image_encoder.trunk.encoder.pos_embed"]
    torch.save(state, tmp_path / "trained.pth")
    with pytest.raises(CheckpointError, match=r"image_encoder\.trunk\.encoder\.pos_embed"):
        load_tracker_weights(model, tmp_path / "trained.pth")


def test_a_tracker_with_adapters_gets_the_base_of_its_encoder(randomize, tmp_path):
    torch.save(randomize(PerceptionEncoder(TINY)).state_dict(), tmp_path / "base.pt")
    options = dict(SMALL, encoder_options=dict(lora=dict(rank=2)))
    trained = build_pe_sam2(TINY, 4, checkpoint=tmp_path / "base.pt", **options)
    encoder = trained.image_encoder.trunk.encoder
    for name, parameter in encoder.named_parameters():
        assert parameter.requires_grad is (".lora_" in name)  # though it is frozen
    encoder.blocks[0].mlp.fc1.lora_b.data.normal_()
    state, facts = trained.state_dict(), describe_adapters(trained)
    omit_base(trained, facts, [state])
    facts = {f"tracker.{place}": about for place, about in facts.items()}
    state = {f"tracker.{name}": x for name, x in state.items()}
    assert not any("fc1.weight" in name for name in state)
    torch.save(dict(state_dict=state, meta=dict(lora=facts)), tmp_path / "trained.pth")
    model = build_pe_sam2(TINY, 4, **options)
    with pytest.raises(CheckpointError, match="which this model was not given; set init_cfg"):
        load_tracker_weights(model, tmp_path / "trained.pth")
    model.image_encoder.trunk.encoder.base_source = str(tmp_path / "base.pt")
    load_tracker_weights(model, tmp_path / "trained.pth")
    assert_close(model.state_dict(), trained.state_dict(), rtol=0, atol=0)


def test_the_encoders_own_checkpoint(tmp_path, tiny):
    encoder = tiny()
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    model = build_pe_sam2(encoder.config, 4, checkpoint=tmp_path / "encoder.pt", **SMALL)
    assert_close(model.image_encoder.trunk.encoder.state_dict(), encoder.state_dict(), rtol=0, atol=0)


# -- bad input


@pytest.mark.parametrize("grid", [0, -4, 4.0, True, (4, 4), None])
def test_grids_that_are_none(grid):
    with pytest.raises(ConfigError, match="number of tokens per side"):
        build_pe_sam2(TINY, grid, **SMALL)


@pytest.mark.parametrize("sizes", [dict(d_model=30), dict(mem_dim=6), dict(d_model=32, mem_dim=24)])
def test_widths_that_do_not_fit(sizes):
    with pytest.raises(ConfigError, match="must be a multiple of 8"):
        build_pe_sam2(TINY, 4, **(SMALL | sizes))


def test_other_errors_say_what_to_do(model):
    with pytest.raises(ConfigError, match="allowed are 'base', 'video' and subclasses"):
        build_pe_sam2(TINY, 4, cls="image", **SMALL)
    with pytest.raises(ConfigError, match="allowed are 'base', 'video' and subclasses"):
        build_pe_sam2(TINY, 4, cls=torch.nn.Module, **SMALL)
    with pytest.raises(ValueError, match="out of range for 2 blocks"):
        build_pe_sam2(TINY, 4, out_index=2, **SMALL)
    with pytest.raises(ValueError, match="unknown variant"):
        build_pe_sam2("pe_spatial_x16", 4)
    with pytest.raises(ValueError, match=r"images are \(1, 3, 64, 48\); resize to 64x64"):
        model.forward_image(torch.rand(1, 3, 64, 48))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sam2.modeling.backbones.image_encoder", None)
    with pytest.raises(ConfigError, match=r"pip install --no-build-isolation sam2==1\.1\.0"):
        build_pe_sam2(TINY, 4, **SMALL)


def test_memory_attention_begins_in_place():
    """Positions alone make a fresh tracker read the same place of a memory most; else it would be 1 / 256 of each."""
    torch.manual_seed(0)
    config = replace(TINY, img_size=256)
    model = build_pe_sam2(config, 16, **{**SMALL, "d_model": 128, "mem_dim": 32})
    attention = model.memory_attention.layers[0].cross_attn_image
    place = 5 * 16 + 9
    with torch.no_grad():
        torch.nn.init.eye_(attention.v_proj.weight)
        torch.nn.init.eye_(attention.out_proj.weight)
        attention.v_proj.bias.zero_()
        values = torch.zeros(1, 256, 32)
        values[0, place, 0] = 1
        read = attention(q=torch.zeros(1, 256, 128), k=torch.zeros(1, 256, 32), v=values)[0, :, 0]
        read -= attention.out_proj.bias[0]  # by every place, of this one
    rows, columns = (torch.arange(256) // 16 - 5).abs(), (torch.arange(256) % 16 - 9).abs()
    near, far = read[torch.maximum(rows, columns) <= 1].mean(), read[torch.maximum(rows, columns) > 4].mean()
    assert read[place] == read.max() > 10 / 256
    assert near > 5 * far


def test_a_folder_that_hides_the_package_is_named(tmp_path, monkeypatch):
    """A clone of the repository beside a notebook."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "sam2"]:
        monkeypatch.delitem(sys.modules, name)
    (tmp_path / "sam2").mkdir()
    (tmp_path / "sam2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=rf"No module named 'sam2.modeling'.*rename the folder {tmp_path}/sam2 if"):
        build_pe_sam2("pe_synthetic_xs8_192", 4)
    sys.modules.pop("sam2", None)
