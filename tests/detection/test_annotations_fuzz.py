"""Damaged annotation files are accepted, and then perfect detections score 1.0, or refused in one sentence."""

import copy
import json
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from mmengine.registry import DATASETS, METRICS, init_default_scope

import pe_spatial.detection  # noqa: F401  (registers)
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
RLE = dict(size=[40, 60], counts=[205, *[20, 20] * 19, 20, 1415])


def shape(x, y):
    return [[x, y, x + 20, y, x + 20, y + 15.5, x, y + 15.5]]


MASKS = [(5, 5, shape(5, 5)), (30, 5, shape(30, 5)), (5, 5, RLE), (1, 2, shape(1, 2))]
CONTENT = dict(
    images=[dict(id=i, file_name=f"{i}.png", height=40, width=60) for i in (1, 2)],
    categories=[dict(id=1, name="ball", supercategory="none"), dict(id=2, name="bat", supercategory="toy")],
    annotations=[
        dict(
            id=i, image_id=1 + i % 2, category_id=1 + i % 2, bbox=[x, y, 20, 15.5], area=310, iscrowd=0, segmentation=m
        )
        for i, (x, y, m) in enumerate(MASKS, 1)
    ],
)
KEYS = {kind: sorted(CONTENT[kind][0]) for kind in CONTENT}
numbers = st.one_of(
    st.sampled_from([0, 1, 2, -1, 0.5, 1e8, -3e12, 2**63, 10**30, float("nan"), float("inf")]),
    st.floats(-30, 90, width=16),
)
values = st.one_of(
    numbers,
    st.sampled_from([None, True, False, "", "1", "01", "ball", "x.png", "\\1.png"]),
    st.sampled_from([{}, [], [[]], dict(RLE, size=[60, 40])]),
    st.lists(numbers, max_size=9),
    st.lists(st.lists(numbers, max_size=9), max_size=3),
    st.builds(dict, size=st.just([40, 60]), counts=st.one_of(st.text(max_size=5), st.lists(numbers, max_size=3))),
)
places = st.sampled_from([(kind, key) for kind, keys in KEYS.items() for key in keys] + [("annotations", "ignore")])
changes = st.lists(
    st.tuples(
        places,
        st.one_of(st.none(), st.integers(0, 3)),  # of all entries, or of one
        st.sampled_from(["set", "text", "delete", "repeat"]),
        values,
    ),
    min_size=1,
    max_size=3,
)


def damaged(changes):
    content = copy.deepcopy(CONTENT)
    for (kind, key), index, action, value in changes:
        entries = content[kind]
        for entry in entries if index is None else entries[index : index + 1]:
            if action == "set":
                entry[key] = copy.deepcopy(value)
            elif action == "text":
                entry[key] = str(entry.get(key))
            else:
                entry.pop(key, None)
        if action == "repeat" and entries:
            entries.append(copy.deepcopy(CONTENT[kind][(index or 0) % len(CONTENT[kind])]))
    return content


@pytest.fixture(scope="module")
def folder():
    init_default_scope("mmdet")
    with TemporaryDirectory() as folder:
        for i in (1, 2):
            Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(Path(folder) / f"{i}.png")
        yield Path(folder)


def read(path, **options):
    """Return the dataset with its samples, or None if it is refused."""
    pipeline = [
        dict(type="pe_spatial.LoadImageFromFile"),
        dict(type="LoadAnnotations", with_bbox=True, with_mask=True, poly2mask=True),
        dict(type="PackDetInputs"),
    ]
    place = dict(data_root=str(path.parent), ann_file=path.name, data_prefix=dict(img=""))
    place["metainfo"] = dict(classes=("ball", "bat"))
    try:
        dataset = DATASETS.build(
            dict(type="CheckedCocoDataset", pipeline=pipeline, serialize_data=False, **place, **options)
        )
        return dataset, [dataset[i]["data_samples"] for i in range(len(dataset))]
    except (DatasetError, ConfigError) as error:
        check_sentence(error)
        return None


def check_sentence(error):
    assert "\n" not in str(error)


def score(metric, samples):
    """Detect every object of the evaluator exactly; return its AP."""
    coco, names = metric._coco_api, ("ball", "bat")
    labels = {category["id"]: names.index(category["name"]) for category in coco.dataset["categories"]}
    for sample in samples:
        objects = [a for a in coco.imgToAnns[sample.img_id] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        predicted = dict(bboxes=boxes, scores=torch.full((len(objects),), 0.9))
        predicted["labels"] = torch.tensor([labels[a["category_id"]] for a in objects], dtype=torch.long)
        predicted["masks"] = [dict(a["segmentation"]) for a in objects]
        metric.process({}, [dict(img_id=sample.img_id, ori_shape=(40, 60), pred_instances=predicted)])
    results = metric.evaluate(len(samples))
    return {results.get(f"coco/{kind}_mAP", -1) for kind in ("bbox", "segm")}


numbered = count()


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(changes)
@example([(("annotations", "id"), 0, "set", 0)])
@example([(("annotations", "area"), None, "delete", None)])
@example([(("annotations", "segmentation"), 0, "set", [[30, 5, 50, 5, 30, 5]])])  # a mask without pixels
@example([(("images", "id"), 0, "text", None)])
def test_accepted_and_perfect_or_refused(folder, changes):
    path = folder / f"{next(numbered)}.json"
    path.write_text(json.dumps(damaged(changes)))
    read(path)  # training: no crash
    tested = read(path, test_mode=True)
    try:
        metric = METRICS.build(dict(type="CheckedCocoMetric", ann_file=str(path), metric=["bbox", "segm"]))
    except DatasetError as error:
        check_sentence(error)
        metric = None
    assert metric or not tested
    if not tested:  # the dataset refuses more: classes, and images that are not there
        return
    dataset, samples = tested
    metric.dataset_meta = dataset.metainfo
    objects = [a for a in metric._coco_api.dataset["annotations"] if not a["iscrowd"] and min(a["bbox"][2:]) >= 1]
    assert sum(len(sample.gt_instances) for sample in samples) >= len(objects)
    assert score(metric, samples) <= {1.0, -1}


def test_what_is_not_damaged(folder):
    path = folder / "clean.json"
    path.write_text(json.dumps(CONTENT))
    dataset, samples = read(path, test_mode=True)
    assert [len(sample.gt_instances) for sample in samples] == [2, 2]
    metric = METRICS.build(dict(type="CheckedCocoMetric", ann_file=str(path), metric=["bbox", "segm"]))
    metric.dataset_meta = dataset.metainfo
    assert score(metric, samples) == {1.0}
