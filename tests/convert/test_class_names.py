"""Released detectors get the class names that their files lack."""

import pytest
import torch
from helpers.golden import read_json

from pe_spatial.convert import class_names
from pe_spatial.convert.converter import convert
from pe_spatial.encoder.files import CheckpointFile

pytestmark = pytest.mark.mmdet


def released(golden, name):
    keys = read_json(golden / f"{name}.json")["keys"]
    state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
    return CheckpointFile(path=golden / f"{name}.pth", state=state, rest={})


@pytest.mark.parametrize(
    ("name", "options", "count", "some"),
    [
        ("maskrcnn/contract_mask_rcnn_PEspatial_G_coco36ep", {}, 80, {0: "person", 79: "toothbrush"}),
        ("maskrcnn/contract_mask_rcnn_PEcore_G_lvis75ep", {}, 1203, {0: "aerosol_can", 1202: "zucchini"}),
        ("deta/contract_deta_coco_1824pix", {}, 80, {0: "person", 79: "toothbrush"}),
        ("deta/contract_deta_coco_1824pix", {"all_classes": True}, 91, {1: "person", 12: "unused id 12"}),
    ],
)  # fmt: skip
def test_released_detectors_are_named(golden, name, options, count, some):
    pytest.importorskip("mmdet")
    done = class_names.name_classes(convert(released(golden, name), "mmdet", **options))
    names = done.meta["dataset_meta"]["classes"]
    assert len(names) == count
    assert {i: names[i] for i in some} == some


def test_names_that_are_there_or_not_known_stay(golden, monkeypatch):
    name = "maskrcnn/contract_mask_rcnn_PEspatial_G_coco36ep"
    file = released(golden, name)
    own = {"dataset_meta": {"classes": ["nut"] * 80}}
    with_names = CheckpointFile(path=file.path, state=file.state, rest={"meta": own})
    assert class_names.name_classes(convert(with_names, "mmdet")).meta["dataset_meta"] == own["dataset_meta"]
    assert class_names.name_classes(convert(file, "detectron2")).meta == {}
    monkeypatch.setattr(class_names, "find_spec", lambda _: None)
    done = class_names.name_classes(convert(file, "mmdet"))
    assert "dataset_meta" not in done.meta
    assert "mmdet, which knows the names of the classes, is not installed" in done.notes[-1]
