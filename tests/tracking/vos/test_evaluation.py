"""Scores of folders of masks: both protocols, every layout, every rule, every refusal, and the metric of the Runner."""

import math
import shutil

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("cv2")  # comes with OpenMMLab

from helpers.golden import read_arrays, read_json

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.evaluation import COUNTS, evaluate, read_sequences
from pe_spatial.tracking.vos.jandf import boundary_f, region_similarity
from pe_spatial.tracking.vos.masks import read_mask, write_mask

pytestmark = pytest.mark.mmseg

# J and F of hkchengrex/vos-benchmark@acb4733 on golden/jandf
VOS_BENCHMARK = {
    "drift-touch_1": (0.841463817, 0.684119185),
    "drift-touch_2": (0.766765942, 0.622616344),
    "vanish-empty_1": (0.899504874, 0.967560498),
    "vanish-empty_2": (0.843008185, 0.871715005),
    "vanish-empty_3": (0.429311751, 0.437500000),
    "thin-border_1": (0.209588102, 0.873657495),
    "gap-late-void_1": (0.904896063, 0.916996066),
    "gap-late-void_3": (0.896984254, 0.939331374),
    "gap-late-void_4": (0.0, 0.0),
    "gap-late-void_255": (0.7, 0.7),
    "short-empty_1": (0.0, 0.0),
}


@pytest.fixture(scope="module")
def jandf(golden):
    return golden / "jandf"


@pytest.fixture(scope="module")
def expected(jandf):
    return read_json(jandf / "expected.json")


@pytest.fixture(scope="module")
def scored(jandf):
    return evaluate(jandf / "davis", jandf / "results")


def squares(*ids, at=0, size=(20, 30)):
    """A mask with one square of 4 x 4 pixels for each id, `at` pixels to the right."""
    mask = np.zeros(size, np.uint8)
    for k, i in enumerate(ids):
        mask[2:6, 1 + 6 * k + at : 5 + 6 * k + at] = i
    return mask


def write(folder, masks):
    for t, mask in enumerate(masks):
        write_mask(folder / f"{t:05d}.png", mask)


def same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert abs(a[key] - b[key]) < 1e-9, key


# --- the official numbers


def test_global_results_and_objects(scored, expected):
    assert list(scored.global_results) == list(expected["global_results"])
    assert list(scored.per_object) == list(expected["per_object"])
    same(scored.global_results, expected["global_results"])
    for name, values in expected["per_object"].items():
        assert list(scored.per_object[name]) == list(values)
        same(scored.per_object[name], values)


def test_frames_and_sequences(scored, jandf):
    per_frame = read_arrays(jandf / "per_frame.npz")
    for key in (key for key in per_frame if not key.endswith("excluded")):
        sequence, measure = key.split("/")
        for i, row in enumerate(per_frame[key], 1):
            np.testing.assert_allclose(scored.per_frame[f"{sequence}_{i}"][measure], row[1:-1], rtol=0, atol=1e-9)
    assert scored.per_frame["short-empty_1"]["frames"] == ["00001", "00002"]
    touch = scored.per_sequence["drift-touch"]
    j = (scored.per_object["drift-touch_1"]["J-Mean"] + scored.per_object["drift-touch_2"]["J-Mean"]) / 2
    assert abs(touch["J-Mean"] - j) < 1e-12
    assert abs(touch["J&F-Mean"] - (touch["J-Mean"] + touch["F-Mean"]) / 2) < 1e-12


def test_official_tables(scored, jandf):
    lines = (jandf / "global_results-val.csv").read_text().split()
    assert lines == [",".join(scored.global_results), ",".join(f"{v:.3f}" for v in scored.global_results.values())]
    lines = (jandf / "per-sequence_results-val.csv").read_text().split()
    rows = [f"{name},{v['J-Mean']:.3f},{v['F-Mean']:.3f}" for name, v in scored.per_object.items()]
    assert lines == ["Sequence,J-Mean,F-Mean", *rows]


def test_rules_are_counted(scored):
    assert scored.counts == {
        "binary_sequences": 0,
        "skipped_ids": 1,
        "late_objects": 1,
        "void_frames": 3,
        "unpredicted_objects": 1,
        "invented_objects": 0,
        "gray_masks": 0,
    }
    assert scored.counts.keys() == COUNTS.keys()


def test_an_id_above_the_objects_is_an_error_where_it_is_read(jandf, expected):
    with pytest.raises(DatasetError, match=r"results_extra_id/short-empty/0000\d\.png holds id \d") as caught:
        evaluate(jandf / "davis", jandf / "results_extra_id", sequences=["short-empty"])
    assert "\n" not in str(caught.value)
    unread = evaluate(jandf / "davis", jandf / "results_extra_id_unread", sequences=["short-empty"])
    result = expected["extra_id_runs"]["results_extra_id_unread"]["result"]
    assert unread.global_results["J-Mean"] == result["J"]["M"][0]
    assert unread.global_results["F-Decay"] == result["F"]["D"][0]


def test_vos_benchmark(jandf):
    result = evaluate(jandf / "davis", jandf / "results", protocol="vos-benchmark")
    assert list(result.per_object) == list(VOS_BENCHMARK)
    for name, (j, f) in VOS_BENCHMARK.items():
        assert abs(result.per_object[name]["J-Mean"] - j) < 1e-9, name
        assert abs(result.per_object[name]["F-Mean"] - f) < 1e-9, name
    assert abs(result.global_results["J-Mean"] - np.mean([j for j, _ in VOS_BENCHMARK.values()])) < 1e-9
    assert len(result.per_frame["gap-late-void_4"]["frames"]) < 13
    assert result.counts["void_frames"] == 0
    assert result.counts["late_objects"] == 2
    assert result.counts["invented_objects"] == 1


def test_workers_and_order_change_nothing(jandf, scored):
    names = list(scored.per_sequence)
    spread = evaluate(jandf / "davis", jandf / "results", sequences=names[::-1], workers=2)
    assert list(spread.per_sequence) == names[::-1]
    assert spread.per_object == scored.per_object
    assert spread.per_frame == scored.per_frame
    assert spread.counts == scored.counts
    same(spread.global_results, scored.global_results)


# --- layouts


def video(t):
    return squares(1, 2, at=t)


def late(t):
    return squares(1, 2, at=t // 2)


@pytest.mark.parametrize(
    "place", ["Annotations/480p", "Annotations", ""], ids=["davis", "youtube-vos and mose", "plain folder"]
)
def test_layouts_of_index_masks(tmp_path, place):
    for name in ("a", "b"):
        write(tmp_path / "gt" / place / name, map(video, range(6)))
        write(tmp_path / "pred" / name, map(late, range(6)))
    (tmp_path / "gt" / place / "._a").mkdir()
    (tmp_path / "gt" / place / "a" / "._00000.png").touch()
    (tmp_path / "pred" / "a" / "00099.png").touch()  # a frame without annotation is not looked at
    if "480p" in place:
        with pytest.raises(DatasetError, match=r"without ImageSets/2017/val\.txt"):
            evaluate(tmp_path / "gt", tmp_path / "pred")
        (tmp_path / "gt/ImageSets/2017").mkdir(parents=True)
        (tmp_path / "gt/ImageSets/2017/val.txt").write_text("b\n\na\n")
    result = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert sorted(result.per_object) == ["a_1", "a_2", "b_1", "b_2"]
    assert list(result.per_sequence) == (["b", "a"] if "480p" in place else ["a", "b"])
    assert result.per_frame["a_1"]["frames"] == ["00001", "00002", "00003", "00004"]
    assert result.per_frame["a_1"]["J"] == [4 * (4 - d) / (16 + 4 * d) for d in (1, 1, 2, 2)]


def test_lists_of_sequences(tmp_path):
    for name in ("a", "b", "c"):
        write(tmp_path / "gt/Annotations/480p" / name, map(video, range(4)))
        write(tmp_path / "pred" / name, map(video, range(4)))
    (tmp_path / "gt/ImageSets/480p").mkdir(parents=True)
    lines = [f"/JPEGImages/480p/{n}/{t:05d}.jpg /Annotations/480p/{n}/{t:05d}.png" for n in "cb" for t in range(4)]
    (tmp_path / "gt/ImageSets/480p/val.txt").write_text("\n".join(lines))  # the form of DAVIS 2016
    assert list(evaluate(tmp_path / "gt", tmp_path / "pred").per_sequence) == ["c", "b"]
    assert list(evaluate(tmp_path / "gt", tmp_path / "pred", sequences=["a"]).per_sequence) == ["a"]
    with pytest.raises(DatasetError, match=r"2 of 3 sequences are not in .*480p, the first is x"):
        evaluate(tmp_path / "gt", tmp_path / "pred", sequences=["a", "x", "y"])
    (tmp_path / "empty.txt").write_text("\n")
    for bad in ("empty.txt", "absent.txt"):
        with pytest.raises(DatasetError, match=bad):
            read_sequences(tmp_path / bad)


@pytest.mark.parametrize("protocol", ["davis", "vos-benchmark"])
def test_sa_v_scores_each_object_by_itself(tmp_path, protocol):
    """Overlapping objects, each on annotated frames of its own, and a prediction on every frame."""
    rng = np.random.default_rng(0)
    times = {"000": range(0, 24, 4), "001": range(8, 24, 4)}
    expected = {}
    for k, (name, frames) in enumerate(times.items()):
        gt, pred = rng.random((2, 24, 16, 20)) < (0.5, 0.3)[k]
        for t in range(24):
            write_mask(tmp_path / f"pred/v/{name}/{t:05d}.png", pred[t].astype(np.uint8))
        for t in frames:
            write_mask(tmp_path / f"gt/Annotations_6fps/v/{name}/{t:05d}.png", gt[t].astype(np.uint8) * 255)
        kept = list(frames)[1:-1]
        expected[f"v_{name}"] = (region_similarity(gt[kept], pred[kept]), boundary_f(gt[kept], pred[kept]))
    result = evaluate(tmp_path / "gt", tmp_path / "pred", protocol=protocol)
    assert list(result.per_object) == list(expected)
    for name, (j, f) in expected.items():
        np.testing.assert_allclose(result.per_frame[name]["J"], j)
        np.testing.assert_allclose(result.per_frame[name]["F"], f)
    assert list(result.per_sequence) == ["v"]
    assert not any(result.counts.values())
    shutil.rmtree(tmp_path / "pred/v/001")
    with pytest.raises(DatasetError, match=r"2 of 6 predicted masks are missing, the first is .*pred/v/001/00012\.png"):
        evaluate(tmp_path / "gt", tmp_path / "pred", protocol=protocol)


def test_davis_2016_is_binary(tmp_path):
    """Its masks hold 0 and 255; the predictions of several objects are one."""
    write(tmp_path / "gt/a", [np.where(video(t) > 0, 255, 0).astype(np.uint8) for t in range(6)])
    write(tmp_path / "one/a", [(late(t) > 0).astype(np.uint8) for t in range(6)])
    write(tmp_path / "two/a", map(late, range(6)))
    one, two = (evaluate(tmp_path / "gt", tmp_path / name) for name in ("one", "two"))
    assert list(one.per_object) == ["a_1"]
    assert one.per_frame == two.per_frame
    assert one.per_frame["a_1"]["J"] == [4 * (4 - d) / (16 + 4 * d) for d in (1, 1, 2, 2)]
    assert one.counts["binary_sequences"] == 1
    assert one.counts["void_frames"] == 0


# --- rules


def test_absent_and_missing_objects(tmp_path):
    write(tmp_path / "gt/a", [squares(1, 2), squares(1, 2), squares(1), squares(1), squares(1, 2)])
    write(tmp_path / "pred/a", [squares(), squares(1), squares(1), squares(1, 2), squares()])
    result = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert result.per_frame["a_1"]["J"] == [1, 1, 1]
    assert result.per_frame["a_2"]["J"] == [0, 1, 0]
    assert result.per_frame["a_2"]["F"] == [0, 1, 0]


def test_masks_without_a_palette_are_counted(tmp_path):
    write(tmp_path / "gt/a", map(video, range(4)))
    write(tmp_path / "pred/a", map(video, range(4)))
    Image.fromarray(video(2)).save(tmp_path / "pred/a/00002.png")
    result = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert result.counts["gray_masks"] == 1
    assert result.global_results["J&F-Mean"] == 1


def test_long_videos_keep_their_order_and_their_decay(tmp_path):
    """More frames than one job holds, and more than DAVIS's evaluator can number."""
    for t in range(302):
        write_mask(tmp_path / f"gt/a/{t:05d}.png", squares(1, size=(8, 8)))
        write_mask(tmp_path / f"pred/a/{t:05d}.png", squares(1, at=int(t > 200), size=(8, 8)))
    result = evaluate(tmp_path / "gt", tmp_path / "pred")
    assert result.per_frame["a_1"]["J"] == [1.0] * 200 + [12 / 20] * 100
    assert abs(result.per_object["a_1"]["J-Decay"] - 0.4) < 1e-12
    official = evaluate(tmp_path / "gt", tmp_path / "pred", official_decay=True)
    assert math.isnan(official.per_object["a_1"]["J-Decay"])


def test_only_late_objects_belong_to_vos_benchmark(tmp_path):
    write(tmp_path / "gt/a", [squares(), squares(), squares(5), squares(5), squares(5)])
    write(tmp_path / "pred/a", [squares(), squares(), squares(5), squares(), squares()])
    with pytest.raises(DatasetError, match=r"a/00000\.png .* shows no object; score with --protocol vos-benchmark"):
        evaluate(tmp_path / "gt", tmp_path / "pred")
    result = evaluate(tmp_path / "gt", tmp_path / "pred", protocol="vos-benchmark")
    assert result.per_frame["a_5"] == {"frames": ["00002", "00003"], "J": [1, 0], "F": [1, 0]}


# --- refusals


@pytest.fixture
def folders(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "gt" / name, map(video, range(6)))
        write(tmp_path / "pred" / name, map(video, range(6)))
    return tmp_path / "gt", tmp_path / "pred"


def refused(folders, words, **options):
    with pytest.raises(DatasetError, match=words) as caught:
        evaluate(*folders, **options)
    assert "\n" not in str(caught.value)


def test_missing_frames_are_counted_and_the_first_is_named(folders):
    for t in (0, 3, 4, 5):  # of which the first and the last are not scored
        (folders[1] / f"b/{t:05d}.png").unlink()
    refused(folders, r"2 of 8 predicted masks are missing, the first is .*pred/b/00003\.png")
    shutil.rmtree(folders[1] / "a")
    refused(folders, r"6 of 8 .* the first is .*pred/a/00001\.png")
    shutil.rmtree(folders[1])
    refused(folders, "no folder of predictions at .*pred")


def test_a_prediction_of_another_size_that_a_worker_finds(folders):
    write_mask(folders[1] / "b/00002.png", squares(1, size=(20, 31)))
    refused(folders, r"^\S*pred/b/00002\.png is 20x31 .* but its annotation is 20x30", workers=2)


def test_a_image_in_colors(folders):
    Image.open(folders[1] / "a/00003.png").convert("RGB").save(folders[1] / "a/00003.png")
    refused(folders, r"pred/a/00003\.png is a 8-bit RGB image")


def test_folders_without_masks(folders):
    gt, pred = folders
    (gt / "c").mkdir()
    refused(folders, "gt/c holds no mask")
    refused((pred / "a", pred), "a holds no sequences")
    refused((gt / "absent", pred), "absent holds no sequences")


def test_too_few_annotated_frames(folders):
    for t in range(2, 6):
        (folders[0] / f"a/{t:05d}.png").unlink()
    refused(folders, "gt/a has 2 annotated frames")


def test_nothing_to_score(folders):
    for t in range(1, 5):
        write_mask(folders[0] / f"a/{t:05d}.png", squares())
    refused(folders, "nothing to score", sequences=["a"], protocol="vos-benchmark")


def test_unknown_protocol(folders):
    refused(folders, "protocol is 'lvos'; choose davis or vos-benchmark", protocol="lvos")


# --- the metric of the Runner


def sample(folder, name, *, tensors=False):
    import torch

    paths = sorted((folder / name).glob("*.png"))
    masks = np.stack([read_mask(path) for path in paths])
    frames = [path.stem for path in paths]
    return {"video": name, "frames": frames, "pred_masks": torch.from_numpy(masks) if tensors else list(masks)}


@pytest.mark.parametrize("tensors", [False, True])
def test_metric_gives_the_same_and_writes_what_is_scored_the_same(jandf, scored, tmp_path, tensors):
    pytest.importorskip("mmengine")
    from mmengine.evaluator import Evaluator
    from mmengine.structures import BaseDataElement

    import pe_spatial.tracking.vos.metric  # noqa: F401  (registers)

    evaluator = Evaluator(dict(type="JandFMetric", ann_dir=str(jandf / "davis"), save_dir=str(tmp_path / "out")))
    for name in scored.per_sequence:
        data = sample(jandf / "results", name, tensors=tensors)
        evaluator.process([BaseDataElement(**data) if tensors else data])
    result = evaluator.evaluate(len(scored.per_sequence))
    assert result == {f"vos/{key}": value for key, value in scored.global_results.items()}
    assert evaluate(jandf / "davis", tmp_path / "out") == scored


def test_metric_refuses(jandf, tmp_path):
    pytest.importorskip("mmengine")
    from pe_spatial.tracking.vos.metric import JandFMetric

    metric = JandFMetric(ann_dir=str(jandf / "davis"))
    data = sample(jandf / "results", "short-empty")
    with pytest.raises(DatasetError, match=r"1 of 2 annotated frames of short-empty .* the first is 00002"):
        metric.process(None, [{**data, "frames": ["00000", "00001", "x", "00003"]}])
    with pytest.raises(DatasetError, match=r"short-empty/00001 is 7x9"):
        metric.process(None, [{**data, "pred_masks": np.zeros((4, 7, 9), np.uint8)}])
    with pytest.raises(TypeError, match="short-empty/00001 is int64"):
        metric.process(None, [{**data, "pred_masks": np.zeros((4, 120, 160), np.int64)}])
    with pytest.raises(ConfigError, match="protocol is 'x'"):
        JandFMetric(ann_dir="a", protocol="x")
    write(tmp_path / "v/000", [squares(1)] * 4)
    by_object = JandFMetric(ann_dir=str(tmp_path))
    with pytest.raises(DatasetError, match="folder of masks for each object of v; predict the mask of each object"):
        by_object.process(None, [{**data, "video": "v"}])
    masks = {"video": "v", "frames": data["frames"], "pred_masks": [{0: squares(1) > 0}] * 4}
    with pytest.raises(DatasetError, match="has index masks of short-empty; predict index masks"):
        metric.process(None, [{**masks, "video": "short-empty"}])
    with pytest.raises(DatasetError, match=r"object 3 is predicted in v, but its objects are \[0\]"):
        by_object.process(None, [{**masks, "pred_masks": [{}, {3: squares() > 0}, {}, {}]}])
    with pytest.raises(DatasetError, match="1 of 2 annotated frames of v/000 are not predicted, the first is 00002"):
        by_object.process(None, [{**masks, "frames": ["00000", "00001", "x", "00003"]}])
    with pytest.raises(TypeError, match="mask of object 0 in v/00000 is uint8; expected bool"):
        by_object.process(None, [{**masks, "pred_masks": [{0: squares(1)}] * 4}])


@pytest.mark.parametrize("protocol", ["davis", "vos-benchmark"])
def test_metric_scores_and_writes_the_annotated_frames_of_each_object(tmp_path, protocol):
    """SA-V: predictions at 24 fps, annotations at 6 fps, an object that begins late and one that is never found."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("mmengine")
    from pe_spatial.tracking.vos.metric import JandFMetric

    rng = np.random.default_rng(0)
    metric = JandFMetric(ann_dir=str(tmp_path / "gt"), save_dir=str(tmp_path / "out"), protocol=protocol)
    for name, objects in {"v": 3, "w": 1}.items():
        for t in range(0, 24, 4):
            for i in range(objects):
                mask = (rng.random((16, 20)) < 0.5) & (i != 1 or t >= 8)
                write_mask(tmp_path / f"gt/Annotations_6fps/{name}/{i:03d}/{t:05d}.png", mask.astype(np.uint8) * 255)
        predicted = [{i: rng.random((16, 20)) < 0.4 for i in range(2 if t >= 8 else 1)} for t in range(24)]
        predicted = [{i: mask for i, mask in frame.items() if i < objects} for frame in predicted]
        predicted[8] = {i: torch.from_numpy(mask) for i, mask in predicted[8].items()}
        metric.process(None, [{"video": name, "frames": [f"{t:05d}" for t in range(24)], "pred_masks": predicted}])
    scores = metric.evaluate(2)
    result = evaluate(tmp_path / "gt", tmp_path / "out", protocol=protocol)
    assert scores == {f"vos/{key}": value for key, value in result.global_results.items()}
    assert list(result.per_object) == ["v_000", "v_001", "v_002", "w_000"]
    assert 0.1 < result.per_object["v_000"]["J-Mean"] < 0.5
    assert result.per_object["v_002"]["J-Mean"] == 0
    assert result.counts["unpredicted_objects"] == 1
    for path in (tmp_path / "gt/Annotations_6fps").rglob("*.png"):  # nothing lacks and nothing is too much
        assert (tmp_path / "out" / path.relative_to(tmp_path / "gt/Annotations_6fps")).is_file()
    assert len(list((tmp_path / "out").rglob("*.png"))) == 24


@pytest.mark.parametrize("by_object", [False, True])
def test_metric_of_several_processes_loses_and_repeats_no_video(tmp_path, monkeypatch, by_object):
    """Four videos in three processes: the sampler fills up with two that come twice, and mmengine cuts them off."""
    pytest.importorskip("mmengine")
    from mmengine.dataset import DefaultSampler
    from mmengine.dist import dist

    from pe_spatial.tracking.vos.metric import JandFMetric

    names = ["a", "b", "c", "d"]
    for name in names:
        for t in range(4):
            for k in (0, 1):
                folder = f"{name}/{k:03d}" if by_object else name
                mask = squares(*[1] * (k + 1), at=t) if by_object else video(t)
                write_mask(tmp_path / f"gt/{folder}/{t:05d}.png", mask)

    def sample(name):
        masks = []
        for t in range(4):
            at = t + 2 * (name == "d")  # the only one that is not perfect
            both = {k: squares(*[1] * (k + 1), at=at) > 0 for k in (0, 1)}
            masks.append(both if by_object else squares(1, 2, at=at))
        return {"video": name, "frames": [f"{t:05d}" for t in range(4)], "pred_masks": masks}

    def indices(rank):
        with monkeypatch.context() as patch:
            patch.setattr("mmengine.dataset.sampler.get_dist_info", lambda: (rank, 3))
            return list(DefaultSampler(names, shuffle=False))

    assert [indices(rank) for rank in range(3)] == [[0, 3], [1, 0], [2, 1]]
    monkeypatch.setattr(dist, "barrier", lambda: None)
    for rank in (2, 1, 0):  # the one that collects comes last
        monkeypatch.setattr(dist, "get_dist_info", lambda rank=rank: (rank, 3))
        metric = JandFMetric(ann_dir=str(tmp_path / "gt"), collect_dir=str(tmp_path / "parts"))
        metric.process(None, [sample(names[index]) for index in indices(rank)])
        collected = dist.collect_results(metric.results, 4, tmpdir=metric.collect_dir)
    scores = metric.compute_metrics(collected)
    alone = JandFMetric(ann_dir=str(tmp_path / "gt"))
    alone.process(None, map(sample, names))
    assert scores == alone.compute_metrics(alone.results)
    assert abs(scores["J-Mean"] - (3 + 2 / 6) / 4) < 1e-12


def test_masks_are_written_without_annotations(tmp_path):
    """For a server; both kinds of masks, under Runner's evaluator."""
    pytest.importorskip("mmengine")
    import torch
    from mmengine.evaluator import Evaluator

    import pe_spatial.tracking.vos.metric  # noqa: F401  (registers)

    masks = [np.eye(3, dtype=np.uint8), torch.ones(3, 3, dtype=torch.uint8)]
    objects = [{7: np.eye(3, dtype=bool)}, {}]
    evaluator = Evaluator(dict(type="MaskWriter", save_dir=str(tmp_path)))
    frames = ["00000", "00001"]
    evaluator.process([dict(video="a", frames=frames, pred_masks=masks)], None)
    evaluator.process([dict(video="b", frames=frames, pred_masks=objects)], None)
    assert evaluator.evaluate(2) == {"vos/videos": 2}
    for frame, mask in zip(frames, masks, strict=True):
        assert (read_mask(tmp_path / "a" / f"{frame}.png") == np.asarray(mask)).all()
    assert (read_mask(tmp_path / "b/007/00000.png") == np.eye(3)).all()
    assert sorted(path.name for path in tmp_path.rglob("*.png")) == ["00000.png", "00000.png", "00001.png"]
