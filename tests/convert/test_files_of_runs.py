"""Checkpoints of runs: any of them can be slimmed to its weights, and class names and config stay with them."""

from dataclasses import asdict, replace

import pytest
import torch
from helpers.golden import checkpoint_file
from helpers.repository import command
from helpers.states import file, same_bits
from torch.testing import assert_close

from pe_spatial.convert.converter import convert, write_checkpoint
from pe_spatial.encoder.files import CheckpointError, read_checkpoint

CFG = "model = dict(type='MaskRCNN')\n"
META = {"dataset_meta": {"classes": ("nut", "bolt"), "palette": [(1, 2, 3), (4, 5, 6)]}, "cfg": CFG, "iter": 3}


@pytest.fixture(scope="module")
def maskrcnn(golden):
    return checkpoint_file(golden / "maskrcnn" / "maskrcnn.pth")


def run(state, **more):
    return {"state_dict": state, "meta": META, "optimizer": {"state": {0: torch.ones(1000)}}, "message_hub": {}} | more


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("to", ["same", "mmdet"])
def test_conversion_keeps_the_class_names_and_the_config(tmp_path, maskrcnn, suffix, to):
    state = convert(read_checkpoint(maskrcnn), "mmdet").state
    torch.save(run(state), tmp_path / "iter_3.pth")
    printed = command("convert_checkpoint", "iter_3.pth", f"out{suffix}", "--to", to, cwd=tmp_path)
    assert "optimizer" in printed
    out = read_checkpoint(tmp_path / f"out{suffix}")
    same_bits(out.state, state)
    meta = out.rest["meta"]
    assert {name: meta[name] for name in ("cfg", "dataset_meta")}.keys() == {"cfg", "dataset_meta"}
    assert meta["cfg"] == CFG
    assert list(meta["dataset_meta"]["classes"]) == ["nut", "bolt"]
    assert "iter" not in meta
    assert out.rest.keys() <= {"meta", "format"}


def test_class_names_come_back_through_detectron2(tmp_path, maskrcnn):
    torch.save(run(convert(read_checkpoint(maskrcnn), "mmdet").state), tmp_path / "iter_3.pth")
    command("convert_checkpoint", "iter_3.pth", "d2.pth", "--to", "detectron2", cwd=tmp_path)
    command("convert_checkpoint", "d2.pth", "back.pth", "--to", "mmdet", cwd=tmp_path)
    assert read_checkpoint(tmp_path / "back.pth").rest["meta"]["dataset_meta"] == META["dataset_meta"]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    "state",
    [{"backbone.encoder.blocks.0.x": torch.ones(2), "bbox_head.atss_cls.weight": torch.ones(3)},  # a swapped ATSS
     {"backbone.layer1.0.conv1.weight": torch.ones(2), "head.bias": torch.ones(1, dtype=torch.float16)},
     {"student.blocks.0.a": torch.ones(1), "teacher.blocks.0.a": torch.zeros(1)}],
    ids=["swapped", "a ResNet", "two encoders"],
)  # fmt: skip
def test_any_checkpoint_can_be_slimmed(tmp_path, state, suffix):
    torch.save(run(state), tmp_path / "iter_3.pth")
    command("convert_checkpoint", "iter_3.pth", f"out{suffix}", "--to", "same", cwd=tmp_path)
    same_bits(read_checkpoint(tmp_path / f"out{suffix}").state, state)
    assert (tmp_path / f"out{suffix}").stat().st_size < (tmp_path / "iter_3.pth").stat().st_size


def test_a_model_of_no_table_names_the_way_to_slim_it(maskrcnn):
    state = convert(read_checkpoint(maskrcnn), "mmdet").state | {"bbox_head.atss_cls.weight": torch.ones(3)}
    with pytest.raises(CheckpointError, match="--to same keeps the names of any checkpoint"):
        convert(file(state, meta=META), "mmdet")


def test_a_released_detector_stays_what_it_is(tmp_path, maskrcnn):
    done = convert(read_checkpoint(maskrcnn), "same")
    assert done.layout_out == "detectron2"
    write_checkpoint(tmp_path / "out.pth", done)
    same_bits(read_checkpoint(tmp_path / "out.pth").state, read_checkpoint(maskrcnn).state)
    assert torch.load(tmp_path / "out.pth", weights_only=True).keys() == {"model"}


def test_rotary_facts_stay_with_the_file(tmp_path, maskrcnn):
    done = convert(read_checkpoint(maskrcnn), "mmdet")
    write_checkpoint(tmp_path / "a.pth", done)
    for source, out in (("a.pth", "b.pth"), ("b.pth", "c.safetensors"), ("c.safetensors", "d.pth")):
        write_checkpoint(tmp_path / out, convert(read_checkpoint(tmp_path / source), "same"))
    back = convert(read_checkpoint(tmp_path / "d.pth"), "detectron2")
    assert back.rope == done.rope
    same_bits(back.state, read_checkpoint(maskrcnn).state)


def test_parts_of_a_sharded_run_are_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.empty(2, device="meta")}, "parts": "x.parts", "meta": {}}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="consolidate_checkpoint"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("rest", [{"meta": "text"}, {"meta": None}, {"meta": {"cfg": object}}, {"meta": [1]}])
def test_a_meta_of_any_form_does_not_hinder(rest):
    assert convert(file({"a": torch.ones(1)}, **rest), "same").meta == {}


# --- rotary tables


@pytest.mark.parametrize("rope_grid", [2, 4, 7, 12])
def test_rotary_range_is_read_from_the_tables_of_every_detector(maskrcnn, rope_grid):
    """Tables that were made for another grid than that of the learned positions."""
    released = read_checkpoint(maskrcnn)
    facts = convert(released, "mmdet").rope
    sizes = {"e": released.state["backbone.net.ln_pre.weight"].numel()}
    sizes["d"] = len({name.split(".")[4] for name in released.state if "net.transformer.resblocks." in name})
    other = replace(facts, geometry=replace(facts.geometry, rope_grid=rope_grid))
    tables = other.build("detectron2", sizes["e"], sizes["d"])
    changed = file(released.state | tables)
    done = convert(changed, "mmdet")
    assert done.rope == other
    assert any(f"rope_grid={rope_grid}" in note for note in done.notes) == (rope_grid != facts.geometry.pos_grid)
    back = convert(file(done.state, meta={"pe_spatial": asdict(done.rope)}), "detectron2")
    for name, table in tables.items():
        assert_close(back.state[name], table, rtol=0, atol=0)
