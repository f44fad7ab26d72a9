"""Clips: images and masks change together, once for the clip, as SAM 2's transforms do through torchvision."""

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmcv")

from pe_spatial.tracking.sam2.transforms import (
    ClipAffine,
    ClipColorJitter,
    ClipFlip,
    ClipGrayscale,
    ClipResize,
    PackClip,
    affine_matrix,
)

RED = (250, 10, 20)
SIZE = (60, 100)


def clip(*boxes, size=SIZE, frames=3):
    """Red rectangles (left, top, right, bottom) on black that move 4 pixels right a frame, and their masks."""
    images = [np.zeros((*size, 3), np.uint8) for _ in range(frames)]
    masks = np.zeros((len(boxes), frames, *size), bool)
    for t, image in enumerate(images):
        for n, (left, top, right, bottom) in enumerate(boxes):
            masks[n, t, top:bottom, left + 4 * t : right + 4 * t] = True
            image[masks[n, t]] = RED
    return dict(
        frames=images,
        masks=masks,
        video="bear",
        img_path="JPEGImages/bear",
        frame_names=[f"{t:05d}" for t in range(frames)],
        objects=list(range(3, 3 + len(boxes))),
        sample_idx=5,
    )


def noise(frames=2, size=SIZE):
    """Images that show every shift; a smooth pattern with colors."""
    results = clip((20, 20, 50, 40), size=size, frames=frames)
    y, x = np.mgrid[: size[0], : size[1]]
    for t, image in enumerate(results["frames"]):
        image[:] = np.stack([128 + 100 * np.sin(x / 5 + t), 128 + 100 * np.cos(y / 4), x + y], -1).astype(np.uint8)
    return results


def assert_mask_covers_the_red(results, disagree):
    """All but `disagree` of a mask's pixels, those at its rim where colors mix, are where the image is red."""
    for t, frame in enumerate(results["frames"]):
        red, mask = frame[..., 0].astype(int) - frame[..., 1] > 120, results["masks"][:, t].any(0)
        assert mask.sum() > 50
        assert np.count_nonzero(red ^ mask) <= disagree * mask.sum()


@pytest.mark.parametrize(
    ("step", "disagree"),
    [(ClipFlip(prob=1.0), 0), (ClipAffine(degrees=25, shear=20), 0.06), (ClipResize(size=73), 0.03)],
)
def test_mask_stays_on_its_object(step, disagree):
    for seed in range(3):
        np.random.seed(seed)
        before = clip((30, 15, 60, 45), (5, 30, 25, 50))
        after = step.transform({**before, "frames": list(before["frames"])})
        assert after["frames"][0].shape != SIZE or not np.array_equal(after["masks"], before["masks"])
        assert after["frames"][0].dtype == np.uint8
        assert after["masks"].dtype == bool
        assert after["sample_idx"] == 5
        assert_mask_covers_the_red(after, disagree)


@pytest.mark.parametrize(("angle", "shear"), [(0, 0), (25, 0), (0, 20), (-13.3, 17.1)])
@pytest.mark.parametrize("size", [(60, 100), (61, 37)])
def test_affine_is_torchvisions(monkeypatch, angle, shear, size):
    """As SAM 2 applies it: F.affine on a PIL image and on a mask tensor. Away from the rim of the image."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    from PIL import Image
    from torchvision.transforms import InterpolationMode

    drawn = iter([angle, shear])
    monkeypatch.setattr(np.random, "uniform", lambda *_: next(drawn))
    before = noise(size=size)
    before["masks"][:] = False
    before["masks"][..., 20:40, 15:30] = True
    after = ClipAffine(degrees=25, shear=20).transform({**before})
    args = dict(angle=angle, translate=[0, 0], scale=1.0, shear=[shear, 0.0])
    for t, image in enumerate(before["frames"]):
        expected = np.asarray(
            functional.affine(
                Image.fromarray(image), **args, interpolation=InterpolationMode.BILINEAR, fill=[123, 116, 103]
            )
        )
        outside = np.all(expected == (123, 116, 103), -1)
        rim = dict(borderType=cv2.BORDER_CONSTANT, borderValue=0)
        inner, outer = (cv2.erode(part.astype(np.uint8), np.ones((5, 5)), **rim) > 0 for part in (~outside, outside))
        assert inner.mean() > 0.4
        assert np.abs(after["frames"][t].astype(int) - expected)[inner].max() <= 2  # OpenCV's weights have 5 bits
        assert (after["frames"][t][outer] == (123, 116, 103)).all()
    masks = torch.from_numpy(before["masks"][0].astype(np.uint8))  # (T, H, W)
    expected = functional.affine(masks, **args, interpolation=InterpolationMode.NEAREST, fill=0.0).numpy() > 0
    assert np.count_nonzero(expected ^ after["masks"][0]) <= 0.02 * expected.sum()


def test_affine_keeps_the_center_and_fills_with_the_mean_color():
    matrix = affine_matrix(25, 20, SIZE)
    np.testing.assert_allclose(matrix @ [49.5, 29.5, 1], [49.5, 29.5])
    np.random.seed(1)
    after = ClipAffine(degrees=25, shear=20).transform(clip((30, 15, 60, 45)))
    assert tuple(after["frames"][0][0, 0]) == tuple(after["frames"][2][-1, -1]) == (123, 116, 103)
    assert not after["masks"][..., 0, 0].any()


def test_affine_is_left_out_where_it_empties_a_mask_of_the_first_frame():
    np.random.seed(0)
    step = ClipAffine(degrees=25, shear=0)
    corner = clip((30, 15, 60, 45), (0, 0, 2, 2))
    after = step.transform({**corner})
    assert np.array_equal(after["masks"], corner["masks"])
    assert after["frames"] is corner["frames"]
    late = clip((30, 15, 60, 45), (40, 20, 50, 30))
    late["masks"][1, 1:] = False  # an object may vanish later
    assert not np.array_equal(step.transform({**late})["masks"], late["masks"])


@pytest.mark.parametrize("size", [32, 73, 128])
def test_resize_is_sam2s(size):
    """F.resize of torchvision, on PIL images and on uint8 mask tensors (bilinear, antialiased, rounded)."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    from PIL import Image

    before = noise()
    before["masks"] = np.random.default_rng(0).random((2, 2, *SIZE)) > 0.5
    after = ClipResize(size=size).transform({**before})
    assert after["masks"].shape == (2, 2, size, size)
    for t in range(2):
        expected = functional.resize(Image.fromarray(before["frames"][t]), [size, size])
        np.testing.assert_array_equal(after["frames"][t], np.asarray(expected))
        masks = torch.from_numpy(before["masks"][:, t].astype(np.uint8))
        expected = functional.resize(masks[None], [size, size])[0].numpy() > 0
        np.testing.assert_array_equal(after["masks"][:, t], expected)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_jitter_is_torchvisions(kind):
    functional = pytest.importorskip("torchvision.transforms.functional")
    from PIL import Image

    np.random.seed(3)
    frames = noise()["frames"]
    after = ClipColorJitter(**{kind: 0.5}).transform(dict(frames=frames))["frames"]
    np.random.seed(3)
    factors = dict(zip(("brightness", "contrast", "saturation"), np.random.uniform(0, 1, 3), strict=True))
    factor = 0.5 + factors[kind]  # the three are drawn in this order; those of 0 are 1 and change nothing
    adjust = getattr(functional, f"adjust_{kind}")
    assert 0.5 < factor < 1.5
    assert abs(factor - 1) > 0.05
    for frame, expected in zip(after, frames, strict=True):
        np.testing.assert_array_equal(frame, np.asarray(adjust(Image.fromarray(expected), factor)))


def test_jitter_draws_once_for_the_clip_or_for_every_frame():
    same = [noise(frames=1)["frames"][0]] * 4
    values = dict(brightness=0.3, contrast=0.3, saturation=0.3)
    together = ClipColorJitter(**values).transform(dict(frames=list(same)))["frames"]
    assert all(np.array_equal(frame, together[0]) for frame in together)
    assert not np.array_equal(together[0], same[0])
    apart = ClipColorJitter(**values, per_frame=True).transform(dict(frames=list(same)))["frames"]
    assert len({frame.tobytes() for frame in apart}) == 4


def test_gray_is_all_or_nothing():
    assert np.ptp(ClipGrayscale(prob=1.0).transform(noise())["frames"][1], axis=-1).max() == 0
    before = noise()
    assert ClipGrayscale(prob=0.0).transform({**before})["frames"] is before["frames"]


def test_pack_gives_the_model_its_clip():
    packed = PackClip().transform(clip((30, 15, 60, 45), (5, 30, 25, 50)))
    assert packed["inputs"].shape == (3, 3, *SIZE)
    assert packed["inputs"].dtype == torch.uint8
    assert tuple(packed["inputs"][0, :, 20, 40]) == RED  # RGB
    assert packed["masks"].shape == (2, 3, *SIZE)
    assert packed["masks"].dtype == torch.bool
    assert packed["data_samples"].metainfo == dict(
        img_path="JPEGImages/bear 00000..00002", video="bear", frames=["00000", "00001", "00002"], objects=[3, 4]
    )
    single = PackClip().transform(clip((30, 15, 60, 45), frames=1))
    assert single["data_samples"].img_path == "JPEGImages/bear 00000"


def test_objects_that_the_resizing_took_from_the_first_frame_are_left_out():
    tiny = clip((30, 15, 60, 45), (5, 5, 6, 6), (70, 15, 80, 25))
    packed = PackClip().transform(ClipResize(size=20).transform(tiny))
    assert packed["data_samples"].objects == [3, 5]
    assert packed["masks"][:, 0].flatten(1).any(1).tolist() == [True, True]
    late = clip((30, 15, 60, 45))
    late["masks"][:, 1:] = False
    assert len(PackClip().transform(late)["masks"]) == 1
    assert PackClip().transform(ClipResize(size=20).transform(clip((5, 5, 6, 6)))) is None


def test_equal_seeds_give_equal_clips():
    steps = [
        ClipFlip(),
        ClipAffine(degrees=25, shear=20),
        ClipResize(size=64),
        ClipColorJitter(brightness=0.1, contrast=0.03, saturation=0.03),
        ClipGrayscale(prob=0.5),
        ClipColorJitter(brightness=0.1, contrast=0.05, saturation=0.05, per_frame=True),
        PackClip(),
    ]

    def run(seed):
        np.random.seed(seed)
        results = noise()
        for step in steps:
            results = step.transform(results)
        return results

    one, two, other = run(7), run(7), run(8)
    assert torch.equal(one["inputs"], two["inputs"])
    assert torch.equal(one["masks"], two["masks"])
    assert not torch.equal(one["inputs"], other["inputs"])
