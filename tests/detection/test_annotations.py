"""Annotation files as people have them: training and evaluation read the same content, or refuse it in a sentence."""

import json
import os

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
from helpers.configs import load
from helpers.repository import CONFIGS
from mmengine.config import Config
from mmengine.registry import DATASETS, METRICS, init_default_scope

import pe_spatial.detection  # noqa: F401  (registers)
from pe_spatial.detection.coco import use_checked_annotations
from pe_spatial.engine.configs import installed_config
from pe_spatial.engine.options import set_options
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
SQUARE = [5, 5, 25, 5, 25, 25, 5, 25]
RLE = dict(size=[40, 60], counts=[100, 50, 2250])


@pytest.fixture(autouse=True)
def scope():
    init_default_scope("mmdet")


@pytest.fixture
def coco(tmp_path):
    """Two images of 40x60 pixels with a square of 20 pixels; the function writes the file and returns its path."""
    (tmp_path / "img").mkdir()
    for name in "ab":
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "img" / f"{name}.png")
    content = dict(
        images=[dict(id=i, file_name=f, height=40, width=60) for i, f in ((1, "a.png"), (2, "b.png"))],
        categories=[dict(id=1, name="ball")],
        annotations=[
            dict(id=i, image_id=i, category_id=1, bbox=[5, 5, 20, 20], area=400, iscrowd=0, segmentation=[SQUARE])
            for i in (1, 2)
        ],
    )

    def write(change=dict, *, encoding="utf-8"):
        change(content)
        (tmp_path / "x.json").write_text(json.dumps(content), encoding=encoding)
        return tmp_path / "x.json"

    return write


def dataset(path, classes=("ball",), *, masks=True, poly2mask=True, **options):
    load = dict(type="LoadAnnotations", with_bbox=True, with_mask=masks, poly2mask=poly2mask)
    return DATASETS.build(
        dict(
            type="CheckedCocoDataset",
            data_root=str(path.parent),
            ann_file=path.name,
            data_prefix=dict(img="img/"),
            metainfo=dict(classes=classes),
            serialize_data=False,
            pipeline=[dict(type="LoadImageFromFile"), load, dict(type="PackDetInputs")],
            **options,
        )
    )


def counts(dataset):
    """Return the numbers of objects and of ignored regions of each image."""
    samples = [dataset[i]["data_samples"] for i in range(len(dataset))]
    return [(len(sample.gt_instances), len(sample.ignored_instances)) for sample in samples]


def sample(image_id, *, boxes=((5, 5, 25, 25),), label=0, masks=None):
    if masks is None:
        masks = torch.zeros(len(boxes), 40, 60, dtype=torch.bool)
        for mask, (left, top, right, bottom) in zip(masks, np.round(boxes).astype(int), strict=True):
            mask[top:bottom, left:right] = True
    predicted = dict(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.full((len(boxes),), 0.9),
        labels=torch.full((len(boxes),), label),
        masks=masks,
    )
    return dict(img_id=image_id, ori_shape=(40, 60), pred_instances=predicted)


def evaluate(path, ids=(1, 2), classes=("ball",), *, metric=("bbox", "segm"), label=0, **options):
    """Evaluate the square in every image; return the AP of boxes and of masks."""
    evaluator = METRICS.build(dict(type="CheckedCocoMetric", ann_file=str(path), metric=list(metric), **options))
    evaluator.dataset_meta = dict(classes=classes)
    for image_id in ids:
        evaluator.process({}, [sample(image_id, label=label)])
    results = evaluator.evaluate(len(ids))
    return tuple(results[f"coco/{name}_mAP"] for name in metric)


def test_configs_of_mmdet_read_cleaned_annotations_too(coco):
    """The file has id 0 and no areas, with which mmdet's own pair fails: the metric loses an object or stops."""
    path = coco(lambda content: [(a.update(id=a["id"] - 1), a.pop("area")) for a in content["annotations"]])
    cfg = Config.fromfile(installed_config("mmdet::atss/atss_r50_fpn_1x_coco.py"))
    part = dict(data_root=str(path.parent), ann_file=path.name, data_prefix=dict(img="img/"))
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.dataset.update(part, metainfo=dict(classes=("ball",)))
    cfg.train_dataloader.dataset = dict(type="RepeatDataset", times=2, dataset=cfg.train_dataloader.dataset)
    cfg.test_evaluator.ann_file = str(path)
    use_checked_annotations(cfg)
    assert cfg.custom_imports["imports"] == ["pe_spatial.detection"]
    assert len(DATASETS.build(cfg.train_dataloader.dataset)) == 4
    metric = METRICS.build(cfg.test_evaluator)
    metric.dataset_meta = DATASETS.build(cfg.test_dataloader.dataset).metainfo
    for image_id in (1, 2):
        metric.process({}, [sample(image_id)])
    assert metric.evaluate(2)["coco/bbox_mAP"] == 1
    before = cfg.to_dict()
    use_checked_annotations(cfg)
    assert cfg.to_dict() == before


def test_unlabeled_sets_stay_as_they_are():
    unlabeled = dict(type="CocoDataset", ann_file="x.json", filter_cfg=dict(filter_empty_gt=False))
    cfg = Config(dict(default_scope="mmdet", train_dataloader=dict(dataset=unlabeled)))
    use_checked_annotations(cfg)
    assert cfg.train_dataloader.dataset.type == "CocoDataset"
    assert "custom_imports" not in cfg


def first(**fields):
    return lambda content: content["annotations"][0].update(fields)


def every(**fields):
    return lambda content: [a.update(fields) for a in content["annotations"]]


def without(*keys):
    return lambda content: [a.pop(key) for a in content["annotations"] for key in keys]


def renamed(kind, key, function):
    return lambda content: [entry.update({key: function(entry[key])}) for entry in content[kind]]


def together(*changes):
    return lambda content: [change(content) for change in changes]


CROWD = dict(id=3, image_id=1, category_id=1, bbox=[30, 5, 20, 20], area=400, iscrowd=1, segmentation=RLE)
ACCEPTED = {
    "clean": dict,
    "A1 id 0": first(id=0),
    "ids of text": renamed("annotations", "id", str),
    "ids of both kinds": first(id="x"),
    "ids from 0 in each image": every(id=0),
    "A2 no area": without("area"),
    "no iscrowd": without("iscrowd"),
    "area of text": every(area="400"),
    "area null": every(area=None),
    "area absurd": every(area=1e12),
    "iscrowd of text": every(iscrowd="0"),
    "iscrowd null": every(iscrowd=None),
    "iscrowd false": every(iscrowd=False),
    "B10 categories of text": renamed("categories", "id", str),
    "B10 category_id of text": renamed("annotations", "category_id", str),
    "both of text": together(renamed("categories", "id", str), renamed("annotations", "category_id", str)),
    "image_id of text": renamed("annotations", "image_id", str),
    "B14 parent category": lambda content: content["categories"].insert(
        0, dict(id=0, name="balls", supercategory="none")
    ),
    "parent of equal name": lambda content: content.update(
        categories=[dict(id=0, name="ball", supercategory="none"), dict(id=1, name="ball", supercategory="ball")]
    ),
    "category 0": together(
        lambda content: content["categories"][0].update(id=0), lambda content: every(category_id=0)(content)
    ),
    "a crowd": lambda content: content["annotations"].append(CROWD),
    "B1 crowd without mask": lambda content: content["annotations"].append({**CROWD, "segmentation": []}),
    "crowd without the key": lambda content: content["annotations"].append(
        {key: value for key, value in CROWD.items() if key != "segmentation"}
    ),
    "an ignored object": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "ignore": 1, "segmentation": [[30, 5, 50, 5, 50, 25, 30, 25]]}
    ),
    "box outside": lambda content: content["annotations"].append({**CROWD, "iscrowd": 0, "bbox": [90, 5, 9, 9]}),
    "box not finite": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "bbox": [1, 5, float("nan"), 9]}
    ),
    "box empty": lambda content: content["annotations"].append({**CROWD, "iscrowd": 0, "bbox": [1, 5, 0, 9]}),
    "image unknown": lambda content: content["annotations"].append({**CROWD, "iscrowd": 0, "image_id": 77}),
    "B8 polygon of four numbers": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "segmentation": [[30, 5, 50, 25]]}
    ),
    "B8 empty polygon": lambda content: content["annotations"].append({**CROWD, "iscrowd": 0, "segmentation": [[]]}),
    "B7 polygon not finite": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "segmentation": [[30, 5, 50, float("nan"), 50, 25]]}
    ),
    "B7 polygon absurd": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "segmentation": [[-164, -222, 2e8, 3e8, 226, 237]]}
    ),
    "odd polygon beside a good one": every(segmentation=[SQUARE, [5, 5, 25, 5, 25]]),
    "normalized polygon": lambda content: content["annotations"].append(
        {**CROWD, "iscrowd": 0, "segmentation": [[0.5, 0.1, 0.8, 0.1, 0.8, 0.6]]}
    ),
    "uncompressed RLE": every(segmentation=dict(size=[40, 60], counts=[205, *[20, 20] * 19, 20, 1415])),
    "images of another order": lambda content: content["images"].reverse(),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepted_file_scores_one(coco, case):
    path = coco(ACCEPTED[case])
    for masks in (True, False):
        for test_mode in (False, True):
            assert [objects for objects, _ in counts(dataset(path, masks=masks, test_mode=test_mode))][:1] != [0]
    trained = counts(dataset(path))
    assert [objects for objects, _ in trained] == [1, 1]
    assert evaluate(path) == (1.0, 1.0)
    if "polygon" not in case:  # a box without a usable mask counts where masks are not asked for
        assert evaluate(path, metric=["bbox"]) == (1.0,)


@pytest.mark.parametrize(
    "change",
    [
        "image {}".format,
        lambda number: number if number == 1 else f"image {number}",
        lambda number: number + 2**64,
        lambda number: -1 if number == 1 else 2**63 + 5,
    ],
    ids=["text", "both kinds", "large", "large and negative"],
)
def test_ids_of_images(coco, change):
    path = coco(together(renamed("images", "id", change), renamed("annotations", "image_id", change)))
    tested = dataset(path, test_mode=True)
    assert counts(tested) == [(1, 0)] * 2
    assert evaluate(path, [tested.get_data_info(i)["img_id"] for i in range(2)]) == (1.0, 1.0)


def test_file_with_a_byte_order_mark(coco):
    path = coco(encoding="utf-8-sig")
    assert counts(dataset(path)) == [(1, 0)] * 2
    assert evaluate(path) == (1.0, 1.0)


def test_names_in_two_forms_of_unicode(coco):
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    path = coco(lambda content: content["categories"][0].update(name=decomposed))
    assert len(dataset(path, (composed,))) == 2
    assert evaluate(path, classes=(composed,)) == (1.0, 1.0)
    path = coco(lambda content: content["categories"][0].update(name=composed))
    assert evaluate(path, classes=dataset(path, (decomposed,)).metainfo["classes"]) == (1.0, 1.0)


@pytest.mark.skipif(os.sep != "/", reason="backslashes are separators here")
def test_backslashes_in_file_names(coco):
    path = coco(renamed("images", "file_name", lambda name: f".\\sub\\..\\{name}"))
    (path.parent / "img" / "sub").mkdir()
    assert counts(dataset(path)) == [(1, 0)] * 2
    (path.parent / "img" / r"c\d.png").write_bytes((path.parent / "img" / "a.png").read_bytes())
    path = coco(lambda content: content["images"][0].update(file_name=r"c\d.png"))  # a name with a backslash
    assert counts(dataset(path)) == [(1, 0)] * 2


REFUSED = {
    "B4 flat polygon": (first(segmentation=[5, 5, 25, 5, 25, 25]), r"annotation 1 .*list of polygons"),
    "B4 text in a polygon": (first(segmentation=[["5", "5", "25", "5", "25", "25"]]), "annotation 1 .*'5'"),
    "B4 null in a polygon": (first(segmentation=[[5, 5, 25, None, 25, 25]]), "annotation 1 .*None"),
    "polygon of points": (first(segmentation=[[[5, 5], [25, 5], [25, 25]]]), "annotation 1 "),
    "segmentation of text": (first(segmentation="5 5 25 5 25 25"), "annotation 1 "),
    "no segmentation": (first(segmentation=None), "no segmentation"),
    "B5 size swapped": (
        first(segmentation=dict(RLE, size=[60, 40])), r"annotation 1 .*60x40.*image.*40x60",
    ),
    "RLE of another image": (first(segmentation=dict(size=[20, 20], counts=[100, 50, 250])), "20x20"),
    "RLE with a wrong sum": (first(segmentation=dict(size=[40, 60], counts=[100, 50])), "150 .*2400"),
    "RLE with a negative run": (first(segmentation=dict(size=[40, 60], counts=[100, -50, 2350])), "annotation 1 "),
    "RLE with text": (first(segmentation=dict(size=[40, 60], counts=["100", 50, 2250])), "annotation 1 "),
    "RLE truncated": (first(segmentation=dict(size=[40, 60], counts="T3b")), "annotation 1 "),
    "RLE without counts": (first(segmentation=dict(size=[40, 60])), "annotation 1 "),
    "iscrowd of words": (first(iscrowd="yes"), "annotation 1 has iscrowd 'yes'"),
    "categories named by words": (renamed("categories", "id", lambda _: "ball"), r"categories\[0\] has id 'ball'"),
    "category ids of floats": (renamed("categories", "id", float), r"categories\[0\] has id 1\.0"),
    "ids of booleans": (renamed("images", "id", lambda i: i == 1), r"images\[0\] has id True"),
    "category_id of words": (every(category_id="ball"), "text.*'ball'|'ball'.*text"),
    "image_id of no image": (every(image_id=9), "2 annotations are of unknown images"),
    "image_id of file names": (renamed("annotations", "image_id", "{}.png".format), "text.*1.png|1.png.*text"),
    "category twice": (
        lambda content: content["categories"].append(dict(id=2, name="ball")), "categories 1 and 2 .*'ball'",
    ),
    "parent and child in use": (
        lambda content: content.update(
            categories=[dict(id=2, name="ball", supercategory="none"), dict(id=1, name="ball", supercategory="ball")],
            annotations=[content["annotations"][0], {**content["annotations"][1], "category_id": 2}],
        ),
        "categories 2 and 1 .*'ball'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_a_sentence_by_both(coco, case):
    change, message = REFUSED[case]
    path = coco(change)
    for read in (dataset, evaluate):
        with pytest.raises(DatasetError, match=message) as error:
            read(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (every(iscrowd=1, segmentation=RLE), "2 crowds"),
        (every(iscrowd=1, segmentation=[]), "2 crowds"),
        (every(ignore=1), "2 ignored"),
        (every(segmentation=[[5, 5, 25, 25]]), "2 with an unusable polygon"),
        (every(bbox=[5, 5, 0, 20]), "2 smaller than a pixel"),
    ],
)
def test_nothing_to_learn_is_an_error_in_training_only(coco, change, message):
    """B2: the counts say why; a test set may be without objects."""
    path = coco(change)
    with pytest.raises(DatasetError, match=message):
        counts(dataset(path))
    assert [objects for objects, _ in counts(dataset(path, test_mode=True))] == [0, 0]


def test_log_counts_what_is_not_learned(coco, log):
    def change(content):
        extra = dict(CROWD, iscrowd=0, segmentation=[[30, 5, 50, 5, 50, 25, 30, 25]])
        content["annotations"] += [
            dict(extra, id=3, iscrowd=1, segmentation=RLE),
            dict(extra, id=4, iscrowd=1, segmentation=[]),
            dict(extra, id=5, ignore=1),
            dict(extra, id=6, segmentation=[[30, 5, 50, 25]]),
        ]

    dataset(coco(change))
    (line,) = [line for line, _ in log if "boxes (" in line]
    assert line.endswith("; ignored: 2 crowds, 1 ignored, 1 with an unusable polygon")


@pytest.mark.parametrize("entries", [[], None])
def test_set_without_annotations_evaluates(coco, log, entries):
    """A11."""
    path = coco(lambda content: content.pop("annotations") if entries is None else content.update(annotations=[]))
    assert counts(dataset(path, test_mode=True)) == [(0, 0)] * 2
    assert evaluate(path) == (-1.0, -1.0)
    assert any("no annotated object" in line for line, _ in log)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("ball", r"the text 'ball'; write \('ball',\)"),
        (("ball", "ball"), "'ball' twice"),
        ((), "no class"),
        ((1,), "class 1 "),
        (("ball", "bat"), "no categor.* bat.*config.*ball, bat.*file.*ball"),
    ],
)
def test_classes_of_a_config(coco, classes, message):
    """B9 and its siblings."""
    with pytest.raises((DatasetError, ConfigError), match=message):
        dataset(coco(), classes)


def test_absent_category_in_a_test_set_is_added_to_the_file(coco):
    """B13: cutting the classes would be the wrong advice."""
    with pytest.raises(DatasetError, match=r"add .*\"name\": \"bat\".* to its categories") as error:
        dataset(coco(), ("ball", "bat"), test_mode=True)
    assert "num_classes" not in str(error.value)


def test_masks_as_runs_name_the_option(coco):
    """B16: the options of the message, as they stand, are the remedy."""
    path = coco(every(segmentation=RLE))
    for test_mode, loaders in ((False, ["train_dataloader"]), (True, ["val_dataloader", "test_dataloader"])):
        with pytest.raises(DatasetError, match="poly2mask=True") as error:
            dataset(path, poly2mask=False, test_mode=test_mode)
        for loader in loaders:
            assert f"{loader}.dataset.pipeline.1.poly2mask=True" in str(error.value)
    assert counts(dataset(path, poly2mask=True)) == [(1, 0)] * 2


@pytest.mark.parametrize("split", ["train", "val"])
def test_masks_as_runs_in_the_shipped_config(coco, split):
    """B16: the options as they are typed, on the config that people use."""
    path = coco(every(segmentation=RLE))
    place = dict(data_root=str(path.parent), ann_file=path.name, data_prefix=dict(img="img/"), serialize_data=False)
    place["metainfo"] = dict(classes=("ball",))
    cfg = load(CONFIGS / "pe_spatial_cascade_coco.py")
    with pytest.raises(DatasetError, match="use --cfg-options") as error:
        DATASETS.build({**cfg[f"{split}_dataloader"].dataset, **place})
    options = str(error.value).partition("--cfg-options ")[2].split()
    set_options(cfg, dict(option.split("=") for option in options))
    data = DATASETS.build({**cfg[f"{split}_dataloader"].dataset, **place})
    assert [len(data.get_data_info(i)["instances"]) for i in range(2)] == [1, 1]
    assert len(data[0]["data_samples"].gt_instances) <= 1


def test_absent_file_lists_its_neighbors(coco):
    path = coco()
    with pytest.raises(DatasetError, match=r"no annotation file at .*y\.json; .* contains x\.json"):
        dataset(path.with_name("y.json"))
    with pytest.raises(DatasetError, match=r"no annotation file at .*y\.json; .* contains x\.json"):
        evaluate(path.with_name("y.json"))


def test_label_beyond_the_classes(coco):
    """A5 at the metric: the first batch fails, not the end of the validation."""
    with pytest.raises(ConfigError, match=r"label 3 .* 1 class.*num_classes"):
        evaluate(coco(), label=3)


def test_image_that_the_evaluator_does_not_have(coco):
    """A7 at the metric."""
    with pytest.raises(DatasetError, match=r"image 7 .*ann_file"):
        evaluate(coco(), ids=(1, 7))


def test_part_of_a_set_is_evaluated_alone(coco, log):
    path = coco()
    part = dataset(path, test_mode=True, indices=1)
    assert evaluate(path, [part.get_data_info(i)["img_id"] for i in range(len(part))]) == (1.0, 1.0)
    assert any("1 of the 2 images" in line for line, _ in log)
