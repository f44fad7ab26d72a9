"""Label propagation: equal to the released script, bounded, and right where the script was never tried."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.golden import read_arrays
from PIL import Image
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from pe_spatial.tracking.propagation import LabelPropagation, first_soft, hard_mask, nearest

CASES = {
    "propagation_15x20": ("default", "small_radius", "short_context", "unrestricted"),
    "propagation_resized_8x11": ("default", "small_radius"),
}
SETTINGS = [(case, setting) for case, settings in CASES.items() for setting in settings]


@pytest.fixture(scope="module")
def golden_case(golden):
    """Return `case -> (description, arrays)`."""

    def read(case):
        path = golden / "labelprop" / f"{case}.json"
        return json.loads(path.read_text()), read_arrays(path.with_suffix(".npz"))

    return read


def propagate(features, soft, **options):
    propagation = LabelPropagation(**options)
    propagation.start(features[0], soft)
    return torch.stack([propagation.step(one) for one in features[1:]])


def by_definition(features, soft, *, context=7, radius=12, shape="square", topk=5, temperature=0.1):
    """The README's steps in double precision, each patch on its own."""
    h, w = soft.shape[1:]
    keys = [F.normalize(one.double().flatten(1), dim=0) for one in features]  # (C, h * w)
    labels = [soft.double().flatten(1)]
    y, x = (place.flatten() for place in torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    dy, dx = (place[:, None] - place for place in (y, x))
    if radius is None:
        near = torch.ones_like(dy, dtype=torch.bool)
    elif shape == "square":
        near = (dy.abs() <= radius) & (dx.abs() <= radius)
    else:
        near = dy**2 + dx**2 <= radius**2
    for t in range(1, len(features)):
        used = [0, *range(max(1, t - context), t)]
        rows = []
        for q in range(h * w):
            affinity = torch.cat([(keys[t][:, q] @ keys[s] / temperature).exp() * near[q] for s in used])
            least = affinity.topk(min(topk, len(affinity)))[0][-1]
            affinity = affinity * (affinity >= least)
            rows.append(torch.cat([labels[s] for s in used], 1) @ affinity / affinity.sum())
        labels.append(torch.stack(rows, 1))
    return torch.stack(labels[1:]).unflatten(2, (h, w)).float()


@pytest.mark.parametrize("case", CASES)
def test_first_mask_on_the_grid_is_the_references(golden_case, case):
    description, arrays = golden_case(case)
    soft, ids = first_soft(torch.from_numpy(arrays["first_mask"]), tuple(description["grid"]))
    assert ids.tolist() == [0, 1, 2]
    assert_close(soft, torch.from_numpy(arrays["first_soft"]), atol=0, rtol=0)


@pytest.mark.parametrize(("case", "setting"), SETTINGS)
def test_masks_are_the_references(golden_case, case, setting):
    description, arrays = golden_case(case)
    options = description["settings"][setting]
    features = torch.from_numpy(arrays["features"]).permute(0, 3, 1, 2)
    first = torch.from_numpy(arrays["first_mask"])
    soft, ids = first_soft(first, tuple(description["grid"]))
    softs = propagate(
        features,
        soft,
        context=options["n_last_frames"],
        radius=options["neighbourhood_radius"] or None,
        topk=options["topk"],
        temperature=description["temperature"],
    )
    assert_close(softs, torch.from_numpy(arrays[f"{setting}/soft"]), atol=1e-5, rtol=0)
    hard = torch.stack([hard_mask(one, ids, first.shape, patch_size=description["patch_size"]) for one in softs])
    assert hard.dtype == torch.uint8
    assert np.array_equal(hard.numpy(), arrays[f"{setting}/hard"][1:])


def test_defaults_are_the_scripts(golden_case):
    options = golden_case("propagation_15x20")[0]["settings"]["default"]
    ours = LabelPropagation()
    assert [ours.context, ours.radius, ours.topk] == [
        options[key] for key in ("n_last_frames", "neighbourhood_radius", "topk")
    ]
    assert (ours.temperature, ours.shape) == (0.1, "square")


@pytest.mark.parametrize(
    "options",
    [
        dict(radius=4),
        dict(radius=4, shape="circle", temperature=0.2),
        dict(radius=1, topk=20, context=1),  # no corner sees twenty patches
        dict(radius=None, topk=3, temperature=0.005),  # exp(200) overflows
        dict(radius=30),  # beyond every edge
    ],
    ids=str,
)
def test_tiles_make_no_difference(options):
    """A grid of several tiles, none of them whole at the edge."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 24, 18, 35, generator=generator) + 0.5
    soft = F.one_hot(torch.randint(4, (18, 35), generator=generator), 4).permute(2, 0, 1).float()
    assert_close(propagate(features, soft, **options), by_definition(features, soft, **options), atol=2e-5, rtol=0)


def test_equals_of_the_last_patch_count_too():
    """Features along axes, so that cosines are exactly 0 or 1: a still image, in which every frame ties."""
    kinds = torch.arange(20).reshape(4, 5) % 3
    features = F.one_hot(kinds, 3).permute(2, 0, 1).float().expand(6, -1, -1, -1)
    soft = F.one_hot(torch.arange(20).reshape(4, 5) // 10, 2).permute(2, 0, 1).float()
    options = dict(radius=2, topk=2, context=3)
    assert_close(propagate(features, soft, **options), by_definition(features, soft, **options))


def test_soft_masks_sum_to_one_and_forget_the_scale_of_features():
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(4, 5, 6, 7, generator=generator)
    soft = F.one_hot(torch.randint(3, (6, 7), generator=generator), 3).permute(2, 0, 1).float()
    softs = propagate(features, soft, radius=2)
    assert_close(softs.sum(1), torch.ones(3, 6, 7))
    scaled = features * torch.tensor([1.0, 50.0, 0.02, 7.0])[:, None, None, None]
    assert_close(propagate(scaled, soft, radius=2), softs)
    assert_close(propagate(features.half(), soft, radius=2), softs, atol=5e-3, rtol=0)


def test_a_new_start_forgets_the_video_before():
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(4, 5, 6, 7, generator=generator)
    soft = F.one_hot(torch.randint(2, (6, 7), generator=generator), 2).permute(2, 0, 1).float()
    propagation = LabelPropagation(radius=3, context=2)
    twice = []
    for _ in range(2):
        propagation.start(features[0], soft)
        twice.append(torch.stack([propagation.step(one) for one in features[1:]]))
    assert_close(*twice, atol=0, rtol=0)


class Largest(TorchDispatchMode):
    """Remember the number of elements of the largest tensor made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.numel())
        return out


@pytest.mark.parametrize("radius", [3, None])
def test_memory_is_bounded_in_frames_and_tokens(radius):
    side, context = 48, 2
    features = torch.randn(8, 4, side, side, generator=torch.Generator().manual_seed(3))
    soft = torch.stack((torch.ones(side, side), torch.zeros(side, side)))
    propagation = LabelPropagation(radius=radius, context=context)
    propagation.start(features[0], soft)
    place = propagation._keys.data_ptr()
    with Largest() as largest:
        for one in features[1:]:
            propagation.step(one)
    assert propagation._keys.data_ptr() == place
    assert len(propagation._keys) == len(propagation._labels) == context + 1
    reached = (16 + 2 * radius) ** 2 if radius else side**2
    assert largest.elements <= 16**2 * (context + 1) * reached < (context + 1) * side**4 / 5


@pytest.mark.parametrize("seed", range(40))
def test_nearest_is_pillows(seed):
    h, w, new_h, new_w = np.random.default_rng(seed).integers(1, 900, 4).tolist()
    image = np.random.default_rng(seed).integers(0, 256, (h, w), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((new_w, new_h), Image.Resampling.NEAREST))
    assert np.array_equal(nearest(torch.from_numpy(image), (new_h, new_w)).numpy(), expected)


def test_ids_may_skip_numbers_and_small_objects_are_lost():
    mask = torch.zeros(32, 48, dtype=torch.uint8)
    mask[:, :16], mask[:16, 16:32] = 7, 254
    mask[0, 40] = 9  # the middle of no patch
    soft, ids = first_soft(mask, (2, 3))
    assert ids.tolist() == [0, 7, 254]
    assert soft.argmax(0).tolist() == [[1, 2, 0], [1, 0, 0]]
    hard = hard_mask(soft, ids, (32, 48), patch_size=16)
    assert hard.dtype == torch.uint8
    assert sorted(hard.unique().tolist()) == [0, 7, 254]
    full, ids = first_soft(torch.full((32, 32), 3), (2, 2))
    assert ids.tolist() == [0, 3]  # background has a channel though no patch is background
    assert hard_mask(full, ids, (32, 32), patch_size=16).unique().tolist() == [3]


def test_weak_labels_are_lifted_and_the_first_wins_among_equals():
    """Two weak objects of the same shape: each is scaled to 1 at its place, where the background is not."""
    soft = torch.zeros(3, 4, 4)
    soft[1, 0, 0] = soft[2, 0, 0] = 0.2
    soft[0] = 1 - soft[1] - soft[2]
    for patch_size in (8, None):
        hard = hard_mask(soft, torch.tensor([0, 5, 6]), (32, 32), patch_size=patch_size)
        assert hard[0, 0] == 5
        assert 6 not in hard
        assert hard[16:, 16:].unique().tolist() == [0]


def test_aligned_masks_follow_the_whole_frame():
    """Where the frame is no multiple of the grid, the script's way shifts and the direct one does not."""
    soft = torch.zeros(2, 2, 4)
    soft[1, :, 2:] = 1
    soft[0] = 1 - soft[1]
    direct = hard_mask(soft, torch.tensor([0, 1]), (50, 90), patch_size=None)
    assert direct.shape == (50, 90)
    assert direct[:, :45].sum() == 0
    assert direct[:, 45:].all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(context=0), "context is 0; it must be at least 1"),
        (dict(radius=0), "radius is 0; it must be at least 1, or None"),
        (dict(topk=0), "topk is 0"),
        (dict(temperature=0.0), r"temperature is 0\.0"),
        (dict(shape="hexagon"), "shape is 'hexagon'; allowed are 'square', 'circle'"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(ValueError, match=words):
        LabelPropagation(**options)


def test_frames_are_checked():
    propagation = LabelPropagation()
    features, soft = torch.ones(4, 3, 5), torch.ones(1, 3, 5)
    with pytest.raises(RuntimeError, match="step was called before start"):
        propagation.step(features)
    with pytest.raises(ValueError, match=r"expected \(C, h, w\)"):
        propagation.start(features[None], soft)
    propagation.start(features, soft)
    with pytest.raises(ValueError, match=r"\(4, 3, 6\) but those of the first frame were \(4, 3, 5\)"):
        propagation.step(torch.ones(4, 3, 6))
    with pytest.raises(ValueError, match="not finite"):
        propagation.step(features * torch.nan)
