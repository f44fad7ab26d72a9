"""Conversion: every layout maps tensor by tensor and comes back bit for bit; all else is refused in one sentence."""

import json
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden import checkpoint_file, read_arrays, read_json
from helpers.repository import REPO
from helpers.states import file, same_bits, shapes_of
from torch.testing import assert_close

from pe_spatial import VARIANTS, PerceptionEncoder, SimpleFeaturePyramid
from pe_spatial.convert.converter import convert, to_mmdet, write_checkpoint
from pe_spatial.convert.rope_tables import RopeTables, detector_geometry
from pe_spatial.encoder.files import CheckpointError, CheckpointFile, read_checkpoint
from pe_spatial.encoder.resize import resize_patch_kernel
from pe_spatial.encoder.variants import RELEASED_NAMES

TOOL = REPO / "tools" / "convert_checkpoint.py"
SUFFIXES = (".pth", ".pt", ".safetensors")
DETECTORS = ("maskrcnn", "cascade")
CONTRACTS = (
    "mask_rcnn_PEcore_G_coco75ep",
    "mask_rcnn_PEcore_G_lvis75ep",
    "mask_rcnn_PEspatial_G_coco36ep",
    "mask_rcnn_PEspatial_G_lvis75ep",
    "unreleased_cascade_PEspatial_G_coco",
    "unreleased_cascade_PEspatial_G_lvis",
)


def empty(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def detectors(golden):
    return {name: checkpoint_file(golden / "maskrcnn" / f"{name}.pth") for name in DETECTORS}


@pytest.fixture(scope="module")
def contracts(golden):
    folder = golden / "maskrcnn"
    stored = [path.name.removeprefix("contract_").partition(".")[0] for path in folder.glob("contract_*.json*")]
    assert sorted(stored) == sorted(CONTRACTS)
    return {name: read_json(folder / f"contract_{name}.json")["keys"] for name in CONTRACTS}


@pytest.fixture
def reference(detectors):
    """The small Mask R-CNN, as the reference's trainer wrote it."""
    return read_checkpoint(detectors["maskrcnn"])


@pytest.fixture
def ours(reference):
    """The same, in MMDetection's names."""
    return convert(reference, "mmdet").state


# --- names and shapes


@pytest.mark.parametrize("name", CONTRACTS)
@pytest.mark.parametrize("facts", [True, False])
def test_every_released_detector_maps_and_comes_back(contracts, name, facts):
    """Without the facts that travel with a file, the released recipe says what rotary tables to write."""
    keys = {key: tuple(shape) for key, shape in contracts[name].items()}
    there = convert(file(empty(keys)), "mmdet")
    rope = {key for key in keys if "rope" in key}
    assert there.dropped.keys() == rope
    assert there.renamed.keys() == keys.keys() - rope
    assert len(there.state) == len(set(there.renamed.values())) == len(keys) - len(rope)
    geometry = detector_geometry(pos_grid=32, window_size=32, rope_grid=32, blocks=(12, 24, 36, 49))
    assert there.rope == RopeTables(geometry=geometry, num_heads=16, image_grid=64)
    rest = {"meta": {"pe_spatial": asdict(there.rope)}} if facts else {}
    back = convert(file(there.state, **rest), "detectron2")
    assert shapes_of(back.state) == keys
    assert back.added.keys() == rope
    assert back.dropped == {}
    assert {there.renamed[new] for new in back.renamed.values()} == set(back.renamed)


@pytest.mark.mmdet
def test_names_and_shapes_are_those_of_the_config(contracts):
    pytest.importorskip("mmdet")
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope
    from mmengine.utils import import_modules_from_strings

    def model(name):
        cfg = Config.fromfile(REPO / "configs" / f"{name}.py")
        init_default_scope(cfg.default_scope)
        import_modules_from_strings(**cfg.custom_imports)
        with torch.device("meta"):
            return shapes_of(MODELS.build(cfg.model).state_dict())

    released = convert(file(empty(contracts["mask_rcnn_PEspatial_G_coco36ep"])), "mmdet")
    assert shapes_of(released.state) == model("pe_spatial_maskrcnn_coco_g14")
    cascade = shapes_of(convert(file(empty(contracts["unreleased_cascade_PEspatial_G_coco"])), "mmdet").state)
    single = model("pe_spatial_cascade_coco_g14")
    assert {k: v for k, v in cascade.items() if "mask_head" not in k} == {
        k: v for k, v in single.items() if "mask_head" not in k
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_released_encoder_maps_and_comes_back(golden, variant):
    shapes = read_json(golden / "encoder/release_state_dicts.json")[RELEASED_NAMES[variant]]
    with torch.device("meta"):
        expected = shapes_of(PerceptionEncoder(variant).state_dict())
    there = convert(file(empty(shapes)), "pe_spatial")
    assert shapes_of(there.state) == expected
    assert there.renamed.keys() | there.dropped.keys() == shapes.keys()
    assert bool(there.dropped) == ("_core_" in variant)  # attention pooling
    for layout in ("timm", "mmdet"):
        assert shapes_of(convert(file(empty(shapes)), layout).state) == expected
    back = convert(file(there.state), "release")
    assert shapes_of(back.state) == {name: tuple(shapes[name]) for name in there.renamed}

    initial = convert(file(empty(shapes)), "detectron2")
    assert initial.state["positional_embedding"].ndim == 3
    assert initial.state["conv1.weight"].shape[-1] == 16
    assert bool(initial.resized) == (VARIANTS[variant].patch_size == 14)
    again = file(convert(file(initial.state), "pe_spatial").state)
    for layout in ("release", "timm"):
        if initial.resized:
            with pytest.raises(CheckpointError, match=f"no way to {layout}: its patch kernel was resized to 16 pixels"):
                convert(again, layout)
        else:
            assert convert(again, layout).layout_out == layout


def test_contrastive_names_lose_their_prefix_and_the_text_tower(golden):
    shapes = read_json(golden / "encoder/release_state_dicts.json")["PE-Core-T16-384"]
    text = {"positional_embedding": [32, 512], "transformer.resblocks.0.ln_1.bias": [512], "logit_scale": []}
    both = {f"visual.{name}": shape for name, shape in shapes.items()} | text
    for prefix in ("", "module."):
        done = convert(file(empty({prefix + name: shape for name, shape in both.items()})), "release")
        assert done.state.keys() == {name for name in shapes if not re.match("proj$|ln_post|attn_pool", name)}
        assert {done.dropped[prefix + name] for name in text} == {"text tower"}
        assert done.dropped[f"{prefix}visual.proj"] == "projection into the text space"


# --- values


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_detector_round_trip_is_bit_identical(detectors, tmp_path, name, suffix, dtype):
    source = read_checkpoint(detectors[name])
    state = {key: value.to(dtype) for key, value in source.state.items()}
    there = convert(CheckpointFile(source.path, state, source.rest), "pe_spatial")
    assert there.dropped["trainer"] == there.dropped["iteration"] == "training state or description, not weights"
    assert there.rope.geometry.global_attn_indexes == (1, 3)
    size = write_checkpoint(tmp_path / f"ours{suffix}", there)
    (tmp_path / "usual").touch()
    assert (tmp_path / f"ours{suffix}").stat().st_size == size
    assert (tmp_path / f"ours{suffix}").stat().st_mode == (tmp_path / "usual").stat().st_mode
    back = convert(read_checkpoint(tmp_path / f"ours{suffix}"), "release")
    assert (back.layout_in, back.layout_out) == ("mmdet", "detectron2")
    assert back.dropped == {}
    write_checkpoint(tmp_path / f"theirs{suffix}", back)
    same_bits(read_checkpoint(tmp_path / f"theirs{suffix}").state, state)
    if suffix != ".safetensors":
        assert torch.load(tmp_path / f"theirs{suffix}", weights_only=True).keys() == {"model"}
        assert torch.load(tmp_path / f"ours{suffix}", weights_only=True).keys() == {"state_dict", "meta"}


def test_reference_numbers_come_out_under_our_names(ours, golden):
    """Each part is computed from the reference's input of it, with the weights that our names give."""
    arrays = {k: torch.from_numpy(v) for k, v in read_arrays(golden / "maskrcnn/maskrcnn.npz").items()}

    def part(x, name, **options):
        function = {2: F.linear, 4: F.conv2d}[ours[f"{name}.weight"].ndim]
        return function(x, ours[f"{name}.weight"], ours.get(f"{name}.bias"), **options)

    def convs(x, name):
        for k in range(4):
            x = part(x, f"{name}.{k}.conv", padding=1).movedim(1, -1)
            norm = ours[f"{name}.{k}.ln.weight"], ours[f"{name}.{k}.ln.bias"]
            x = F.layer_norm(x, x.shape[-1:], *norm, eps=1e-6).movedim(-1, 1).relu()
        return x

    pyramid = SimpleFeaturePyramid(48, out_channels=32)
    home = "backbone.pyramid."
    pyramid.load_state_dict({k.removeprefix(home): v for k, v in ours.items() if k.startswith(home)})
    with torch.no_grad():
        p2, *others = pyramid(arrays["last_feat"])
    for name, found in zip(("p2_even", "p3", "p4", "p5", "p6"), (p2[..., ::2, ::2], *others), strict=True):
        assert_close(found, arrays[name], rtol=0, atol=1e-4)

    x = arrays["p3"]
    for k in range(2):
        x = part(x, f"rpn_head.rpn_conv.{k}.conv", padding=1).relu()
    assert_close(part(x, "rpn_head.rpn_cls"), arrays["rpn_logits_p3"], rtol=0, atol=1e-4)
    assert_close(part(x, "rpn_head.rpn_reg"), arrays["rpn_deltas_p3"], rtol=0, atol=1e-4)

    rows, head = arrays["box_pooled_rows"], "roi_head.bbox_head"
    x = part(convs(arrays["box_pooled"], f"{head}.shared_convs").flatten(1), f"{head}.shared_fcs.0").relu()
    assert_close(part(x, f"{head}.fc_cls"), arrays["stage0_cls_logits"][rows], rtol=0, atol=1e-4)
    assert_close(part(x, f"{head}.fc_reg"), arrays["stage0_box_deltas"][rows], rtol=0, atol=1e-4)

    x, head = convs(arrays["mask_pooled_first2"], "roi_head.mask_head.convs"), "roi_head.mask_head"
    x = F.conv_transpose2d(x, ours[f"{head}.upsample.weight"], ours[f"{head}.upsample.bias"], stride=2).relu()
    masks = part(x, f"{head}.conv_logits")[torch.arange(2), arrays["det_0_classes"][:2]]
    assert_close(masks, arrays["det_0_mask_logits"][:2], rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", DETECTORS)
def test_detector_keeps_its_values_by_name(detectors, name):
    source = read_checkpoint(detectors[name])
    there = convert(source, "mmdet")
    stage = "" if name == "maskrcnn" else ".2"
    for before, after in {
        "backbone.net.transformer.resblocks.3.mlp.c_proj.bias": "backbone.encoder.blocks.3.mlp.fc2.bias",
        "backbone.simfp_2.4.norm.bias": "backbone.pyramid.levels.0.5.bias",
        "backbone.simfp_5.2.norm.weight": "backbone.pyramid.levels.3.4.weight",
        "proposal_generator.rpn_head.conv.conv1.bias": "rpn_head.rpn_conv.1.conv.bias",
        f"roi_heads.box_head{stage}.conv4.norm.weight": f"roi_head.bbox_head{stage}.shared_convs.3.ln.weight",
        f"roi_heads.box_predictor{stage}.bbox_pred.weight": f"roi_head.bbox_head{stage}.fc_reg.weight",
        "roi_heads.mask_head.mask_fcn2.weight": "roi_head.mask_head.convs.1.conv.weight",
    }.items():
        assert there.renamed[before] == after
        assert there.state[after].data_ptr() == source.state[before].data_ptr()  # renaming copies nothing
    same_bits(to_mmdet(source), there.state)


def test_another_layout_passes_to_mmdet_as_it_is(ours, golden):
    encoder = read_checkpoint(checkpoint_file(golden / "encoder/encoder_cls_p16.pt")).state
    for state in (ours, {"neck.weight": torch.ones(1)}, encoder):
        assert to_mmdet(file(state)) == state


@pytest.mark.parametrize("name", ["cls_p16", "nocls_layerscale_p14"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_encoder_round_trip_is_bit_identical(golden, tmp_path, name, suffix):
    source = read_checkpoint(checkpoint_file(golden / f"encoder/encoder_{name}.pt"))
    for way in ("pe_spatial", "timm"):
        write_checkpoint(tmp_path / f"{way}{suffix}", convert(source, way))
        write_checkpoint(tmp_path / f"back{suffix}", convert(read_checkpoint(tmp_path / f"{way}{suffix}"), "release"))
        same_bits(read_checkpoint(tmp_path / f"back{suffix}").state, source.state)
    if suffix != ".safetensors":
        bare = torch.load(tmp_path / f"back{suffix}", weights_only=True)  # as released
        assert bare.keys() == source.state.keys()


@pytest.mark.parametrize("name", ["cls_p16", "nocls_layerscale_p14"])
def test_encoder_through_detectron2(golden, tmp_path, name):
    source = read_checkpoint(checkpoint_file(golden / f"encoder/encoder_{name}.pt"))
    write_checkpoint(tmp_path / "d2.pth", convert(source, "detectron2"))
    there = read_checkpoint(tmp_path / "d2.pth")
    direct, around = convert(source, "pe_spatial").state, convert(there, "pe_spatial").state
    direct["patch_embed.proj.weight"] = resize_patch_kernel(direct["patch_embed.proj.weight"], 16)
    same_bits(around, direct)
    same_bits(convert(file(around), "detectron2").state, there.state)


def test_initialisation_of_the_reference_detectors_is_reproduced(golden):
    """The fixture has no block, which makes an encoder of it."""
    arrays = read_arrays(golden / "maskrcnn/convert.npz")
    shapes = {"attn.in_proj_weight": (18, 6), "attn.in_proj_bias": (18,), "attn.out_proj.weight": (6, 6)}
    shapes |= {"mlp.c_fc.weight": (24, 6), "mlp.c_fc.bias": (24,), "mlp.c_proj.weight": (6, 24)}
    others = ("attn.out_proj.bias", "mlp.c_proj.bias", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias")
    shapes |= dict.fromkeys(others, (6,))
    block = {f"module.visual.transformer.resblocks.0.{name}": torch.randn(shape) for name, shape in shapes.items()}
    given = {name[3:]: torch.from_numpy(arrays[name]) for name in arrays if name.startswith("in/")}
    done = convert(file(given | block | {"module.visual.ln_pre.bias": torch.zeros(6)}), "detectron2")
    for name in ("conv1.weight", "positional_embedding", "ln_pre.weight"):
        assert_close(done.state[name], torch.from_numpy(arrays[f"keep_pe/{name}"]), rtol=0, atol=1e-6)
    assert done.resized == {"conv1.weight": "(6, 3, 14, 14) -> (6, 3, 16, 16)"}
    assert done.dropped == {"module.logit_scale": "text tower"}


def test_training_state_is_dropped_by_name(ours, tmp_path):
    rest = {"meta": {"iter": 3}, "message_hub": {}, "optimizer": {"state": {}}, "param_schedulers": []}
    torch.save({"state_dict": ours, **rest}, tmp_path / "iter_3.pth")
    done = convert(read_checkpoint(tmp_path / "iter_3.pth"), "mmdet")
    assert done.dropped.keys() == rest.keys()
    same_bits(done.state, ours)


def test_tables_of_no_known_geometry_are_left_out_and_said(ours, reference):
    done = convert(file(ours), "detectron2")  # a detector of other shapes, trained here
    assert not any("rope" in name for name in done.state)
    assert done.state.keys() == {name for name in reference.state if "rope" not in name}
    assert "rotary tables are omitted" in done.notes[0]


def test_views_do_not_take_their_storage_to_the_file(golden, tmp_path):
    state = read_checkpoint(checkpoint_file(golden / "encoder/encoder_cls_p16.pt")).state
    used = sum(value.nbytes for value in state.values())
    whole = torch.cat([value.flatten() for value in state.values()] + [torch.zeros(used)])
    parts = torch.split(whole, [value.numel() for value in state.values()] + [used])
    views = {name: part.view(value.shape) for (name, value), part in zip(state.items(), parts, strict=False)}
    tied = views | {"ln_pre.bias": views["ln_pre.weight"]}
    for suffix in SUFFIXES:
        size = write_checkpoint(tmp_path / f"w{suffix}", convert(file(views), "pe_spatial"))
        assert size < 1.5 * used
        write_checkpoint(tmp_path / f"w{suffix}", convert(file(tied), "release"))
        same_bits(read_checkpoint(tmp_path / f"w{suffix}").state, tied)


# --- what is refused


NET, BLOCK = "backbone.net.", "backbone.net.transformer.resblocks."
FC, CLASSES, BOXES = (f"roi_heads.box_{name}" for name in ("head.fc1", "predictor.cls_score", "predictor.bbox_pred"))


def put(name, value):
    return lambda state: state.update({name: value})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (put("roi_heads.surprise", torch.ones(1)), "roi_heads.surprise; .*: nothing.*detectors that convert are Mask"),
        (lambda s: s.pop(f"{FC}.bias"), f"only in the file: nothing; missing in it: {FC}.bias"),
        (lambda s: [s.pop(k) for k in list(s) if "mask" in k], "missing in it: .*mask_fcn1.weight.* and 8 more"),
        (put(f"{NET}class_embedding", torch.ones(48)), "only in the file: backbone.net.class_embedding"),
        (put(f"{BLOCK}7.ln_1.bias", torch.ones(48)), "only in the file: .*resblocks.7.ln_1.bias"),
        (put(f"{FC}.weight", torch.ones(64, 99)), r"is \(64, 99\) but should be \(f, 49c\), where c is 32 as in "),
        (put(f"{FC}.weight", torch.ones(64)), r"fc1.weight is \(64,\) but should be \(f, 49c\)"),
        (put(f"{CLASSES}.weight", torch.ones(7, 64)), rf"cls_score.bias is \(6,\) .* C is 6 as in {CLASSES}.weight"),
        (put("backbone.simfp_3.0.weight", torch.ones(48, 23, 2, 2)), r"should be \(e, e/2, 2, 2\), where e is 48"),
        (put(f"{NET}positional_embedding", torch.ones(1, 15, 48)), "15 positions, not a square grid"),
        (put(f"{NET}positional_embedding", torch.ones(16, 48)), r"is \(16, 48\) but should be \(1, n, e\)"),
        (
            lambda s: s.update({f"{BOXES}.weight": torch.ones(8, 64), f"{BOXES}.bias": torch.ones(8)}),
            "bbox_pred.weight has 8 outputs but should have 4 or 20",
        ),
        (lambda s: s.pop(f"{NET}rope_win.freqs_cos"), "rope_win and rope_glb are not both matrices"),
        (lambda s: s.pop(f"{BLOCK}2.attn.rope.freqs_sin"), "do not fit together .*resblocks.2"),
        (lambda s: s[f"{NET}rope_glb.freqs_sin"].add_(2e-5), "another geometry: .*rope_glb.freqs_sin differs by 2e-05"),
        (lambda s: s[f"{NET}rope_glb.freqs_sin"].fill_(float("nan")), "another geometry: .*differs by nan"),
    ],
)
def test_detector_that_does_not_fit_is_refused(reference, change, words):
    state = {name: value.clone() for name, value in reference.state.items()}
    change(state)
    with pytest.raises(CheckpointError, match=words) as error:
        convert(file(state), "mmdet")
    assert str(error.value).startswith("weights.pth")
    assert "\n" not in str(error.value)


def test_no_way_back_for_what_detectron2_has_no_place_for(ours, detectors):
    encoder = "backbone.encoder."
    pos_embed = torch.cat((ours[f"{encoder}pos_embed"], torch.ones(1, 1, 48)), dim=1)
    token = {**ours, f"{encoder}cls_token": torch.ones(1, 1, 48), f"{encoder}pos_embed": pos_embed}
    cascade = convert(read_checkpoint(detectors["cascade"]), "mmdet").state
    three = {name: value for name, value in cascade.items() if "mask_head" not in name}
    for name in cascade.keys() - three.keys():
        three |= {name.replace("mask_head", f"mask_head.{stage}"): cascade[name] for stage in range(3)}
    for state, words in (
        (token, "no place for backbone.encoder.cls_token, because the released detectors have no class token"),
        (three, "and 40 more, because detectron2's cascade has one mask head .*cascade_mask_rcnn_pe.py"),
    ):
        same_bits(convert(file(state), "mmdet").state, state)
        with pytest.raises(CheckpointError, match=words):
            convert(file(state), "detectron2")
    with pytest.raises(CheckpointError, match="is a detector and timm has none; convert it to mmdet"):
        convert(file(ours), "timm")


GEOMETRY = detector_geometry(pos_grid=4, window_size=4, rope_grid=4, blocks=(1, 3))
FACTS = asdict(RopeTables(geometry=GEOMETRY, num_heads=3, image_grid=16))


@pytest.mark.parametrize(
    "facts",
    [
        "{",
        7,
        {"num_heads": 3},
        FACTS | {"num_heads": 5},
        FACTS | {"dtype": "nothing"},
        FACTS | {"geometry": FACTS["geometry"] | {"window_size": "wide"}},
    ],
)
def test_facts_that_make_no_sense_are_refused(ours, facts):
    convert(file(ours, meta={"pe_spatial": FACTS}), "detectron2")
    with pytest.raises(CheckpointError, match="describes no rotary tables of this model"):
        convert(file(ours, meta={"pe_spatial": facts}), "detectron2")


def test_checkpoints_of_other_models_are_refused(golden):
    state = read_checkpoint(checkpoint_file(golden / "encoder/encoder_cls_p16.pt")).state
    for names in (["layer1.0.conv1.weight", "fc.bias"], ["backbone.bottom_up.stem.conv1.weight"]):
        with pytest.raises(CheckpointError, match=f"no encoder or detector .*, but {names[0]}"):
            convert(file(dict.fromkeys(names, torch.ones(1))), "pe_spatial")
    clip = state | {"proj": torch.ones(48, 8), "ln_post.weight": torch.ones(48)}
    with pytest.raises(CheckpointError, match=r"has proj, .* but no attention pooling"):
        convert(file(clip), "pe_spatial")
    vit = convert(file(state), "timm").state | {"patch_embed.proj.bias": torch.ones(48)}
    with pytest.raises(CheckpointError, match=r"from pe_spatial to release; only in the file: patch_embed.proj.bias"):
        convert(file(vit), "release")
    with pytest.raises(CheckpointError, match="unknown layout 'tensorflow'"):
        convert(file(state), "tensorflow")


# --- the command line


@pytest.fixture
def tool(monkeypatch, capsys):
    """Return a function that runs the tool in this process and returns (what it printed, the sentence it ends with)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, args)])
        sentence = ""
        try:
            runpy.run_path(str(TOOL), run_name="__main__")
        except SystemExit as end:
            sentence = str(end.code)
        return capsys.readouterr().out, sentence

    return run


def test_tool_converts_and_prints_the_table(detectors, tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pth"
    environ = {**os.environ, "PYTHONPATH": str(REPO)}
    for source, out, to in ((detectors["cascade"], ours, "mmdet"), (ours, theirs, "detectron2")):
        command = [sys.executable, str(TOOL), str(source), str(out), "--to", to]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    same_bits(read_checkpoint(theirs).state, read_checkpoint(detectors["cascade"]).state)
    for row in (
        r"renamed: 170",
        r" +4  backbone\.encoder\.blocks\.{0-3}\.gamma_1 +-> backbone\.net\.transformer\.resblocks\.{0-3}\.ls_1\.gamma",
        r" +6  roi_head\.bbox_head\.{0-2}\.fc_cls\.{.*} +-> roi_heads\.box_predictor\.{0-2}\.cls_score\.{bias,weight}",
        r"dropped: none",
        r"added: 12",
        r"resized: none",
    ):
        assert re.search(f"^{row}$", done.stdout, re.MULTILINE), row
    assert done.stdout.splitlines()[-1] == (
        f"{ours} (detector, mmdet) -> {theirs} (detectron2): 182 tensors, {theirs.stat().st_size:,} bytes"
    )


def test_tool_names_what_it_dropped_and_resized(golden, tmp_path, tool):
    state = read_checkpoint(checkpoint_file(golden / "encoder/encoder_nocls_layerscale_p14.pt")).state
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "in.pt")
    out, sentence = tool(tmp_path / "in.pt", tmp_path / "out.pth", "--to", "detectron2")
    assert sentence == ""
    assert re.search(r"dropped: 1\n +1  epoch : training state", out)
    assert re.search(r"resized: 1\n +1  conv1.weight : \(48, 3, 14, 14\) -> \(48, 3, 16, 16\)", out)


def test_help_says_what_the_layouts_mean(tool):
    out, _ = tool("--help")
    assert "- detector: pe_spatial is mmdet" in out
    assert "- encoder: mmdet is pe_spatial" in out


@pytest.mark.parametrize(
    ("name", "out", "words"),
    [
        ("cut.pth", "o.pth", "truncated"),
        ("cut.safetensors", "o.pth", "truncated"),
        ("code.pth", "o.pth", "could run code"),
        ("optimizer.pth", "o.pth", "holds no weights"),
        ("absent.pth", "o.pth", "no checkpoint at"),
        ("shape.pth", "o.pth", r"ln_pre.bias is \(47,\) but should be \(e\), where e is 48"),
        ("good.pth", "o.bin", "does not end in .pt, .pth, .safetensors"),
        ("good.pth", "no/o.pth", "there is no folder"),
        ("good.pth", "good.pth", "the checkpoint that is read"),
        ("absent.pth", "good.pth", "no checkpoint at"),
        ("good.pth", "folder.pth", "is a folder"),
    ],
)
def test_tool_ends_in_one_sentence_and_writes_nothing(golden, tmp_path, tool, name, out, words):
    good = checkpoint_file(golden / "encoder" / "encoder_cls_p16.pt")
    state = read_checkpoint(good).state
    (tmp_path / "good.pth").write_bytes(good.read_bytes())
    (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:300_000])
    write_checkpoint(tmp_path / "whole.safetensors", convert(read_checkpoint(good), "timm"))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:300_000])
    torch.save({"model": state, "hook": subprocess.Popen}, tmp_path / "code.pth")
    torch.save({"optimizer": {"state": {}, "param_groups": []}}, tmp_path / "optimizer.pth")
    torch.save(state | {"ln_pre.bias": torch.ones(47)}, tmp_path / "shape.pth")
    (tmp_path / "folder.pth").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    printed, sentence = tool(tmp_path / name, tmp_path / out, "--to", "pe_spatial")
    assert printed == ""
    assert re.search(words, sentence), sentence
    assert sentence.startswith("error: ")
    assert "\n" not in sentence
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("No space left on device")])
def test_an_end_in_the_middle_of_writing_leaves_nothing(golden, tmp_path, monkeypatch, suffix, error):
    out = tmp_path / f"out{suffix}"

    def write_half(_, path, *__):
        assert not out.exists()
        Path(path).write_bytes(b"half")
        raise error

    monkeypatch.setattr(torch, "save", write_half)
    monkeypatch.setattr("safetensors.torch.save_file", write_half)
    done = convert(read_checkpoint(checkpoint_file(golden / "encoder/encoder_cls_p16.pt")), "pe_spatial")
    refused = CheckpointError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(refused, match="No space left on device" if isinstance(error, OSError) else None):
        write_checkpoint(out, done)
    assert list(tmp_path.iterdir()) == []


# --- memory


def sparse_safetensors(path, shapes):
    """Write a file of zeros that takes no room on the disk."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + offset)


def resident(pid):
    """Return (memory of the process's own, all of it with mapped files) in bytes; zeros once it has ended."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("RssAnon", "VmRSS"))
    return [int(match[1]) * 1024 if match else 0 for match in found]


@pytest.mark.slow
def test_large_file_is_streamed(tmp_path):
    """Memory of the process's own, which is not a mapped file, does not grow; all of it stays below file + 1 GB."""
    width, hidden, depth = 1024, 4096, 8
    shapes = {"positional_embedding": (1024, width), "conv1.weight": (width, 3, 16, 16)}
    shapes |= {"ln_pre.weight": (width,), "ln_pre.bias": (width,)}
    block = {"attn.in_proj_weight": (3 * width, width), "attn.in_proj_bias": (3 * width,)}
    block |= {"attn.out_proj.weight": (width, width), "attn.out_proj.bias": (width,)}
    block |= {"mlp.c_fc.weight": (hidden, width), "mlp.c_fc.bias": (hidden,)}
    block |= {"mlp.c_proj.weight": (width, hidden), "mlp.c_proj.bias": (width,)}
    block |= {f"ln_{i}.{name}": (width,) for i in (1, 2) for name in ("weight", "bias")}
    shapes |= {f"transformer.resblocks.{i}.{k}": v for i in range(depth) for k, v in block.items()}
    sparse_safetensors(tmp_path / "0.safetensors", shapes)
    size = (tmp_path / "0.safetensors").stat().st_size
    assert size > 300 << 20
    files = ("0.safetensors", "1.pth", "2.pt", "3.safetensors", "4.safetensors")
    script = f"""
import safetensors.torch
from pe_spatial.convert.converter import convert, write_checkpoint
from pe_spatial.encoder.files import read_checkpoint
print("ready", flush=True)
input()
for source, out in zip({files}, {files[1:]}):
    write_checkpoint(out, convert(read_checkpoint(source), "timm"))
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": {**os.environ, "PYTHONPATH": str(REPO)}}
    with subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, **pipes) as process:
        assert process.stdout.readline() == b"ready\n"
        start = peak = resident(process.pid)
        process.stdin.write(b"\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = [max(pair) for pair in zip(peak, resident(process.pid), strict=True)]
            time.sleep(0.002)
    assert process.returncode == 0
    assert (tmp_path / files[-1]).stat().st_size >= size - 100_000
    assert start[0] > 0
    assert peak[0] - start[0] < size / 4
    assert peak[1] < size + 10**9


def test_detector_trained_in_detectron2_on_our_backbone_is_read_too(detectors):
    """Detectron2's names for the heads, ours for the backbone: what integrations/detectron2.py gives."""
    for name in DETECTORS:
        released = read_checkpoint(detectors[name])
        expected = to_mmdet(released)
        backbone = {key: value for key, value in expected.items() if key.startswith("backbone.")}
        mixed = backbone | {key: value for key, value in released.state.items() if not key.startswith("backbone.")}
        same_bits(to_mmdet(file(mixed)), expected)
        same_bits(convert(file(mixed), "mmdet").state, expected)
