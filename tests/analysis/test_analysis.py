"""The numbers of a report equal those of tidecv and of COCO's evaluation."""

import json
import os

import numpy as np
import pytest

pytest.importorskip("mmdet")
from helpers.coco import annotation
from helpers.detections import write_detections
from helpers.repository import shared_folder

from pe_spatial.analysis.counts import calibrate, confusion_matrix
from pe_spatial.analysis.precision import Precision, difference_in_ap
from pe_spatial.analysis.results import match_scenes, read_results, read_truth
from pe_spatial.analysis.tide import KINDS, count_errors

# tidecv 1.0.1: TIDE().evaluate(COCO(truth), COCOResult(results), mode=...): AP; costs of Cls, Loc, Both, Dupe, Bkg,
# Miss; costs of FalsePos and FalseNeg; numbers of errors.
RANDOM = (
    11.98844884488449,
    (1.117397454031119, 13.955288385981463, 0, 0, 5.145764576457646, 9.974068835454998),
    (15.73432343234323, 21.702027345591723),
    (1, 11, 5, 3, 12, 11),
)
REFERENCE = {
    "bbox": (
        64.20498881733425,
        (22.2460397441685, 0.22789102370710168, 0, 0.018972971237033676, 0, 8.523573787723365),
        (6.821587524510463, 17.684978535217184),
        (83, 1, 0, 1, 0, 97),
    ),
    "segm": (
        51.80081155512982,
        (16.186000852974452, 11.600722789458686, 1.0128509521506288, 0, 0.2681107488310275, 7.778639338018046),
        (8.660366141587232, 23.74583810883663),
        (76, 82, 7, 0, 4, 109),
    ),
}
# val2014_fake_eval_res.txt of cocodataset/cocoapi, and SOURCES.md of the data
PUBLISHED = {"bbox": (0.505, 0.697, 0.573, 0.586, 0.519, 0.501), "segm": (0.320, 0.562, 0.299, 0.387, 0.310, 0.327)}


def read(truth, results, *, masks=False):
    content = read_truth(str(truth), masks=masks)
    return content, read_results(results, content, masks=masks)


def assert_as_tidecv(scenes, expected):
    ap, costs, special, counts = expected
    errors = count_errors(scenes)
    assert errors.ap == pytest.approx(ap, abs=1e-6)
    assert [errors.costs[kind] for kind in KINDS] == pytest.approx(costs, abs=1e-6)
    assert (errors.false_positives, errors.false_negatives) == pytest.approx(special, abs=1e-6)
    assert tuple(errors.counts[kind] for kind in KINDS) == counts


def test_costs_equal_tidecv_with_crowds_and_ties(tmp_path):
    truth, results = read(*write_detections(tmp_path))
    assert any(a["iscrowd"] for a in truth.anns.values())
    assert_as_tidecv(match_scenes(truth, results, masks=False), RANDOM)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_numbers_of_the_reference_set(kind):
    folder = shared_folder(os.environ) / "data/detection/reference_cocoeval"
    masks = kind == "segm"
    truth, results = read(
        folder / "instances_val2014_100.json", folder / f"instances_val2014_fake{kind}100_results.json", masks=masks
    )
    assert_as_tidecv(match_scenes(truth, results, masks=masks), REFERENCE[kind])
    precision = Precision(truth, results, masks=masks)
    assert precision.rows[0].values == pytest.approx(PUBLISHED[kind], abs=6e-4)
    assert precision.curve.mean(1) == pytest.approx([precision.rows[0].values[i] for i in (1, 2, 0)])


def test_precision_equals_the_evaluator(tmp_path):
    from pe_spatial.detection.coco_metric import CheckedCocoMetric

    paths = write_detections(tmp_path)
    truth, results = read(*paths)
    rows = Precision(truth, results, masks=False).rows
    metric = CheckedCocoMetric(ann_file=str(paths[0]), metric="bbox", classwise=True)
    classes = tuple(category["name"] for category in truth.cats.values())
    metric.dataset_meta = dict(classes=classes)
    for image in truth.imgs:
        own = [one for one in results if one["image_id"] == image]
        boxes = np.array([one["bbox"] for one in own], float).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([one["category_id"] - 1 for one in own], int)
        found = dict(bboxes=boxes, scores=np.array([one["score"] for one in own]), labels=labels)
        metric.results.append(({"img_id": image, "width": 100, "height": 100}, dict(img_id=image, **found)))
    values = metric.compute_metrics(metric.results)
    names = ("mAP", "mAP_50", "mAP_75", "mAP_s", "mAP_m", "mAP_l")
    assert rows[0].values == pytest.approx([values[f"bbox_{name}"] for name in names], abs=6e-4)  # rounded there
    for row in rows[1:]:
        assert row.values[0] == pytest.approx(values[f"{row.name}_precision"], abs=6e-4)


def test_bootstrap_weighs_images(tmp_path):
    truth, results = read(*write_detections(tmp_path))
    precision = Precision(truth, results, masks=False)
    once, twice = np.ones(12), np.full(12, 2)
    values = [[one.average_precision(weight) for one in precision.by_class()] for weight in (once, twice)]
    assert values[0] == pytest.approx([row.values[0] for row in precision.rows[1:]], abs=1e-9)
    assert values[0] == pytest.approx(values[1], abs=1e-9)
    # an image that counts twice equals a set that has it twice; equal scores would lie in another order there
    results = [{**one, "score": one["score"] + 0.001 * i} for i, one in enumerate(results)]
    precision = Precision(truth, results, masks=False)
    content, more = json.loads((tmp_path / "truth.json").read_text()), list(results)
    content["images"].append({**content["images"][0], "id": 13})
    for one in [a for a in content["annotations"] if a["image_id"] == 1]:
        content["annotations"].append({**one, "image_id": 13, "id": len(content["annotations"]) + 1})
    more += [{**one, "image_id": 13} for one in results if one["image_id"] == 1]
    (tmp_path / "twice.json").write_text(json.dumps(content))
    doubled = Precision(read_truth(str(tmp_path / "twice.json"), masks=False), more, masks=False)
    weight = np.array([2, *[1] * 11])
    expected = [row.values[0] for row in doubled.rows[1:]]
    assert [one.average_precision(weight) for one in precision.by_class()] == pytest.approx(expected, abs=1e-9)


def test_difference_and_its_interval(tmp_path):
    truth, results = read(*write_detections(tmp_path, images=40))
    worse = [{**one, "bbox": [one["bbox"][0] + 12, *one["bbox"][1:]]} for one in results]
    both = [Precision(truth, one, masks=False) for one in (results, worse)]
    found = difference_in_ap(*both, samples=60)
    assert found.value == pytest.approx(both[1].rows[0].values[0] - both[0].rows[0].values[0])
    assert found.low < found.value < found.high < 0
    same = difference_in_ap(both[0], both[0], samples=5)
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_confusion_and_calibration(tmp_path):
    content = dict(
        images=[dict(id=1, file_name="1.jpg", height=100, width=100)],
        categories=[dict(id=1, name="a"), dict(id=5, name="b")],
        annotations=[annotation(1, 1, [0, 0, 20, 20]), annotation(2, 1, [50, 50, 20, 20], 5)],
    )
    content["annotations"] += [annotation(3, 1, [0, 60, 20, 20], 5), annotation(4, 1, [60, 0, 40, 40], iscrowd=1)]
    detections = [  # category, box, score
        (1, [0, 0, 20, 20], 0.95), (1, [50, 50, 20, 20], 0.9), (5, [25, 25, 9, 9], 0.85), (1, [62, 2, 9, 9], 0.8),
        (5, [0, 60, 20, 20], 0.05),
    ]  # fmt: skip
    results = [dict(image_id=1, category_id=c, bbox=box, score=score) for c, box, score in detections]
    (tmp_path / "t.json").write_text(json.dumps(content))
    (tmp_path / "r.json").write_text(json.dumps(results))
    truth, results = read(tmp_path / "t.json", tmp_path / "r.json")
    scenes = match_scenes(truth, results, masks=False)
    assert confusion_matrix(scenes, [1, 5]).tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    calibration = calibrate(scenes)
    assert calibration.count.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 1, 2]  # not the one in the crowd
    assert calibration.precision[[0, 8, 9]].tolist() == [1, 0, 0.5]
    assert calibration.error == pytest.approx((0.95 + 0.85 + 2 * 0.425) / 4)
