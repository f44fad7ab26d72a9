"""J, F and their statistics against DAVIS's evaluator."""

import json
import math

import numpy as np
import pytest

pytest.importorskip("cv2")  # comes with OpenMMLab

from helpers.golden import read_arrays

from pe_spatial.tracking.vos.jandf import boundary_f, region_similarity, statistics
from pe_spatial.tracking.vos.masks import read_mask

pytestmark = pytest.mark.mmseg
EXACT = dict(rtol=0, atol=1e-9)


@pytest.fixture(scope="module")
def edge_cases(golden):
    file = read_arrays(golden / "jandf/edge_cases.npz")
    width = int(file["width"])
    masks = {name: np.unpackbits(file[name], axis=-1)[..., :width].astype(bool) for name in ("gt", "pred", "void")}
    return file, masks


@pytest.mark.parametrize(
    ("key", "options"),
    [("F", {}), ("F_radius1px", {"bound": 1}), ("F_radius3px", {"bound": 3}), ("F_bound0p02", {"bound": 0.02})],
)
def test_f_of_edge_cases(edge_cases, key, options):
    file, masks = edge_cases
    values = boundary_f(masks["gt"], masks["pred"], **options)
    np.testing.assert_allclose(values, file[key], err_msg=str(file["names"]), **EXACT)


def test_j_and_void_of_edge_cases(edge_cases):
    file, masks = edge_cases
    gt, pred, void = masks.values()
    np.testing.assert_allclose(region_similarity(gt, pred), file["J"], **EXACT)
    np.testing.assert_allclose(region_similarity(gt, pred, void=void), file["J_void"], **EXACT)
    np.testing.assert_allclose(boundary_f(gt, pred, void=void), file["F_void"], **EXACT)
    assert not np.allclose(file["F_void"], file["F"])


@pytest.mark.parametrize("sequence", ["drift-touch", "vanish-empty", "thin-border", "gap-late-void", "short-empty"])
def test_every_frame_of_the_sequences(golden, sequence):
    """All frames and all objects, first and last frame included."""
    golden = golden / "jandf"
    expected = read_arrays(golden / "per_frame.npz")
    count, frames = expected[f"{sequence}/J"].shape
    objects = np.arange(1, count + 1)[:, None, None]
    for t in range(frames):
        truth = read_mask(golden / f"davis/Annotations/480p/{sequence}/{t:05d}.png")
        guess = read_mask(golden / f"results/{sequence}/{t:05d}.png")
        gt, pred, void = truth == objects, guess == objects, truth == 255
        for suffix, options in [("", {}), ("_void_excluded", {"void": void})]:
            if f"{sequence}/J{suffix}" in expected:
                j, f = (expected[f"{sequence}/{name}{suffix}"][:, t] for name in "JF")
                np.testing.assert_allclose(region_similarity(gt, pred, **options), j, **EXACT)
                np.testing.assert_allclose(boundary_f(gt, pred, **options), f, **EXACT)


@pytest.mark.parametrize("sequence", ["bmx-trees", "car-shadow", "libby"])
def test_real_predictions(shared, sequence):
    """OSVOS at 480x854, objects merged; the file has six decimals."""
    video = shared / "data/video"
    expected = json.loads((video / "reference_osvos/JF_official_metrics.json").read_text())["sequences"][sequence]
    values = []
    for t in range(expected["n_frames"]):
        gt = read_mask(video / f"Annotations/480p/{sequence}/{t:05d}.png") > 0
        pred = read_mask(video / f"reference_osvos/{sequence}/{t:05d}.png") > 0
        values.append((region_similarity(gt[None], pred[None])[0], boundary_f(gt[None], pred[None])[0]))
    j, f = np.transpose(values)
    np.testing.assert_allclose(j, expected["J_per_frame"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(f, expected["F_per_frame"], rtol=0, atol=1e-6)
    assert abs(f.mean() - expected["F_mean_all"]) < 1e-9
    assert abs(j[1:-1].mean() - expected["J_mean_excl_first_last"]) < 1e-9


def straightforward_f(gt, pred, radius):
    """F by its definition: boundary pixel by boundary pixel."""

    def boundary(mask):
        height, width = mask.shape
        found = [
            (y, x)
            for y in range(height)
            for x in range(width)
            for v, u in [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            if mask[y, x] != mask[min(v, height - 1), min(u, width - 1)]
        ]
        return np.array(sorted(set(found)), int).reshape(-1, 2)

    def share(points, others):
        if not len(points) or not len(others):
            return float(not len(points))
        squares = ((points[:, None] - others[None]) ** 2).sum(-1)
        return float((squares.min(1) <= radius**2).mean())

    precision, recall = share(boundary(pred), boundary(gt)), share(boundary(gt), boundary(pred))
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def test_f_by_its_definition_for_many_sizes_and_radii():
    rng = np.random.default_rng(0)
    for _ in range(150):
        height, width = rng.integers(1, 12), rng.integers(1, 150)
        gt, pred = rng.random((2, height, width)) < rng.choice([1, 2, 20]) / (height * width)
        radius = int(rng.choice([1, 2, 3, 8, 18, 63, 64, 70, 130]))
        value = boundary_f(gt[None], pred[None], bound=radius)[0]
        assert abs(value - straightforward_f(gt, pred, radius)) < 1e-12, (height, width, radius)


def test_objects_do_not_touch_each_other():
    rng = np.random.default_rng(1)
    gt, pred = rng.random((2, 5, 30, 40)) < 0.02
    one_by_one = [boundary_f(gt[i : i + 1], pred[i : i + 1])[0] for i in range(5)]
    np.testing.assert_array_equal(boundary_f(gt, pred), one_by_one)
    assert boundary_f(gt[:0], pred[:0]).shape == region_similarity(gt[:0], pred[:0]).shape == (0,)


@pytest.mark.parametrize("bound", [0, -1, 1.5])
def test_a_tolerance_is_a_share_or_whole_pixels(bound):
    masks = np.zeros((1, 4, 4), bool)
    with pytest.raises(ValueError, match="bound is"):
        boundary_f(masks, masks, bound=bound)


@pytest.mark.parametrize("other", [np.zeros((1, 4, 5), bool), np.zeros((1, 4, 4), np.uint8)])
def test_masks_of_another_size_or_type_are_refused(other):
    masks = np.zeros((1, 4, 4), bool)
    for measure in (region_similarity, boundary_f):
        with pytest.raises(ValueError, match=r"\(N, H, W\) bool"):
            measure(masks, other)


def test_statistics_of_golden_vectors(golden):
    file = read_arrays(golden / "jandf/statistics.npz")
    names = [key.removesuffix("/values") for key in file if key.endswith("/values")]
    assert len(names) > 5
    for name in names:
        for official in (False, True):  # they differ from 256 frames on
            got = statistics(file[f"{name}/values"], official_decay=official)
            np.testing.assert_allclose(got, file[f"{name}/stats"], err_msg=name, **EXACT)


def test_decay_beyond_256_frames():
    values = np.linspace(1, 0, 1000)
    limits = [0, 250, 500, 749, 999]  # five equidistant values from 1 to 1000, rounded, less 1
    expected = values[: limits[1] + 1].mean() - values[limits[3] :].mean()
    assert abs(statistics(values).decay - expected) < 1e-12


@pytest.mark.parametrize(
    ("frames", "decay"),
    [(256, math.nan), (257, math.nan), (400, -0.1075), (511, -0.2475538160469667), (1000, math.nan), (1025, 0.0)],
)
def test_official_decay_wraps(frames, decay):
    """What davis2017-evaluation@ac7c43f gives for the values i / frames under numpy 2."""
    values = np.arange(frames) / frames
    np.testing.assert_allclose(statistics(values, official_decay=True).decay, decay, **EXACT)
    assert abs(statistics(values).decay + 0.75) < 0.01
