"""Depth metrics: every reference, crops, alignment, empty images, tables, bounded memory."""

import csv
import math
import pickle
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("mmseg")
from helpers.golden import read_arrays, read_json
from mmengine.evaluator import Evaluator
from mmengine.registry import METRICS, DefaultScope
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from pe_spatial.depth import metrics
from pe_spatial.depth.metrics import (
    CheckedDepthMetric,
    align_prediction,
    boundary_f1,
    depth_metrics,
    evaluation_crop,
    paste_prediction,
    range_metrics,
)
from pe_spatial.depth.transforms import bottom_center_box
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmseg
OURS = {"a1": "d1", "a2": "d2", "a3": "d3", "log_10": "log10"}
PLAIN = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "d1", "d2", "d3", "mae")


@pytest.fixture(scope="module")
def indoor(golden):
    """Arrays, facts, and the maps in meters, (4, 480, 640)."""
    folder = golden / "depth"
    arrays = read_arrays(folder / "metrics_480x640.npz")
    maps = [torch.from_numpy(arrays[key].astype(np.float32) / 1000) for key in ("pred_mm", "gt_mm")]
    return arrays, read_json(folder / "metrics.json"), *maps


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(metrics, "print_log", lambda message, **_: lines.append(message))
    return lines


def order(facts, reference):
    names = facts["order"].get(reference) or facts["order"][reference.rsplit("_", 1)[0]]
    return [OURS.get(name, name) for name in names]


def sample(pred, target, **meta):
    out = SegDataSample(metainfo={"img_path": "a.png", **meta})
    out.pred_depth_map, out.gt_depth_map = (PixelData(data=torch.as_tensor(x)[None]) for x in (pred, target))
    return out


def evaluate(metric, samples):
    evaluator = Evaluator([metric])
    for one in samples:
        evaluator.process(data_samples=[one])
    return evaluator.evaluate(len(samples))


@pytest.mark.parametrize(
    ("reference", "crop"),
    [
        *((name, crop) for name in ("bts", "toolbox", "toolbox_float64") for crop in ("none", "eigen", "garg")),
        *((name, crop) for name in ("dinov3", "mmseg_clamped") for crop in ("none", "eigen")),
    ],
)
def test_each_image_equals_the_reference(indoor, reference, crop):
    arrays, facts, pred, target = indoor
    metric = CheckedDepthMetric(crop=crop, max_depth=10, silog="mmseg" if "mmseg" in reference else "bts")
    for i, expected in enumerate(arrays[f"{reference}/{crop}"]):
        row = dict(zip(metric.columns, metric.evaluate_image(pred[i], target[i], max_depth=10), strict=True))
        assert row["pixels"] == facts[f"valid_pixels/{crop}"][i]
        for name, value in zip(order(facts, reference), expected, strict=True):
            if row["pixels"] == 0:  # DINOv3's silog of nothing is 0, which lowers its mean
                assert math.isnan(row[name])
            else:
                assert row[name] == pytest.approx(value, rel=1e-6, abs=1e-6), name


@pytest.mark.parametrize("crop", ["none", "eigen"])
def test_unclamped_predictions_give_mmsegs_values_infinite_ones_too(indoor, crop):
    arrays, facts, pred, target = indoor
    top, bottom, left, right = evaluation_crop(crop, 480, 640)
    infinite = 0
    for i, expected in enumerate(arrays[f"mmseg/{crop}"]):
        p, t = pred[i, top:bottom, left:right], target[i, top:bottom, left:right]
        valid = (t > 1e-3) & (t < 10)
        got = depth_metrics(p[valid], t[valid], silog="mmseg")
        for name, value in zip(order(facts, "mmseg"), expected, strict=True):
            assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
            infinite += math.isinf(value)
    assert infinite


def test_means_leave_empty_images_out_and_count_them(indoor, log):
    _, facts, pred, target = indoor
    for reference in ("toolbox", "dinov3"):
        got = evaluate(CheckedDepthMetric(max_depth=10), [sample(p, t) for p, t in zip(pred, target, strict=True)])
        expected = {OURS.get(key, key): value for key, value in facts[f"{reference}/eigen/mean"].items()}
        if reference == "dinov3":
            assert expected.pop("silog") == pytest.approx(got["silog"] * 3 / 4)  # its 0 for the empty image
        assert {name: got[name] for name in expected} == pytest.approx(expected, rel=1e-6)
        assert got["empty"] == 1
    assert "depth of 3 images, from 0.001 m to 10 m" in log[-1]
    assert "1 more images have no valid pixel and are omitted (such as a.png)" in log[-1]


def test_crops_are_the_references_at_every_size(indoor):
    facts = indoor[1]
    for size, box in facts["dinov3_scaled_eigen_boxes"].items():
        assert list(evaluation_crop("eigen", *map(int, size.split("x")))) == box
    for name, box in facts["crop_boxes_y0_y1_x0_x1"].items():
        assert list(evaluation_crop(name, 480, 640)) == box
    assert evaluation_crop("kitti_eigen", 375, 1242) == (124, 342, 44, 1197)
    with pytest.raises(ConfigError, match="crop is 'nyu'; allowed are 'none', 'eigen', 'garg', 'kitti_eigen'"):
        evaluation_crop("nyu", 480, 640)


@pytest.mark.parametrize("crop", ["none", "garg", "kitti_eigen"])
def test_kitti_pasted_and_cut(golden, indoor, crop):
    arrays = read_arrays(golden / "depth/metrics_driving_375x1242.npz")
    pred, target = (torch.from_numpy(arrays[key].astype(np.float32) / 256) for key in ("pred_256", "gt_256"))
    left, top, right, bottom = bottom_center_box(*target.shape, size=pred.shape)
    assert (top, left) == (375 - 352, int((1242 - 1216) / 2))
    for name, truth, pasted in (("kb_crop", target, True), ("cropped_gt", target[top:bottom, left:right], False)):
        metric = CheckedDepthMetric(crop=crop, max_depth=80, pasted=pasted)
        row = dict(zip(metric.columns, metric.evaluate_image(pred, truth, max_depth=80), strict=True))
        (expected,) = arrays[f"bts_{name}/{crop.removeprefix('kitti_')}"]
        got = [row[key] for key in order(indoor[1], "bts")]
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    with pytest.raises(DatasetError, match=r"prediction of 352x1216 does not fit into a depth map of 100x1242"):
        paste_prediction(pred, 100, 1242)


def test_ranges_split_the_image(indoor):
    _, _, pred, target = indoor
    valid = (target[0] > 1e-3) & (target[0] < 10)
    p, t = pred[0][valid], target[0][valid]
    table = np.array(range_metrics(p, t, (2, 5))).reshape(3, 4)
    whole = depth_metrics(p, t)
    count = table[:, 0]
    assert count.tolist() == [(t < 2).sum(), ((t >= 2) & (t < 5)).sum(), (t >= 5).sum()]
    assert (table[:, 1] * count).sum() / count.sum() == pytest.approx(whole["abs_rel"], rel=1e-5)
    assert math.sqrt((table[:, 2] ** 2 * count).sum() / count.sum()) == pytest.approx(whole["rmse"], rel=1e-5)
    assert (table[:, 3] * count).sum() / count.sum() == pytest.approx(whole["d1"], rel=1e-5)
    far = range_metrics(p[t > 5], t[t > 5], (2, 5))
    assert far[0] == 0
    assert math.isnan(far[2])


def test_prediction_is_resized_and_cleaned():
    target = torch.full((48, 64), 4.0)
    metric = CheckedDepthMetric(max_depth=10)
    row = metric.evaluate_image(torch.full((24, 32), 4.0), target, max_depth=10)
    assert row[1] == 0
    for bad, clamped in ((math.inf, 10), (-math.inf, 1e-3), (math.nan, 1e-3), (-3.0, 1e-3), (50.0, 10)):
        row = metric.evaluate_image(torch.full((48, 64), bad), target, max_depth=10)
        assert row[metric.columns.index("mae")] == pytest.approx(abs(clamped - 4))


def test_each_pair_may_have_its_own_range():
    target = torch.full((48, 64), 30.0)
    with pytest.raises(ConfigError, match="neither CheckedDepthMetric nor the dataset has a max_depth"):
        evaluate(CheckedDepthMetric(), [sample(target, target)])
    assert evaluate(CheckedDepthMetric(), [sample(target, target, max_depth=80)])["rmse"] == 0
    with pytest.raises(DatasetError, match=r"none of the 1 images has a valid pixel \(such as a.png\); check the sc"):
        evaluate(CheckedDepthMetric(max_depth=10), [sample(target, target, max_depth=80)])


def test_alignment_undoes_what_a_relative_prediction_does_not_know():
    torch.manual_seed(0)
    target = torch.rand(20, 30) * 8 + 1
    valid = target < 7
    cases = {
        "median": (target / 3, 3, 0),
        "log": (target / 3, 3, 0),
        "depth": ((target - 2) / -4, -4, 2),
        "disparity": ((1 / target - 0.1) / 3, 3, 0.1),
    }
    for mode, (pred, scale, shift) in cases.items():
        pred = torch.where(valid, pred, pred + 0)
        aligned, *fit = align_prediction(pred, target, valid, mode)
        torch.testing.assert_close(aligned, target, rtol=1e-4, atol=1e-4)
        assert fit == pytest.approx([scale, shift], abs=1e-4)
    pred = target / 3
    assert align_prediction(pred, target, valid, "none")[0] is pred
    with pytest.raises(ConfigError, match="align is 'mean'"):
        align_prediction(pred, target, valid, "mean")


def test_alignment_fits_valid_pixels_by_least_squares():
    torch.manual_seed(0)
    target, pred = torch.rand(20, 30) * 8 + 1, torch.rand(20, 30)
    valid = torch.rand(20, 30) > 0.3
    pred[~valid] = 1e6
    pred[0, 0] = math.nan
    use = (valid & pred.isfinite()).numpy()
    p, t = pred.numpy()[use].astype(np.float64), target.numpy()[use].astype(np.float64)
    for mode, truth in (("depth", t), ("disparity", 1 / t)):
        expected = np.linalg.lstsq(np.stack([p, np.ones_like(p)], 1), truth, rcond=None)[0]
        assert align_prediction(pred, target, valid, mode)[1:] == pytest.approx(expected.tolist())
    assert align_prediction(pred, target, valid, "median")[1] == pytest.approx(np.median(t) / np.median(p))
    assert align_prediction(pred, target, valid, "log")[1] == pytest.approx(np.exp(np.mean(np.log(t) - np.log(p))))
    flat = align_prediction(torch.ones(20, 30), target, valid, "depth")
    assert flat[1:] == (0, pytest.approx(target[valid].mean().item()))
    assert all(map(math.isnan, align_prediction(pred, target, torch.zeros_like(valid), "depth")[1:]))


def test_backward_predictions_are_reported(log):
    torch.manual_seed(0)
    target = torch.rand(48, 64) * 8 + 1
    got = evaluate(CheckedDepthMetric(max_depth=10, align="depth"), [sample(-target, target)])
    assert got["rmse"] == pytest.approx(0, abs=1e-5)
    assert "1 images were aligned with a negative scale" in log[-1]


def plain_boundary_f1(pred, target):
    """Depth Pro's definition, pixel by pixel, for maps without missing depth."""
    total = weights = 0.0
    for t in np.linspace(1.05, 1.25, 10):
        precision = recall = 0.0
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            edges = []
            for depth in (pred, target):
                edge = set()
                for y, x in np.ndindex(*depth.shape):
                    inside = 0 <= y + dy < depth.shape[0] and 0 <= x + dx < depth.shape[1]
                    if inside and depth[y, x] / depth[y + dy, x + dx] > t:
                        edge.add((y, x))
                edges.append(edge)
            both = len(edges[0] & edges[1])
            precision += both / max(len(edges[0]), 1) / 4
            recall += both / max(len(edges[1]), 1) / 4
        total += t * (2 * precision * recall / (precision + recall) if both or precision + recall else 0)
        weights += t
    return total / weights


def test_boundary_f1_is_depth_pros():
    rng = np.random.default_rng(0)
    target = np.ones((12, 14)) * 2
    target[3:9, 4:10] = 1.7
    target += rng.uniform(0, 0.3, target.shape)
    pred = 3 * (target + rng.normal(0, 0.05, target.shape))  # whatever the scale
    everywhere = torch.ones(12, 14, dtype=torch.bool)
    got = boundary_f1(torch.from_numpy(pred), torch.from_numpy(target), everywhere)
    assert got == pytest.approx(plain_boundary_f1(pred, target), abs=1e-9)
    assert 0.2 < got < 0.95
    assert boundary_f1(torch.from_numpy(target), torch.from_numpy(target), everywhere) == pytest.approx(1)
    assert boundary_f1(torch.ones(12, 14), torch.from_numpy(target), everywhere) == 0


def test_holes_make_no_boundaries():
    depth = torch.full((12, 14), 2.0)
    depth[:, 7:] = 3
    holes = depth.clone()
    holes[2:5, 2:5] = 0
    assert boundary_f1(depth, holes, holes > 0) == pytest.approx(boundary_f1(depth, depth, depth > 0))


def test_csv_and_tables(tmp_path, indoor, log):
    _, _, pred, target = indoor
    path = tmp_path / "new/depth.csv"
    metric = CheckedDepthMetric(max_depth=10, align="median", boundary=True, csv_path=str(path))
    samples = [sample(p, t, img_path=f"{i}.png") for i, (p, t) in enumerate(zip(pred, target, strict=True))]
    got = evaluate(metric, samples)
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["img_path"] for row in rows] == ["0.png", "1.png", "2.png", "3.png"]
    assert rows[3]["pixels"] == "0"
    assert rows[3]["rmse"] == "nan"
    for name in ("rmse", "d1", "boundary_f1"):
        assert np.mean([float(row[name]) for row in rows[:3]]) == pytest.approx(got[name], rel=1e-6)
    assert sum(int(rows[0][f"pixels_{where}"]) for where in metric.ranges) == int(rows[0]["pixels"])
    assert {"scale", "shift", "rmse_0-2m", "d1_over5m"} <= set(rows[0])
    assert [file.name for file in path.parent.iterdir()] == ["depth.csv"]
    assert "crop eigen, align median, silog of bts" in log[-1]
    assert "2-5m: abs_rel" in log[-1]


def test_mmsegs_scope_finds_ours():
    with DefaultScope.overwrite_default_scope("mmseg"):
        assert isinstance(METRICS.build(dict(type="CheckedDepthMetric", max_depth=10)), CheckedDepthMetric)


def test_keys_serve_save_best_and_a_prefix():
    target = torch.full((48, 64), 4.0)
    got = evaluate(CheckedDepthMetric(max_depth=10), [sample(target, target)])
    assert set(got) == {*PLAIN, "silog", "empty"}
    got = evaluate(CheckedDepthMetric(max_depth=10, prefix="nyu"), [sample(target, target)])
    assert "nyu/rmse" in got


def test_nothing_of_the_maps_is_kept():
    """The memory is constant but for a few numbers of each image, whatever its size."""
    metric = CheckedDepthMetric(max_depth=10, boundary=True)
    alive = []
    for i in range(5):
        pred, target = torch.rand(480, 640) + 1, torch.rand(480, 640) + 1
        alive += [weakref.ref(pred), weakref.ref(target)]
        metric.process({}, [sample(pred, target, img_path=f"{i}.png").to_dict()])
    del pred, target
    assert not any(ref() is not None for ref in alive)
    assert len(pickle.dumps(metric.results)) < 5 * 600


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no /proc on this system")
def test_resident_memory_does_not_grow_with_the_images():
    def megabytes():
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

    metric = CheckedDepthMetric(max_depth=10)
    one = sample(torch.rand(480, 640) + 1, torch.rand(480, 640) + 1).to_dict()
    metric.process({}, [one] * 5)
    before = megabytes()
    metric.process({}, [one] * 40)  # what mmseg's metric keeps of them is 73 MB
    assert megabytes() - before < 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(crop="nyu_crop"), "crop is 'nyu_crop'; allowed are 'none', 'eigen'"),
        (dict(align="affine"), "align is 'affine'"),
        (dict(silog="dinov2"), "silog is 'dinov2'; allowed are 'bts', 'mmseg'"),
        (dict(max_depth=0.0005), "min_depth is 0.001 and max_depth 0.0005"),
        (dict(min_depth=0), "0 < min_depth < max_depth"),
        (dict(limits=(5, 2)), r"limits are \(5, 2\); they must rise"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        CheckedDepthMetric(**options)


def test_samples_without_truth_or_prediction_are_named():
    target = torch.ones(8, 8)
    for key, remedy in (("gt_depth_map", "the test pipeline needs LoadDepth"), ("pred_depth_map", "a depth model")):
        one = sample(target, target)
        delattr(one, key)
        with pytest.raises(ConfigError, match=f"the sample of .*a.png has no {key}; .*{remedy}"):
            evaluate(CheckedDepthMetric(max_depth=10), [one])
