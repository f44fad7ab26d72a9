"""Soft-NMS, post-processing and test-time augmentation of DETA equal the reference, at any number of views at once."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmdet")
from helpers.golden import read_arrays, read_json
from helpers.reference_deta import ReferenceDETA
from mmdet.models.data_preprocessors import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.structures import InstanceData
from torchvision.ops import box_iou

from pe_spatial.detection.deta.postprocess import postprocess
from pe_spatial.detection.deta.transforms import ShortSideResize
from pe_spatial.detection.deta.tta import DETATTA, RECIPES, detect_in_view, make_views, merge_views
from pe_spatial.detection.soft_nms import METHODS, PRUNE, soft_nms
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmdet
MEAN, STD = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
UNCUT = dict(max_per_img=None)
POSTPROCESS = {
    "nms": {},
    "nms_0.5_top300": dict(iou_threshold=0.5, max_per_img=300),
    "topk_without_nms": dict(method=None),
    **{f"soft_quad_{scale}": dict(method="quad", quad_scale=scale, **UNCUT) for scale in (0.4, 0.5, 1.0)},
    **{f"soft_{method}": dict(method=method, **UNCUT) for method in ("linear", "gaussian", "hard")},
}


@pytest.fixture(scope="module")
def folder(golden):
    return golden / "deta"


def load(path):
    return {key: torch.from_numpy(value) for key, value in read_arrays(path).items()}


def check(ours, arrays, prefix):
    assert_close(ours.bboxes, arrays[f"{prefix}boxes"], rtol=1e-5, atol=1e-4)
    assert_close(ours.scores, arrays[f"{prefix}scores"], rtol=1e-5, atol=1e-7)
    assert_close(ours.labels, arrays[f"{prefix}labels"].long())


# Soft-NMS


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((f"quad_{scale}", dict(method="quad", iou_threshold=0.5, quad_scale=scale)) for scale in (0.4, 0.5, 1.0)),
        ("linear_1.0", dict(method="linear", iou_threshold=0.5)),
        ("gaussian_1.0", dict(method="gaussian")),
        ("hard_1.0", dict(method="hard", iou_threshold=0.5)),
    ],
)
def test_soft_nms(folder, name, options):
    arrays = load(folder / "ops.npz")
    index, scores = soft_nms(arrays["soft_boxes"], arrays["soft_scores"], arrays["soft_labels"], **options)
    assert_close(index, arrays[f"soft_{name}_index"].long())
    assert_close(scores, arrays[f"soft_{name}_scores"])


def one_at_a_time(boxes, scores, decay):
    """Soft-NMS as it is defined: take the best, decay all others by their IoU with it, drop the low ones, repeat."""
    ious, scores, left, picks = box_iou(boxes, boxes), scores.clone(), list(range(len(scores))), []
    while left:
        best = max(left, key=lambda i: scores[i])
        picks.append((best, scores[best].item()))
        left.remove(best)
        scores[left] *= decay(ious[best, left])
        left = [i for i in left if scores[i] > PRUNE]
    return picks


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("method", "decay"),
    [
        ("quad", lambda iou: torch.where(iou > 0.7, (1 - iou) ** 0.5, 1.0)),
        ("linear", lambda iou: torch.where(iou > 0.7, 1 - iou, 1.0)),
        ("gaussian", lambda iou: torch.exp(-(iou**2) / 0.5)),
        ("hard", lambda iou: (iou < 0.7).float()),
    ],
)
def test_rounds_equal_one_box_at_a_time(seed, method, decay):
    """With many rivals per object, exact duplicates, equal scores, scores below the limit and empty boxes."""
    generator = torch.Generator().manual_seed(seed)
    corners = (torch.rand(8, 2, generator=generator) * 300).repeat_interleave(40, dim=0)
    corners = corners + torch.randn(320, 2, generator=generator) * 4
    boxes = torch.cat([corners, corners + 60 + torch.randn(320, 2, generator=generator) * 4], dim=1)
    scores = torch.rand(320, generator=generator) ** 3
    boxes[1::40], scores[2::20], scores[3::40] = boxes[0::40], 0.25, PRUNE
    boxes[7, 2:] = boxes[7, :2]
    index, ours = soft_nms(boxes, scores, torch.zeros(320, dtype=torch.long), method=method)
    picks = one_at_a_time(boxes, scores, decay)
    assert index.tolist() == [i for i, _ in picks]
    assert_close(ours, torch.tensor([score for _, score in picks]))


def test_of_equal_boxes_the_first_wins():
    boxes = torch.tensor([[0.0, 0, 9, 9], [30, 0, 39, 9], [0, 0, 9, 9], [30, 0, 39, 9.5]])
    index, _ = soft_nms(boxes, torch.full((4,), 0.5), torch.zeros(4, dtype=torch.long), method="linear")
    assert index.tolist() == [0, 1, 3]


def test_only_hard_suppression_acts_at_the_threshold_itself():
    boxes, scores = torch.tensor([[0.0, 0, 8, 8], [0, 0, 8, 4]]), torch.tensor([0.9, 0.8])
    labels = torch.zeros(2, dtype=torch.long)
    assert soft_nms(boxes, scores, labels, method="hard", iou_threshold=0.5)[0].tolist() == [0]
    for method in ("linear", "quad"):
        assert_close(soft_nms(boxes, scores, labels, method=method, iou_threshold=0.5)[1], scores)


def test_the_best_box_stays_however_low_it_scores():
    boxes = torch.tensor([[0.0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]])
    index, scores = soft_nms(boxes, torch.tensor([PRUNE, PRUNE / 2, PRUNE / 3]), torch.zeros(3, dtype=torch.long))
    assert index.tolist() == [0]
    assert_close(scores, torch.tensor([PRUNE]))


def test_scores_that_are_no_numbers_are_dropped():
    boxes = torch.tensor([0.0, 0, 9, 9]).repeat(3, 1)
    index, scores = soft_nms(boxes, torch.tensor([torch.nan, 0.4, 0.5]), torch.zeros(3).long(), method="gaussian")
    assert index.tolist() == [2, 1]
    assert_close(scores, torch.tensor([0.5, 0.4 * math.exp(-2)]))


def test_no_boxes():
    index, scores = soft_nms(torch.empty(0, 4), torch.empty(0), torch.empty(0, dtype=torch.long))
    assert index.shape == scores.shape == (0,)


def test_arguments_are_left_as_they_are():
    boxes, scores = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 8]]), torch.tensor([0.9, 0.8])
    before = boxes.clone(), scores.clone()
    soft_nms(boxes, scores, torch.ones(2, dtype=torch.long))
    assert_close((boxes, scores), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(method="soft"), "'soft'; allowed are .*'gaussian'"),
        (dict(method="gaussian", iou_threshold=0.5), "no iou_threshold.*allowed: sigma"),
        (dict(quad_scale=0.5), "'nms' has no quad_scale.*allowed: iou_threshold"),
        (dict(method=None, iou_threshold=0.5), "None has no iou_threshold.*allowed: none"),
    ],
)
def test_options_of_another_method_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        postprocess(torch.zeros(1, 2), torch.rand(1, 4), size=(9, 9), **options)


# Post-processing


@pytest.mark.parametrize("name", POSTPROCESS)
@pytest.mark.parametrize("source", ["model", "clustered"])
def test_postprocess(folder, source, name):
    arrays = load(folder / "postprocess.npz")
    images = sorted(key[: -len("boxes")] for key in arrays if key.startswith(f"{source}/{name}/") and "boxes" in key)
    if source == "model":
        inputs = load(folder / "deta.npz")
        logits, boxes, sizes = inputs["pred_logits"], inputs["pred_boxes"], arrays["model/orig_sizes"]
    else:
        logits, boxes, sizes = (arrays[f"clustered/{part}"] for part in ("pred_logits", "pred_boxes", "orig_size"))
    for b, prefix in enumerate(images):
        check(postprocess(logits[b], boxes[b], size=tuple(sizes[b].tolist()), **POSTPROCESS[name]), arrays, prefix)


def test_every_golden_case_is_compared(folder):
    cases = {key.split("/")[1] for key in read_arrays(folder / "postprocess.npz") if key.endswith("0_boxes")}
    assert cases == set(POSTPROCESS)


def test_fewer_classes_give_the_released_detections_with_the_released_ids(folder):
    """Dropped classes leave the others' numbers lower, and thereby their shifts in the suppression."""
    arrays = load(folder / "postprocess.npz")
    kept = list(range(1, 91, 2))
    logits = torch.full_like(arrays["clustered/pred_logits"][0], -20)
    logits[:, kept] = arrays["clustered/pred_logits"][0, :, kept]
    boxes, options = arrays["clustered/pred_boxes"][0], dict(size=(427, 640), method="quad", **UNCUT)
    full = postprocess(logits, boxes, **options)
    few = postprocess(logits[:, kept], boxes, class_ids=kept, **options)
    assert_close(few.scores, full.scores, rtol=0, atol=0)
    assert_close(torch.tensor(kept)[few.labels], full.labels)
    assert not torch.equal(postprocess(logits[:, kept], boxes, **options).scores, full.scores)


def test_fewer_candidates_than_allowed():
    logits, boxes = torch.tensor([[3.0, -9], [-9, 2]]), torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.2, 0.2]])
    for method in ("nms", None, *METHODS):
        found = postprocess(logits, boxes, size=(100, 200), method=method, candidates=2)
        assert_close(found.bboxes, torch.tensor([[30.0, 15, 50, 25], [120, 60, 160, 80]]))
        assert found.labels.tolist() == [0, 1]


# Views


def views_of(arrays, facts, case, view_options):
    return [
        detect_in_view(
            arrays[f"in{i}_pred_logits"], arrays[f"in{i}_pred_boxes"], size=facts["orig_size"], mirrored=i % 2 == 1,
            size_range=facts["scale_ranges"][i // 2], **view_options,
        )
        for i in range(len(facts["cases"][case]["per_scale"]))
    ]  # fmt: skip


@pytest.mark.parametrize(
    "case", ["soft_quad_0.5", "soft_quad_0.4", "soft_quad_1.0", "soft_linear", "per_scale_hard_nms_then_soft"]
)
@pytest.mark.parametrize("canvas", [1824, 1728])
def test_merge(folder, canvas, case):
    arrays = load(folder / f"tta_synthetic_{canvas}.npz")
    facts = read_json(folder / f"tta_synthetic_{canvas}.json")
    assert [list(pair) for pair in RECIPES[canvas]["size_ranges"]] == facts["scale_ranges"]
    scale = facts["cases"][case]["options"].get("quad_scale")
    options = dict(method="linear") if case == "soft_linear" else dict(method="quad", quad_scale=scale)
    views = views_of(arrays, facts, case, {} if "hard" in case else options | UNCUT)
    assert [len(view) for view in views] == facts["cases"][case]["kept_by_area"]
    for i, view in enumerate(views if f"{case}/scale0_boxes" in arrays else []):
        keep = arrays[f"{case}/scale{i}_area_keep"]
        prefix = f"{case}/scale{i}_"
        check(view, {prefix + part: arrays[prefix + part][keep] for part in ("boxes", "scores", "labels")}, prefix)
    check(merge_views(views, **options), arrays, f"{case}/")


def test_best_of_each_class():
    labels = torch.tensor([3, 1, 3, 3, 1, 2])
    boxes = torch.arange(6)[:, None] * 20.0 + torch.tensor([0.0, 0, 9, 9])
    view = InstanceData(bboxes=boxes, scores=torch.linspace(0.9, 0.4, 6), labels=labels)
    merged = merge_views([view], max_per_class=2)
    assert_close(merged.bboxes[:, 0], torch.tensor([0.0, 20, 40, 80, 100]))
    assert merged.labels.tolist() == [3, 1, 3, 1, 2]


def test_nothing_found_in_any_view():
    empty = InstanceData(bboxes=torch.empty(0, 4), scores=torch.empty(0), labels=torch.empty(0, dtype=torch.long))
    assert len(merge_views([empty, empty], max_per_class=100)) == 0


@pytest.fixture(scope="module")
def photo(folder):
    """The photo of the reference at the size of the first view, as the loader gives it: BGR, 0 to 255."""
    facts = read_json(folder / "tta_end_to_end.json")
    image = Image.open(folder / facts["file"]).convert("RGB")
    height, width = facts["antialias"]["image_sizes"][0]
    pixels = np.asarray(image.resize((width, height), Image.BILINEAR))
    sample = DetDataSample(metainfo=dict(img_id=7, img_shape=(height, width), ori_shape=image.size[::-1]))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).flip(0), sample


def normalised(photo):
    return (photo[0].flip(0) - MEAN[:, None, None]) / STD[:, None, None]


@pytest.mark.parametrize("case", ["antialias", "no_antialias"])
def test_images_of_the_views(folder, photo, case):
    arrays, facts = load(folder / "tta_end_to_end.npz"), read_json(folder / "tta_end_to_end.json")
    views = make_views(normalised(photo), long_sides=facts["tta_image_size"], antialias=case == "antialias")
    assert [list(view.shape[1:]) for view in views] == facts[case]["image_sizes"]
    assert_close(views[6], arrays[f"{case}/image_scale6"], rtol=1e-5, atol=1e-5)
    for name, statistic in (("mean", torch.mean), ("std", torch.std)):
        expected = torch.tensor(facts[case][f"image_{name}"])
        assert_close(torch.stack([statistic(view) for view in views]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("canvas", [256, 1824])
def test_sizes_after_the_resize(folder, canvas):
    arrays = load(folder / "ops.npz")
    resize = ShortSideResize(short_sides=[canvas - 32], max_long_side=canvas - 32)
    sizes = zip(arrays["resize_hw"].tolist(), arrays[f"resize_out_{canvas}"].tolist(), strict=True)
    for (height, width), expected in sizes:
        results = resize(dict(img=np.zeros((height, width, 3), np.uint8)))
        assert list(results["img"].shape[:2]) == list(results["img_shape"]) == expected
        assert_close(results["scale_factor"], (expected[1] / width, expected[0] / height))


def test_the_resize_moves_boxes_and_draws_sides():
    resize = ShortSideResize(short_sides=[20, 40], max_long_side=500)
    sides = set()
    for _ in range(20):
        boxes = HorizontalBoxes(torch.tensor([[10.0, 20, 50, 100]]))
        results = resize(dict(img=np.zeros((100, 150, 3), np.uint8), gt_bboxes=boxes))
        side = results["img_shape"][0]
        sides.add(side)
        assert_close(results["gt_bboxes"].tensor, torch.tensor([[10.0, 20, 50, 100]]) * side / 100)
    assert sides == {20, 40}


def test_a_image_that_would_vanish_is_refused():
    resize = ShortSideResize(short_sides=[224], max_long_side=224)
    with pytest.raises(DatasetError, match=r"long.jpg is 900 x 1 px.* its short side would vanish"):
        resize(dict(img=np.zeros((1, 900, 3), np.uint8), img_path="long.jpg"))


def test_views_are_truncated_and_followed_by_their_mirror_images():
    plain, mirrored, small, _ = make_views(torch.rand(3, 59, 100), long_sides=[50])
    assert_close(mirrored, plain.flip(2), rtol=0, atol=0)
    assert small.shape == (3, 29, 50)


def test_a_thin_image_keeps_a_pixel():
    assert make_views(torch.rand(3, 1, 1792), long_sides=[1344])[2].shape == (3, 1, 1344)


# The model


def end_to_end(facts):
    return dict(canvas=facts["lsj_img_size"], long_sides=facts["tta_image_size"], size_ranges=facts["scale_ranges"])


@pytest.mark.parametrize("case", ["antialias", "no_antialias"])
def test_end_to_end(folder, photo, case):
    """From the photo through eight views of the shrunk model to the merged detections."""
    arrays, facts = load(folder / "tta_end_to_end.npz"), read_json(folder / "tta_end_to_end.json")
    model = DETATTA(ReferenceDETA(folder).model, antialias=case == "antialias", **end_to_end(facts)).eval()
    with torch.no_grad():
        (ours,) = model.test_step(dict(inputs=[photo[0]], data_samples=[photo[1]]))
    found = ours.pred_instances
    assert len(found) == pytest.approx(facts[case]["merged"], abs=5)
    best = found[:1000]
    assert_close(best.scores, arrays[f"{case}/scores"], rtol=1e-4, atol=1e-5)
    same = (best.bboxes - arrays[f"{case}/boxes"]).abs().amax(1) < 0.01
    same &= best.labels == arrays[f"{case}/labels"]
    assert same[:100].all()
    assert (~same).sum() <= 6  # neighbours of equal score may come in the other order


class Spots(torch.nn.Module):
    """Stands for the detector: one query on the brightest pixel of each cell of 4 x 4, relative to the image."""

    def __init__(self):
        super().__init__()
        self.data_preprocessor = DetDataPreprocessor(
            mean=MEAN.tolist(), std=STD.tolist(), bgr_to_rgb=True, pad_size_divisor=64
        )
        self.gain = torch.nn.Parameter(torch.tensor(2.0))
        self.num_queries = 9
        self.seen = []

    def test_step(self, data):  # noqa: ARG002  (mmengine looks for it)
        raise AssertionError("the views come as tensors")

    def forward(self, images, samples, mode):
        assert mode == "tensor"
        assert all(sample.batch_input_shape == images.shape[-2:] for sample in samples)
        self.seen += [(sample.img_id, sample.img_shape) for sample in samples]
        boxes, logits = [], []
        for image, sample in zip(images, samples, strict=True):
            height, width = sample.img_shape
            assert not image[:, height:].any()
            assert not image[:, :, width:].any()
            energy = torch.nn.functional.max_pool2d(image.sum(0)[None, :height, :width], 4)[0]
            score, index = energy.flatten().topk(self.num_queries)
            y, x = index // energy.shape[1] * 4 + 2, index % energy.shape[1] * 4 + 2
            size = torch.full_like(score, 12.0)
            boxes.append(torch.stack([x / width, y / height, size / width, size / height], dim=1))
            logits.append(torch.stack([score - 3, 1 - score], dim=1) * self.gain)
        logits, boxes = torch.stack(logits), torch.stack(boxes)
        return torch.stack([-logits, logits]), torch.stack([boxes / 2, boxes])


OPTIONS = dict(canvas=64, long_sides=[40, 32], size_ranges=[(0, 1e4), (0, 1e4), (10, 1e4)])


def batch(number=2):
    generator = torch.Generator().manual_seed(3)
    sizes = [(48, 60), (56, 40), (30, 60)][:number]
    samples = [
        DetDataSample(metainfo=dict(img_id=i, img_shape=size, ori_shape=(2 * size[0], 2 * size[1])))
        for i, size in enumerate(sizes)
    ]
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]
    return dict(inputs=images, data_samples=samples)


def detections(model, data):
    with torch.no_grad():
        return [{**sample.pred_instances} for sample in model.test_step(data)]


@pytest.mark.parametrize("at_once", [1, 4, 6])
def test_views_of_a_batch_do_not_mix(at_once):
    alone = DETATTA(Spots(), **OPTIONS)
    parts = [dict(inputs=[x], data_samples=[s]) for x, s in zip(*batch().values(), strict=True)]
    expected = [detections(alone, part)[0] for part in parts]
    assert all(len(found["scores"]) for found in expected)
    assert_close(detections(DETATTA(Spots(), views_at_once=at_once, **OPTIONS), batch()), expected)


def test_a_scale_whose_sizes_do_not_occur_adds_nothing():
    options = OPTIONS | dict(size_ranges=[(0, 1e4), (0, 1e4), (9e3, 1e4)])
    without = dict(canvas=64, long_sides=[40], size_ranges=[(0, 1e4), (0, 1e4)])
    assert_close(detections(DETATTA(Spots(), **options), batch()), detections(DETATTA(Spots(), **without), batch()))


def test_another_number_of_queries():
    fewer = detections(DETATTA(Spots(), num_queries=4, **OPTIONS), batch(1))[0]
    assert len(fewer["scores"]) < len(detections(DETATTA(Spots(), **OPTIONS), batch(1))[0]["scores"])


def test_mirrored_views_see_what_plain_ones_see():
    """The mirror image of an image gives the mirrored detections."""
    data, mirrored = batch(1), batch(1)
    mirrored["inputs"][0] = mirrored["inputs"][0].flip(-1)
    plain, flipped = (detections(DETATTA(Spots(), **OPTIONS), d)[0] for d in (data, mirrored))
    width = data["data_samples"][0].ori_shape[1]
    boxes = flipped["bboxes"]
    boxes = torch.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], dim=1)
    assert len(plain["scores"]) == len(boxes)
    assert_close(plain["scores"].sort().values, flipped["scores"].sort().values, rtol=1e-3, atol=1e-4)
    distances = (plain["bboxes"][:, None] - boxes).abs().amax(2).amin(1)
    assert_close(distances, torch.zeros_like(distances), rtol=0, atol=1e-3)


def test_a_test_is_resumed(tmp_path):
    first = Spots()
    whole = detections(DETATTA(first, resume_dir=tmp_path / "kept", **OPTIONS), batch(2))
    assert {number for number, _ in first.seen} == {0, 1}
    second = Spots()
    again = detections(DETATTA(second, resume_dir=tmp_path / "kept", **OPTIONS), batch(3))
    assert {number for number, _ in second.seen} == {2}
    assert_close(again[:2], whole)
    assert_close(again, detections(DETATTA(Spots(), **OPTIONS), batch(3)))


def test_detections_of_another_run_are_not_taken_for_this_one(tmp_path):
    detections(DETATTA(Spots(), resume_dir=tmp_path, **OPTIONS), batch())
    other_weights, other_queries = Spots(), Spots()
    torch.nn.init.constant_(other_weights.gain, 3)
    other_queries.num_queries = 8
    for model in (
        DETATTA(other_weights, resume_dir=tmp_path, **OPTIONS),
        DETATTA(other_queries, resume_dir=tmp_path, **OPTIONS),
        DETATTA(Spots(), resume_dir=tmp_path, suppression=dict(quad_scale=0.4), **OPTIONS),
    ):
        with pytest.raises(ConfigError, match=r"another checkpoint or of other options .*another folder"):
            detections(model, batch())
    data = batch()
    data["data_samples"][0].set_metainfo(dict(img_shape=(40, 60)))
    with pytest.raises(ConfigError, match="to another size"):
        detections(DETATTA(Spots(), resume_dir=tmp_path, **OPTIONS), data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(canvas=1024), "1024 has no released recipe.*1824, 1728.*give long_sides and size_ranges"),
        (dict(canvas=1824, long_sides=[1728]), "4 entries.*one for each of long_sides"),
        (dict(canvas=64, long_sides=[65], size_ranges=[(0, 9), (0, 9)]), "not exceed the canvas, 64"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        DETATTA(Spots(), **options)


def test_another_canvas_is_refused():
    with pytest.raises(ConfigError, match=r"\(64, 64\) pixels.*canvas has 72.*pad_size_divisor"):
        detections(DETATTA(Spots(), **OPTIONS | dict(canvas=72)), batch())


def test_views_made_by_a_pipeline_are_refused():
    data = {key: [value, value] for key, value in batch().items()}
    with pytest.raises(ConfigError, match="tta_pipeline to the test pipeline"):
        detections(DETATTA(Spots(), **OPTIONS), data)
