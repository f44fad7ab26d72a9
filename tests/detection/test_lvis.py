"""LVIS: the federated loss and the sampler equal Detectron2's, the metric keeps LVIS's rules, and a tiny set runs."""

import json
import math
from itertools import islice
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.coco import annotation
from helpers.configs import load
from helpers.golden import read_arrays, read_json
from helpers.repository import CONFIGS
from mmengine.config import Config
from mmengine.dataset import RepeatDataset
from mmengine.evaluator import Evaluator
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from PIL import Image

from pe_spatial.detection.lvis.dataset import CLASSES, CheckedLVISDataset
from pe_spatial.detection.lvis.federated_loss import FederatedLoss, SetClassWeights
from pe_spatial.detection.lvis.metric import FastLVISMetric
from pe_spatial.detection.lvis.sampler import RepeatFactorSampler, repeat_factors
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
NAMES = ("rare", "common", "frequent")
SIZE = (96, 128)  # (height, width)
SIDE, STEP = 6, 8  # of the squares, in pixels
GRID = [[x + 1.0, y + 1.0, SIDE, SIDE] for y in range(0, SIZE[0], STEP) for x in range(0, SIZE[1], STEP)]
RELEASED = {
    "pe_spatial_maskrcnn_coco_g14": "PEspatial_G_coco36ep",
    "pe_core_maskrcnn_coco_g14": "PEcore_G_coco75ep",
    "pe_spatial_maskrcnn_lvis_g14": "PEspatial_G_lvis75ep",
    "pe_core_maskrcnn_lvis_g14": "PEcore_G_lvis75ep",
}


def image(number, *, absent=(), incomplete=(), split="val2017"):
    return dict(
        id=number,
        coco_url=f"http://images.cocodataset.org/{split}/{number:012d}.jpg",
        height=SIZE[0],
        width=SIZE[1],
        neg_category_ids=list(absent),
        not_exhaustive_category_ids=list(incomplete),
    )


def content(images, annotations):
    categories = [
        dict(id=i + 1, name=name, frequency=name[0], image_count=count)
        for i, (name, count) in enumerate(zip(NAMES, (4, 64, 900), strict=True))
    ]
    return dict(images=images, annotations=annotations, categories=categories)


def objects(number, *categories):
    """Squares of these categories in the image, one in each cell of the grid."""
    return [annotation(1000 * number + i, number, GRID[i], category) for i, category in enumerate(categories)]


def write(path, what):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(what))
    return path


@pytest.fixture
def lvis(tmp_path):
    """A set in LVIS's folders: val holds an image of train2017, and one has more than 100 objects of one class."""
    images = [image(1), image(2, absent=[1], split="train2017"), image(3, incomplete=[3]), image(4)]
    annotations = [*objects(1, *[3] * 110, 1, 2), *objects(2, 3, 2), *objects(3, 3)]
    for split in ("train", "val"):
        write(tmp_path / "annotations" / f"lvis_v1_{split}.json", content(images, annotations))
    for entry in images:
        folder, name = entry["coco_url"].split("/")[-2:]
        pixels = np.full((*SIZE, 3), 90, np.uint8)
        for x, y, w, h in (a["bbox"] for a in annotations if a["image_id"] == entry["id"]):
            pixels[int(y) : int(y + h), int(x) : int(x + w)] = 220
        (tmp_path / folder).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / folder / name)
    return tmp_path


def dataset(root, split="train", **options):
    options = dict(classes=NAMES, filter_cfg=dict(filter_empty_gt=True), pipeline=[]) | options
    return CheckedLVISDataset(
        data_root=str(root),
        ann_file=f"annotations/lvis_v1_{split}.json",
        data_prefix=dict(img=""),
        metainfo=dict(classes=options.pop("classes")),
        **options,
    )


def test_frequencies_leave_classes_out(lvis):
    everything, some = dataset(lvis), dataset(lvis, frequencies=["c", "f"])
    assert everything.metainfo["image_count"] == (4, 64, 900)
    assert some.metainfo["image_count"] == (0, 64, 900)
    labels = [{one["bbox_label"] for image in one_set for one in image["instances"]} for one_set in (everything, some)]
    assert labels == [{0, 1, 2}, {1, 2}]
    with pytest.raises(ConfigError, match="frequencies is 'x'; allowed are 'r', 'c', 'f'"):
        dataset(lvis, frequencies=["x"])


# --- the loss


@pytest.fixture(scope="module")
def federated(golden):
    arrays = read_arrays(golden / "maskrcnn" / "ops.npz")
    return {key: torch.from_numpy(value) for key, value in arrays.items() if key.startswith(("fed", "sigmoid"))}


def filled(weights, **options):
    loss = FederatedLoss(num_classes=len(weights), **options)
    loss.class_weights.copy_(torch.as_tensor(weights))
    return loss


def as_mmdet_calls(loss, logits, labels):
    return loss(logits, labels, torch.ones(len(labels)), avg_factor=float(len(labels)), reduction_override=None)


def test_federated_loss_equals_the_reference(federated, monkeypatch):
    logits, labels = federated["fed_logits"], federated["fed_gt_classes"].long()
    loss = filled(federated["fed_weights"], num_sample_classes=20)
    drawn = loss.sample_classes(labels)
    reference = federated["fed_classes"].long()
    present = len(labels.unique())
    assert_close(drawn[:present], reference[:present])
    assert drawn.shape == reference.shape
    monkeypatch.setattr(loss, "sample_classes", lambda _: reference)
    assert_close(as_mmdet_calls(loss, logits, labels), federated["fed_loss"][0], rtol=1e-6, atol=0)


def test_loss_of_all_classes_is_the_plain_sigmoid_loss(federated):
    loss = filled(federated["fed_weights"], num_sample_classes=1000)
    value = as_mmdet_calls(loss, federated["fed_logits"], federated["fed_gt_classes"].long())
    assert_close(value, federated["sigmoid_loss"][0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("background", [True, False])
def test_loss_and_gradient_equal_a_slow_reference(background):
    torch.manual_seed(0)
    labels = torch.tensor([2, 0, 2, 5 if background else 4])
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    loss = filled(torch.ones(5), num_sample_classes=4, loss_weight=0.5)
    classes = loss.sample_classes(labels).tolist()
    loss.sample_classes = lambda _: torch.tensor(classes)
    expected = 0.0
    for row, label in zip(logits, labels, strict=True):
        for c in range(5):
            if c in classes:
                expected = expected - (F.logsigmoid(row[c]) if c == label else F.logsigmoid(-row[c])) / 4
    assert_close(loss(logits, labels).double(), 0.5 * expected, rtol=1e-6, atol=0)
    loss(logits, labels).backward()
    assert logits.grad[:, 5].abs().max() == 0
    assert {c for c in range(5) if logits.grad[:, c].any()} == set(classes) - {5}


def test_weights_and_divisor_are_honoured():
    loss = filled(torch.ones(3), num_sample_classes=10)
    logits, labels = torch.randn(4, 4), torch.tensor([0, 1, 2, 3])
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    single = torch.stack([loss(logits[i : i + 1], labels[i : i + 1]) for i in range(4)])
    assert_close(loss(logits, labels, weights, avg_factor=3.0), (single * weights).sum() / 3)
    with pytest.raises(ConfigError, match="reduction_override='none'"):
        loss(logits, labels, reduction_override="none")


def test_draw_keeps_those_present_and_follows_the_weights():
    weights = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    loss = filled(weights, num_sample_classes=3)
    torch.manual_seed(0)
    draws = [loss.sample_classes(torch.tensor([6, 5, 5])) for _ in range(4000)]
    assert all(draw[:2].tolist() == [5, 6] and len(draw) == 3 for draw in draws)
    share = torch.stack(draws)[:, 2].bincount(minlength=7) / len(draws)
    assert_close(share[:5], weights[:5] / weights[:5].sum(), rtol=0, atol=0.03)
    assert loss.sample_classes(torch.tensor([0, 1, 2, 3])).tolist() == [0, 1, 2, 3]  # more present than asked for
    loss.num_sample_classes = 50
    assert sorted(loss.sample_classes(torch.tensor([2])).tolist()) == [1, 2, 3, 4, 5]  # no background, no weight 0
    assert len(filled(torch.ones(100)).sample_classes(torch.tensor([100, 3]))) == 50


def test_zero_weights_are_an_error():
    loss = FederatedLoss(num_classes=3)
    with pytest.raises(ConfigError, match=r"SetClassWeights.*checkpoint"):
        loss(torch.zeros(2, 4), torch.tensor([0, 3]))
    loss.load_state_dict({"class_weights": torch.ones(3)})
    assert loss(torch.zeros(2, 4), torch.tensor([0, 3])) > 0


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_loss_is_float32(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.manual_seed(0)
    loss = filled(torch.ones(30), num_sample_classes=31).to(device)
    logits, labels = 8 * torch.randn(64, 31, device=device).bfloat16(), torch.randint(31, (64,), device=device)
    expected = loss(logits.float(), labels)
    for autocast in (True, False):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            value = loss(logits, labels)
        assert value.dtype == torch.float32
        assert_close(value, expected)


def test_box_head_speaks_the_loss_protocol():
    head = load(CONFIGS / "pe_spatial_maskrcnn_lvis_g14.py").model.roi_head.bbox_head
    head.update(num_classes=3, in_channels=8, conv_out_channels=8, fc_out_channels=8)
    with pytest.raises(ConfigError, match=r"num_classes=3.*num_classes=1203"):
        MODELS.build(head)
    head.loss_cls.num_classes = 3
    built = MODELS.build(head)
    built.loss_cls.class_weights.fill_(1)
    assert built.fc_cls.out_features == 4
    labels = torch.tensor([0, 2, 1, 3])
    logits = torch.full((4, 4), -3.0).scatter(1, labels[:, None], 3.0)
    logits[0, 3] = 9.0  # the background's column does not matter
    logits[2, 0] = 9.0  # the one mistake
    boxes = torch.zeros(4, 4)
    losses = built.loss(logits, torch.zeros(4, 12), boxes, labels, torch.ones(4), boxes, torch.ones(4, 4))
    assert_close(losses["loss_cls"], built.loss_cls(logits, labels))
    assert_close(losses["acc_classes"].squeeze(), torch.tensor(200 / 3))
    assert_close(built.probabilities(logits), logits.sigmoid())


# --- the hook


def runner_of(model, trained_on):
    return SimpleNamespace(model=model, train_dataloader=SimpleNamespace(dataset=trained_on))


def test_hook_takes_the_counts_of_the_training_set(lvis):
    path = lvis / "annotations" / "lvis_v1_train.json"
    shuffled = json.loads(path.read_text())
    shuffled["categories"].reverse()  # labels are in the order of ids
    write(path, shuffled)
    model = torch.nn.ModuleList([FederatedLoss(num_classes=3), FederatedLoss(num_classes=3)])
    HOOKS.build(dict(type="SetClassWeights")).before_train(runner_of(model, RepeatDataset(dataset(lvis), 2)))
    for loss in model:
        assert_close(loss.class_weights, torch.tensor([2.0, 8.0, 30.0]))


def test_hook_takes_the_counts_of_some_classes(lvis):
    loss = FederatedLoss(num_classes=2)
    SetClassWeights(power=1.0).before_train(runner_of(loss, dataset(lvis, classes=("rare", "frequent"))))
    assert loss.class_weights.tolist() == [4.0, 900.0]


def test_hook_names_what_is_missing(lvis):
    hook, train = SetClassWeights(), dataset(lvis)
    with pytest.raises(ConfigError, match="no FederatedLoss"):
        hook.before_train(runner_of(torch.nn.Linear(1, 1), train))
    with pytest.raises(ConfigError, match=r"3 classes.*num_classes=4"):
        hook.before_train(runner_of(FederatedLoss(num_classes=4), train))
    path = lvis / "annotations" / "lvis_v1_train.json"
    without = json.loads(path.read_text())
    del without["categories"][1]["image_count"]
    write(path, without)
    with pytest.raises(DatasetError, match=r"image_count.*lvis_v1_train.json"):
        hook.before_train(runner_of(FederatedLoss(num_classes=3), dataset(lvis)))


# --- the sampler


class Labelled(list):
    """A dataset of labels alone."""

    def get_data_info(self, index):
        return dict(instances=[dict(bbox_label=label) for label in self[index]])


def detectron2_stream(factors, seed):
    """As its RepeatFactorTrainingSampler draws."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rounded = factors.trunc() + (torch.rand(len(factors), generator=generator) < factors.frac()).float()
        epoch = [i for i, times in enumerate(rounded.tolist()) for _ in range(int(times))]
        yield from (epoch[k] for k in torch.randperm(len(epoch), generator=generator).tolist())


def test_factors_equal_a_case_by_hand_and_a_slow_reference():
    expected = torch.tensor([1.0, 1.0, math.sqrt(0.5 / 0.25), 1.0])
    assert_close(repeat_factors([[0], [0], [0, 1, 1], []], 0.5), expected)
    rng = np.random.default_rng(0)
    labels = [rng.zipf(1.5, rng.integers(0, 6)).clip(max=200).tolist() for _ in range(300)]
    share = {c: sum(c in of_image for of_image in labels) / 300 for c in range(201)}
    slow = [max([1.0, *(math.sqrt(0.1 / share[c]) for c in of_image)]) for of_image in labels]
    assert max(slow) > 4
    assert torch.equal(repeat_factors(labels, 0.1), torch.tensor(slow))


def test_sampler_draws_as_detectron2():
    data = Labelled([[0], [0, 1], [0], [0, 2], [0], [], [0, 1], [0]])
    sampler = DATA_SAMPLERS.build(dict(type="RepeatFactorSampler", repeat_thr=0.9, dataset=data, seed=7))
    reference = detectron2_stream(sampler.factors, 7)
    assert list(islice(sampler, 100)) == list(islice(reference, 100))
    resumed = RepeatFactorSampler(data, repeat_thr=0.9, seed=7)
    if hasattr(resumed, "skip"):  # mmengine 0.10.7 reads data to skip it
        resumed.skip(100)
        assert list(islice(resumed, 20)) == list(islice(reference, 20))


def test_expected_repeats_hold_over_many_epochs():
    data = Labelled([[0]] * 8 + [[1], [1, 2]])
    sampler = RepeatFactorSampler(data, repeat_thr=1.0, seed=0)
    assert_close(sampler.factors, torch.tensor([math.sqrt(10 / 8)] * 8 + [math.sqrt(5), math.sqrt(10)]))
    epochs = 4000
    drawn = torch.tensor(list(islice(sampler, int(epochs * sampler.factors.sum())))).bincount() / epochs
    assert_close(drawn, sampler.factors, rtol=0, atol=0.03)


def test_shards_interleave_to_one_stream(monkeypatch):
    data = Labelled([[0]] * 30 + [[1]])
    whole = list(islice(RepeatFactorSampler(data, repeat_thr=0.5, seed=3), 90))
    shards = []
    for rank in range(3):
        monkeypatch.setattr("mmengine.dataset.sampler.get_dist_info", lambda rank=rank: (rank, 3))
        shards.append(list(islice(RepeatFactorSampler(data, repeat_thr=0.5, seed=3), 30)))
    assert [index for step in zip(*shards, strict=True) for index in step] == whole
    assert set(whole) == set(range(31))
    assert whole != list(islice(RepeatFactorSampler(data, repeat_thr=0.5, seed=4), 90))


def test_sampler_reads_filtered_images_through_wrappers(lvis):
    data = dataset(lvis)  # image 4 has no objects
    assert len(data) == 3
    factors = RepeatFactorSampler(data, repeat_thr=0.9).factors
    assert_close(factors, torch.tensor([math.sqrt(0.9 * 3), math.sqrt(0.9 * 3 / 2), 1.0]))
    assert_close(RepeatFactorSampler(RepeatDataset(data, 2), repeat_thr=0.9).factors, factors.repeat(2))
    with pytest.raises(ConfigError, match="repeat_thr is 0"):
        RepeatFactorSampler(data, repeat_thr=0)


# --- the data


def test_images_of_both_folders_are_found(lvis):
    data = dataset(lvis, "val", test_mode=True)
    assert [item["img_path"].split("/")[-2] for item in data] == ["val2017", "train2017", "val2017", "val2017"]
    assert [instance["bbox_label"] for instance in data[1]["instances"]] == [2, 1]


def test_classes_are_those_of_the_released_files():
    assert len(CLASSES) == len(set(CLASSES)) == 1203
    assert CLASSES[654] == "speaker_(stero_equipment)"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["images"][0].pop("coco_url"), r"images\[0\] has no coco_url"),
        (lambda c: c["images"][0].update(coco_url="1.jpg"), r"images\[0\] has coco_url '1.jpg'"),
        (lambda c: c["images"][1].pop("neg_category_ids"), "has no neg_category_ids"),
        (lambda c: c["categories"][0].update(frequency="x"), "has frequency 'x'"),
        (lambda c: c["annotations"][0].pop("segmentation"), "has no segmentation"),
        (lambda c: c["categories"][1].update(name="else"), "no categories common: .* file has rare, else, frequent"),
        (lambda c: c["images"][0].update(coco_url="http://x/val2017/9.jpg"), r"1 of the 4 images.*--data-root"),
    ],
)
def test_errors_name_file_and_remedy(lvis, change, message):
    path = lvis / "annotations" / "lvis_v1_train.json"
    broken = json.loads(path.read_text())
    change(broken)
    write(path, broken)
    with pytest.raises(DatasetError, match=message) as error:
        dataset(lvis)
    assert str(path) in str(error.value)


def test_wrong_folder_is_one_clear_error(lvis, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(DatasetError, match=r"no annotation file at .*--data-root"):
        dataset(empty)
    with pytest.raises(DatasetError, match=r"no annotation file at .*--data-root"):
        FastLVISMetric(ann_file=str(empty / "lvis_v1_val.json"))
    for folder in ("train2017", "val2017"):
        for file in (lvis / folder).iterdir():
            file.unlink()
    with pytest.raises(DatasetError, match="4 of the 4 images"):
        dataset(lvis)


# --- the metric


def evaluate(path, detections, *, classes=NAMES, **options):
    """Boxes (x, y, w, h) with label and score of each image -> the results of the box metric."""
    metric = Evaluator(METRICS.build(dict(type="FastLVISMetric", ann_file=str(path), metric="bbox") | options))
    metric.dataset_meta = dict(classes=classes)
    for number, rows in detections.items():
        boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = dict(
            bboxes=boxes,
            labels=torch.tensor([row[1] for row in rows], dtype=torch.long),
            scores=torch.tensor([row[2] for row in rows], dtype=torch.float32),
        )
        metric.process(data_samples=[dict(img_id=number, pred_instances=found)], data_batch=None)
    return metric.evaluate(len(detections))


def test_detections_count_only_where_a_image_is_annotated(tmp_path):
    found = [(GRID[0], 2, 0.5)]  # of the one object, 'frequent'
    wrong = (GRID[5], 2, 0.9)
    other = (GRID[5], 1, 0.9)
    for name, of_image, rows, expected in (
        ("matched", image(1), found, 1.0),
        ("not annotated", image(1), [*found, other], 1.0),
        ("wrong", image(1), [*found, wrong], 0.5),
        ("not all annotated", image(1, incomplete=[3]), [*found, wrong], 1.0),
        ("nothing", image(1), [], 0.0),
    ):
        path = write(tmp_path / "lvis.json", content([of_image], objects(1, 3)))
        assert evaluate(path, {1: rows})["lvis/bbox_AP"] == pytest.approx(expected), name
    # a class that an image lacks counts there, once it has an object elsewhere
    pair = [image(1, absent=[2]), image(2)]
    path = write(tmp_path / "lvis.json", content(pair, [*objects(1, 3), *objects(2, 2)]))
    results = evaluate(path, {1: [*found, other], 2: [(GRID[0], 1, 0.5)]})
    assert [results[f"lvis/bbox_AP{group}"] for group in "cf"] == pytest.approx([0.5, 1.0])
    assert math.isnan(results["lvis/bbox_APr"])
    assert results["lvis/bbox_AP"] == pytest.approx(0.75)
    assert results["lvis/bbox_APs"] == pytest.approx(0.75)
    assert math.isnan(results["lvis/bbox_APl"])


def test_limit_is_over_all_classes_of_an_image(tmp_path):
    path = write(tmp_path / "lvis.json", content([image(1)], objects(1, 3)))
    rows = [(GRID[i], 0, 0.9) for i in range(4)] + [(GRID[0], 2, 0.1)]
    assert evaluate(path, {1: rows}, max_dets=5)["lvis/bbox_AP"] == pytest.approx(1.0)
    assert evaluate(path, {1: rows}, max_dets=4)["lvis/bbox_AP"] == 0


def test_what_cannot_count_is_not_kept(tmp_path):
    path = write(tmp_path / "lvis.json", content([image(1, absent=[2])], objects(1, 3)))
    metric = FastLVISMetric(ann_file=str(path), metric="bbox")
    metric.dataset_meta = dict(classes=NAMES)
    found = dict(bboxes=torch.zeros(3, 4), labels=torch.tensor([0, 1, 2]), scores=torch.tensor([0.9, 0.5, 0.7]))
    metric.process(None, [dict(img_id=1, pred_instances=found)])
    assert metric.results[0]["categories"] == [3, 2]  # nothing is known about category 1 in this image


def test_results_do_not_depend_on_the_parts(tmp_path, monkeypatch):
    path = write(tmp_path / "lvis.json", content([image(1)], objects(1, 1, 2, 3)))
    rows = [(GRID[i], i, 0.5) for i in range(3)] + [(GRID[7], 1, 0.9)]
    whole = evaluate(path, {1: rows})
    monkeypatch.setattr(FastLVISMetric, "_CHUNK", 2)
    assert evaluate(path, {1: rows}) == pytest.approx(whole, nan_ok=True)
    assert whole["lvis/bbox_AP"] == pytest.approx((1 + 0.5 + 1) / 3)
    rows = [(GRID[i], k, 0.5) for k, i in enumerate((0, 2))]
    assert evaluate(path, {1: rows}, classes=("rare", "frequent"))["lvis/bbox_AP"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.update(id=a["id"] - 1000),  # from 0
        lambda a: a.update(id="x"),
        lambda a: a.update(area=1e13),
        lambda a: a.update(iscrowd=None),
        lambda a: a.update(category_id=str(a["category_id"])),
    ],
    ids=["ids from 0", "ids of text", "area", "iscrowd", "category_id of text"],
)
def test_damaged_files_score_one(tmp_path, change):
    annotations = objects(1, 1, 2, 3)
    for entry in annotations:
        change(entry)
    path = write(tmp_path / "lvis.json", content([image(1)], annotations))
    assert evaluate(path, {1: [(GRID[i], i, 0.5) for i in range(3)]})["lvis/bbox_AP"] == 1.0


def test_tested_images_are_evaluated_alone(tmp_path, log):
    path = write(tmp_path / "lvis.json", content([image(1), image(2)], [*objects(1, 1), *objects(2, 1)]))
    assert evaluate(path, {2: [(GRID[0], 0, 0.5)]})["lvis/bbox_AP"] == 1.0
    assert any("the 1 of the 2 images" in line for line, _ in log)
    with pytest.raises(ConfigError, match="label 7 but the dataset has 3 classes"):
        evaluate(path, {2: [(GRID[0], 7, 0.5)]})


def test_results_as_json(tmp_path):
    path = write(tmp_path / "lvis.json", content([image(1)], objects(1, 3)))
    evaluate(path, {1: [(GRID[0], 2, 0.5)]}, out_file=str(tmp_path / "out" / "results.json"))
    (result,) = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result == dict(image_id=1, category_id=3, score=0.5, bbox=GRID[0])
    metric = FastLVISMetric(ann_file=str(path), out_file=str(tmp_path / "masks.json"))
    metric.dataset_meta = dict(classes=NAMES)
    mask = torch.zeros(1, *SIZE, dtype=torch.bool)
    mask[0, 1:7, 1:7] = True
    found = dict(bboxes=torch.tensor([[1.0, 1, 7, 7]]), labels=torch.tensor([2]), scores=torch.ones(1), masks=mask)
    metric.process(None, [dict(img_id=1, pred_instances=found)])
    assert metric.evaluate(1)["lvis/segm_AP"] == 1.0
    (result,) = json.loads((tmp_path / "masks.json").read_text())
    assert result["segmentation"]["size"] == list(SIZE)
    assert result["bbox"] == GRID[0]


def test_metric_says_what_it_cannot_use(lvis):
    path = lvis / "annotations" / "lvis_v1_val.json"
    with pytest.raises(DatasetError, match=f"image 9 is not in {path}"):
        evaluate(path, {9: []})
    with pytest.raises(ConfigError, match="'bbox', 'segm' or both"):
        FastLVISMetric(ann_file=str(path), metric=["proposal"])


def tiny(root):
    """The LVIS config on the tiny set."""
    cfg = load(CONFIGS / "pe_spatial_maskrcnn_lvis_g14.py")
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.update(data_root=str(root), metainfo=dict(classes=NAMES))
        for step in loader.dataset.pipeline:
            step.update({key: SIZE[::-1] for key in ("scale", "crop_size") if key in step})
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = str(root / "annotations" / "lvis_v1_val.json")
    return cfg


def test_perfect_predictions_of_more_than_100_objects_are_perfect(lvis):
    cfg = tiny(lvis)
    data = DATASETS.build(cfg.val_dataloader.dataset)
    evaluator = Evaluator(METRICS.build(cfg.val_evaluator))
    evaluator.dataset_meta = data.metainfo
    for packed in data:
        sample = packed["data_samples"]
        truth = sample.gt_instances
        sample.pred_instances = InstanceData(
            bboxes=truth.bboxes.tensor,
            labels=truth.labels,
            scores=torch.linspace(0.9, 0.1, len(truth)),
            masks=torch.from_numpy(truth.masks.to_ndarray()).bool(),
        )
        evaluator.process(data_samples=[sample], data_batch=None)
    results = evaluator.evaluate(len(data))
    for key in ("bbox_AP", "bbox_AP50", "bbox_APr", "bbox_APc", "bbox_APf", "segm_AP", "segm_APs"):
        assert results[f"lvis/{key}"] == pytest.approx(1.0), key


# --- the configs


@pytest.mark.parametrize("name", RELEASED)
def test_released_layout(golden, name):
    contract = read_json(golden / f"maskrcnn/contract_mask_rcnn_{RELEASED[name]}.json")
    with torch.device("meta"):
        state = MODELS.build(load(CONFIGS / f"{name}.py").model).state_dict()
    released = sorted(tuple(shape) for key, shape in contract["keys"].items() if "rope" not in key)
    assert sorted(tuple(value.shape) for value in state.values()) == released
    if "lvis" in name:
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        assert shapes["roi_head.bbox_head.fc_cls.weight"] == (1204, 1024)
        assert shapes["roi_head.bbox_head.fc_reg.weight"] == (4812, 1024)
        assert shapes["roi_head.mask_head.conv_logits.weight"] == (1203, 256, 1, 1)
        assert shapes["roi_head.bbox_head.loss_cls.class_weights"] == (1203,)


@pytest.mark.parametrize("name", [name for name in RELEASED if "75ep" in RELEASED[name]])
def test_released_recipe_of_75_epochs(name):
    cfg = load(CONFIGS / f"{name}.py")
    assert (cfg.optim_wrapper.optimizer.lr, cfg.train_dataloader.batch_size) == (5e-5, 1)
    assert cfg.train_cfg.max_iters == 184375 * 3 // 4
    warmup, steps = cfg.param_scheduler
    assert warmup.end == int(250 / 184375 * cfg.train_cfg.max_iters)
    assert list(steps.milestones) == [163889 * 3 // 4, 177546 * 3 // 4]
    assert steps.end == cfg.train_cfg.max_iters
    assert cfg.model.backbone.variant == name[: name.index("_maskrcnn")] + "_g14_448"
    if "lvis" in name:
        assert (cfg.model.test_cfg.rcnn.score_thr, cfg.model.test_cfg.rcnn.max_per_img) == (0.02, 300)
        assert cfg.model.roi_head.bbox_head.loss_cls.num_sample_classes == 50
        assert cfg.train_dataloader.sampler == dict(type="RepeatFactorSampler", repeat_thr=0.001)
        assert cfg.train_cfg.val_interval == 30000
        assert [hook.type for hook in cfg.custom_hooks] == ["ResumeWithoutPretrained", "SetClassWeights"]


@pytest.mark.slow
def test_a_tiny_detector_trains_and_is_evaluated(lvis, tmp_path):
    cfg = tiny(lvis)
    encoder = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2, class_token=False)
    cfg.model.backbone.update(
        variant=encoder, geometry="release", drop_path_rate=0.0, grad_checkpointing=False, init_cfg=None
    )
    cfg.model.data_preprocessor.pad_size_divisor = 64
    cfg.model.train_cfg.rcnn.sampler.num = 16
    cfg.model.roi_head.mask_head.num_classes = cfg.model.roi_head.bbox_head.num_classes = len(NAMES)
    cfg.model.roi_head.bbox_head.loss_cls.update(num_classes=len(NAMES), num_sample_classes=2)
    cfg.model.test_cfg.rpn.max_per_img = 20
    cfg.optim_wrapper.paramwise_cfg.layer_decay_rate = 0.7
    cfg.train_cfg.update(max_iters=2, val_interval=2)
    cfg.default_hooks.checkpoint.interval = 2
    cfg.work_dir = str(tmp_path / "out")
    runner = Runner.from_cfg(Config(cfg.to_dict()))
    runner.train()
    assert_close(runner.model.roi_head.bbox_head.loss_cls.class_weights, torch.tensor([2.0, 8.0, 30.0]))
    assert {"val/lvis/bbox_AP", "val/lvis/segm_AP"} <= runner.message_hub.log_scalars.keys()
    saved = torch.load(tmp_path / "out" / "iter_2.pth", weights_only=False)["state_dict"]
    assert_close(saved["roi_head.bbox_head.loss_cls.class_weights"], torch.tensor([2.0, 8.0, 30.0]))
