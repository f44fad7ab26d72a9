"""DETA's checkpoints: the released file maps completely, its values arrive, and what is dropped or refused says why."""

import runpy
import sys
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.repository import REPO
from helpers.states import file, same_bits, shapes_of
from torch.testing import assert_close

from pe_spatial import EncoderConfig, PerceptionEncoder, from_pretrained
from pe_spatial.convert.converter import convert, to_mmdet, write_checkpoint
from pe_spatial.convert.rope_tables import RopeTables, detector_geometry
from pe_spatial.encoder.files import CheckpointError, CheckpointFile, read_checkpoint
from pe_spatial.encoder.pyramid import DETAFeaturePyramid

EXACT = {"rtol": 1e-4, "atol": 1e-5}
BODY = "backbone.0.body."
# detectron2@02b5c4e:detectron2/data/datasets/builtin_meta.py
CATEGORY_IDS = [
    *range(1, 12),
    *range(13, 26),
    27,
    28,
    *range(31, 45),
    *range(46, 66),
    67,
    70,
    *range(72, 83),
    *range(84, 91),
]
GEOMETRY = detector_geometry(pos_grid=24, window_size=24, rope_grid=16, blocks=(12, 24, 36, 49))
RELEASED = RopeTables(geometry=GEOMETRY, num_heads=16, image_grid=114)
SMALL = EncoderConfig(
    img_size=64,
    patch_size=16,
    embed_dim=48,
    depth=4,
    num_heads=3,
    mlp_ratio=8960 / 1536,
    class_token=False,
    init_values=0.1,
)


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "deta"


@pytest.fixture(scope="module")
def contract(folder):
    return read_json(folder / "contract_deta_coco_1824pix.json")


@pytest.fixture
def released(contract):
    """The released file, on the meta device."""
    return file({name: torch.empty(shape, device="meta") for name, shape in contract["keys"].items()})


@pytest.fixture
def reference(folder):
    """The small DETA, as the reference's trainer wrote it."""
    return read_checkpoint(checkpoint_file(folder / "deta.pth"))


@pytest.fixture
def arrays(folder):
    return {name: torch.from_numpy(value) for name, value in read_arrays(folder / "deta.npz").items()}


# --- the released file


def test_released_file_maps_completely(released, contract):
    done = convert(released, "mmdet")
    assert (done.kind, done.layout_in, done.layout_out) == ("DETA", "deta", "mmdet")
    rope = {name for name in released.state if "freqs" in name}
    heads = {
        name for name in released.state if name.startswith(("transformer.decoder.class_", "transformer.decoder.b"))
    }
    aliases = set(contract["aliases"]) | set(contract["aliases"].values())  # either may be called the first name
    assert heads < aliases
    assert done.dropped.keys() == rope | heads
    assert done.renamed.keys() | done.dropped.keys() == released.state.keys()
    assert len(set(done.renamed.values())) == len(done.renamed) == len(done.state)
    assert done.dropped[f"{BODY}rope_glb.freqs_cos"] == "rotary constants, computed here"
    assert done.dropped["transformer.decoder.class_embed.3.bias"] == "second name of class_embed.3.bias"
    assert done.rope == RELEASED
    assert done.notes == ["of 91 classes the 80 of COCO are kept; the last head keeps the objectness, its first"]
    classes = {f"bbox_head.cls_branches.{i}.{name}" for i in range(7) for name in ("weight", "bias")}
    assert done.resized.keys() == classes
    assert {done.state[name].shape[0] for name in classes} == {80}
    lost = 7 * 11 * (256 + 1)
    assert sum(value.numel() for value in done.state.values()) == contract["parameters"] - lost


def test_released_file_comes_back_with_all_classes(released):
    there = convert(released, "mmdet", all_classes=True)
    assert (there.resized, there.notes) == ({}, [])
    back = convert(file(there.state), "release")  # without the facts that travel with a file
    assert shapes_of(back.state) == shapes_of(released.state)
    assert back.rope == RELEASED
    assert back.added.keys() == there.dropped.keys()
    assert back.dropped == back.resized == {}


def test_dropped_classes_do_not_come_back(released):
    done = convert(released, "mmdet")
    with pytest.raises(CheckpointError, match=r"no way to release: .* of these it has 80; convert the"):
        convert(file(done.state), "release")
    assert shapes_of(convert(file(done.state), "mmdet").state) == shapes_of(done.state)


def test_released_encoder_and_pyramid_are_those_of_the_preset(released):
    state = convert(released, "mmdet").state
    home = {"encoder": "backbone.encoder.", "pyramid": "backbone.pyramid."}
    with torch.device("meta"):
        encoder = PerceptionEncoder("pe_spatial_g14_448", geometry="deta")
        pyramid = DETAFeaturePyramid(1536)
    for name, module in (("encoder", encoder), ("pyramid", pyramid)):
        found = {key.removeprefix(home[name]): value for key, value in state.items() if key.startswith(home[name])}
        assert shapes_of(found) == shapes_of(module.state_dict())


@pytest.mark.mmdet
def test_names_and_shapes_are_those_of_the_config(released):
    pytest.importorskip("mmdet")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings(["pe_spatial.detection"])
    init_default_scope("mmdet")
    cfg = Config.fromfile(REPO / "configs/_base_/models/deta_pe.py")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert shapes_of(convert(released, "mmdet").state) == shapes_of(model.state_dict())


# --- values


def test_encoder_and_pyramid_give_the_released_maps(reference, arrays):
    state = convert(reference, "mmdet").state
    geometry = {"window_size": 6, "global_attn_indexes": (1, 3), "pos_embed_mode": "tile", "rope_mode": "interpolate"}
    encoder = PerceptionEncoder(SMALL, pos_grid=6, rope_grid=4, **geometry).eval()
    pyramid = DETAFeaturePyramid(48)
    for module, home in ((encoder, "backbone.encoder."), (pyramid, "backbone.pyramid.")):
        module.load_state_dict({k.removeprefix(home): v for k, v in state.items() if k.startswith(home)})
    with torch.no_grad():
        levels = pyramid(encoder(arrays["input"]))
    assert_close(levels[0], arrays["backbone_p3"], **EXACT)
    assert_close(levels[1], arrays["backbone_p4"], **EXACT)
    assert_close(levels[2], F.max_pool2d(arrays["backbone_p4"], 2), **EXACT)


def test_reference_numbers_come_out_under_our_names(reference, arrays):
    """Each part is computed from the reference's input of it; logits of the kept classes alone."""
    state = convert(reference, "mmdet").state

    def part(x, name, **options):
        function = F.linear if state[f"{name}.weight"].ndim == 2 else F.conv2d
        return function(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def norm(x, name):
        return F.group_norm(x, 32, state[f"{name}.weight"], state[f"{name}.bias"])

    p3, p4 = arrays["backbone_p3"], arrays["backbone_p4"]
    convs = [norm(part(x, f"neck.convs.{i}.conv"), f"neck.convs.{i}.gn") for i, x in enumerate((p3, p4))]
    p5 = F.max_pool2d(p4, 2)
    convs.append(norm(part(p5, "neck.convs.2.conv"), "neck.convs.2.gn"))
    for i in range(2):
        x = part(p5 if i == 0 else convs[-1], f"neck.extra_convs.{i}.conv", stride=2, padding=1)
        convs.append(norm(x, f"neck.extra_convs.{i}.gn"))
    tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in convs], dim=1)
    assert_close(tokens, arrays["input_proj_tokens"], **EXACT)

    hidden = arrays["decoder_hidden"]
    for layer, name in ((0, "aux0_pred_logits"), (1, "pred_logits")):
        assert_close(part(hidden[layer], f"bbox_head.cls_branches.{layer}"), arrays[name][..., CATEGORY_IDS], **EXACT)
    memory = arrays["memory"].masked_fill(arrays["token_is_invalid"][..., None], 0.0)
    weight, bias = state["memory_trans_norm.weight"], state["memory_trans_norm.bias"]
    memory = F.layer_norm(part(memory, "memory_trans_fc"), (64,), weight, bias)
    proposals = part(memory, "bbox_head.cls_branches.2")
    assert_close(proposals[..., 0], arrays["enc_objectness"], **EXACT)
    assert_close(proposals[:, ::16], arrays["enc_logits_every16"][..., :80], **EXACT)
    x = part(hidden[0], "bbox_head.reg_branches.0.0").relu()
    x = part(part(x, "bbox_head.reg_branches.0.2").relu(), "bbox_head.reg_branches.0.4")
    start = arrays["init_reference"].clamp(1e-5, 1 - 1e-5)
    assert_close((x + (start / (1 - start)).log()).sigmoid(), arrays["decoder_references"][0], **EXACT)


def test_values_go_by_name(reference):
    """Above all those whose shapes would let them change places."""
    there = convert(reference, "mmdet")
    for before, after in {
        "transformer.encoder.layers.1.norm1.bias": "encoder.layers.1.norms.0.bias",
        "transformer.encoder.layers.1.norm2.bias": "encoder.layers.1.norms.1.bias",
        "transformer.decoder.layers.1.norm2.bias": "decoder.layers.1.norms.0.bias",  # after self-attention
        "transformer.decoder.layers.1.norm1.bias": "decoder.layers.1.norms.1.bias",  # after cross-attention
        "transformer.decoder.layers.1.norm3.bias": "decoder.layers.1.norms.2.bias",
        "transformer.decoder.layers.0.self_attn.in_proj_bias": "decoder.layers.0.self_attn.attn.in_proj_bias",
        "transformer.decoder.layers.0.cross_attn.value_proj.weight": "decoder.layers.0.cross_attn.value_proj.weight",
        "transformer.decoder.layers.0.cross_attn.output_proj.weight": "decoder.layers.0.cross_attn.output_proj.weight",
        "transformer.pos_trans_norm.bias": "pos_trans_norm.bias",
        "transformer.pix_trans_norm.bias": "pix_trans_norm.bias",
        "transformer.enc_output_norm.bias": "memory_trans_norm.bias",
        "bbox_embed.2.layers.1.weight": "bbox_head.reg_branches.2.2.weight",
        "input_proj.4.1.bias": "neck.extra_convs.1.gn.bias",
    }.items():
        assert there.renamed[before] == after
        assert there.state[after].data_ptr() == reference.state[before].data_ptr()  # renaming copies nothing


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_bit_identical(reference, tmp_path, suffix, dtype):
    state = {name: value.to(dtype) for name, value in reference.state.items()}
    there = convert(CheckpointFile(reference.path, state, reference.rest), "pe_spatial", all_classes=True)
    assert {"epoch", "args"} < there.dropped.keys()
    assert (there.rope.geometry.window_size, there.rope.image_grid, there.rope.geometry.rope_grid) == (6, 16, 4)
    assert there.rope.geometry.global_attn_indexes == (1, 3)
    write_checkpoint(tmp_path / f"ours{suffix}", there)
    back = convert(read_checkpoint(tmp_path / f"ours{suffix}"), "release")
    write_checkpoint(tmp_path / f"theirs{suffix}", back)
    same_bits(read_checkpoint(tmp_path / f"theirs{suffix}").state, state)
    if suffix == ".pth":
        assert torch.load(tmp_path / "theirs.pth", weights_only=True).keys() == {"model"}
        same_bits(convert(reference, "release").state, reference.state)


def test_to_mmdet_takes_the_released_file_and_leaves_ours(reference):
    ours = to_mmdet(reference)
    same_bits(ours, convert(reference, "mmdet").state)
    assert to_mmdet(file(ours)) == ours


@pytest.mark.parametrize("classes", [3, 366])
def test_other_class_counts_stay_and_come_back(reference, classes):
    state = {
        name: torch.randn(classes, *value.shape[1:]) if "class_embed" in name else value
        for name, value in reference.state.items()
    }
    for name in list(state):
        if name.startswith("class_embed"):
            state[f"transformer.decoder.{name}"] = state[name]
    there = convert(file(state), "mmdet")
    assert there.resized == {}
    assert there.state["bbox_head.cls_branches.2.bias"].shape == (classes,)
    back = convert(file(there.state, meta={"pe_spatial": asdict(there.rope)}), "release")
    same_bits(back.state, state)


def test_geometry_that_is_not_the_preset_is_said(reference, released):
    assert convert(reference, "mmdet").notes[1] == (
        "the geometry of its encoder is not 'deta': window_size=6, rope_grid=4, pos_grid=6, global_attn_indexes=(1, 3)"
    )
    tables = replace(RELEASED, geometry=replace(GEOMETRY, rope_grid=24)).build("deta", 1536, 50)  # the bug fixed
    fixed = convert(file(released.state | tables), "mmdet")
    assert fixed.rope.geometry.rope_grid == 24
    assert "rope_grid=24, pos_grid=24" in fixed.notes[1]
    other = replace(RELEASED, image_grid=64, dtype="bfloat16")  # 1024 pixels
    assert len(convert(file(released.state | other.build("deta", 1536, 50)), "mmdet").notes) == 1


def test_tables_of_no_known_geometry_are_left_out_and_said(reference):
    done = convert(file(convert(reference, "mmdet", all_classes=True).state), "release")
    assert not any("rope" in name for name in done.state)
    assert "Meta's DETA computes them itself" in done.notes[0]


# --- the encoder alone


def test_encoder_is_taken_out_of_the_released_detector(reference, tmp_path):
    expected = convert(reference, "mmdet").state
    torch.save({"model": expected}, tmp_path / "ours.pth")
    for path in (reference.path, tmp_path / "ours.pth"):
        weights = from_pretrained(path, variant=SMALL, pos_grid=6).state_dict()
        same_bits(weights, {name: expected[f"backbone.encoder.{name}"] for name in weights})


def test_released_file_tells_variant_patches_and_grid_of_its_encoder(released, tmp_path):
    torch.save({"model": released.state}, tmp_path / "deta.pth")
    encoder = from_pretrained(tmp_path / "deta.pth")
    assert (encoder.variant, encoder.patch_size, encoder.geometry.pos_grid) == ("pe_spatial_g14_448", 16, 24)
    assert from_pretrained(tmp_path / "deta.pth", geometry="deta").geometry.window_size == 24


# --- what is refused


def put(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("transformer.surprise", torch.ones(1)), "only in the file: transformer.surprise; missing in it: nothing"),
        (lambda s: s.pop("transformer.pix_trans.bias"), "missing in it: transformer.pix_trans.bias; .* of this DETA"),
        (lambda s: s.pop("class_embed.2.bias"), "only in the file: .*decoder.class_embed.2.bias; .*: class_embed.2"),
        (put("class_embed.1.bias", torch.ones(90)), "decoder.class_embed.1.bias and class_embed.1.bias should be one"),
        (put(f"{BODY}class_embedding", torch.ones(48)), f"only in the file: {BODY}class_embedding"),
        (put("input_proj.0.0.weight", torch.ones(64, 48, 1, 1)), r"is \(64, 48, 1, 1\) but should be \(c, e/2, 1, 1\)"),
        (put("transformer.level_embed", torch.ones(4, 64)), r"is \(4, 64\) but should be \(5, c\)"),
        (put(f"{BODY}positional_embedding", torch.ones(36, 48)), r"is \(36, 48\) but should be \(1, n, e\)"),
        (lambda s: s[f"{BODY}rope_glb.freqs_sin"].add_(2e-5), "another geometry: .*freqs_sin differs by 2e-05"),
        (lambda s: s.pop(f"{BODY}rope_win.freqs_cos"), "rope_win and rope_glb are not both matrices"),
    ],
)  # fmt: skip
def test_file_that_does_not_fit_is_refused(reference, change, words):
    state = {name: value.clone() for name, value in reference.state.items()}
    change(state)
    with pytest.raises(CheckpointError, match=words) as error:
        convert(file(state), "mmdet")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("layout", ["detectron2", "timm"])
def test_no_way_to_projects_without_deta(reference, layout):
    for state in (reference.state, convert(reference, "mmdet").state):
        with pytest.raises(CheckpointError, match=f"is a DETA and {layout} has none; convert it to mmdet or release"):
            convert(file(state), layout)


# --- the command line


@pytest.mark.parametrize("options", [[], ["--all-classes"]])
def test_tool_says_what_became_of_the_classes(folder, tmp_path, monkeypatch, capsys, options):
    out = tmp_path / "ours.pth"
    tool = REPO / "tools" / "convert_checkpoint.py"
    source = str(checkpoint_file(folder / "deta.pth"))
    monkeypatch.setattr(sys, "argv", [str(tool), source, str(out), "--to", "mmdet", *options])
    runpy.run_path(str(tool), run_name="__main__")
    printed = capsys.readouterr().out
    classes = read_checkpoint(out).state["bbox_head.cls_branches.0.bias"].shape[0]
    assert classes == (91 if options else 80)
    assert ("of 91 classes the 80 of COCO are kept" in printed) == (not options)
    assert "resized: none" in printed if options else "(91,) -> (80,)" in printed
    assert "second name of class_embed.{0-2}.{weight,bias}" in printed
    assert "encoder.layers.{0-1}.ffn.layers.0.0.{weight,bias}" in printed
