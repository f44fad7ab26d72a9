"""The deferred resize gives the pixels of Pillow, and the samples of the two steps that it stands for."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmdet")

from mmdet.datasets.transforms import PackDetInputs, RandomCrop, RandomFlip
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import PolygonMasks
from mmengine.registry import TRANSFORMS, DefaultScope

import pe_spatial.detection
from pe_spatial.detection.resize import PlanarRandomFlip, _Polygons, resize_part

SIZES = ((50, 70), (300, 41), (128, 128))


@pytest.mark.parametrize("source", SIZES)
@pytest.mark.parametrize("size", [(9, 5), (64, 90), (128, 128), (70, 200), (311, 128)])
def test_parts_are_those_of_the_complete_image(source, size):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*source, 3), np.uint8)
    complete = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    boxes = [(0, 0, *size), (0, size[1] // 2, size[0] // 2, size[1])]
    corners = [(np.sort(rng.integers(0, side + 1, 2)) for side in size) for _ in range(10)]
    boxes += [(x[0], y[0], x[1], y[1]) for x, y in corners if x[0] < x[1] and y[0] < y[1]]
    for left, top, right, bottom in boxes:
        part = resize_part(image, size, (left, top, right, bottom))
        assert (part == complete[top:bottom, left:right]).all()


def test_random_parts_are_those_of_the_complete_image():
    rng = np.random.default_rng(1)
    for _ in range(300):
        image = rng.integers(0, 256, (*rng.integers(1, 70, 2), 3), np.uint8)
        size = tuple(int(side) for side in np.maximum(image.shape[1::-1] * rng.uniform(0.1, 3, 2), 1))
        left, right, top, bottom = (int(at) for side in size for at in np.sort(rng.choice(side + 1, 2, replace=False)))
        part = resize_part(image, size, (left, top, right, bottom))
        complete = np.array(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        assert (part == complete[top:bottom, left:right]).all(), (image.shape, size, left, top, right, bottom)


def test_thin_images_are_resized_along_the_columns_first():
    image = np.random.default_rng(0).integers(0, 256, (500, 4, 3), np.uint8)
    complete = np.array(Image.fromarray(image).resize((9, 200), Image.Resampling.BILINEAR))
    assert (resize_part(image, (9, 200), (2, 50, 8, 190)) == complete[50:190, 2:8]).all()


def test_polygons_are_cropped_as_mmdetection_crops_them():
    rng = np.random.default_rng(0)
    stars = [[rng.uniform(-5, 65, 2 * corners) for corners in rng.integers(3, 12, count)] for count in (1, 2, 3) * 8]
    stars += [[np.zeros(6)], [np.array([1.0, 1, 9, 9, 5, 5])]]  # without area
    for box in ([0, 0, 60, 60], [20, 10, 47, 33], [59, 0, 70, 9]):
        ours = _Polygons(stars, 60, 60)[np.arange(len(stars))].crop(np.array(box))
        theirs = PolygonMasks(stars, 60, 60).crop(np.array(box))
        assert (ours.height, ours.width) == (theirs.height, theirs.width)
        for mine, expected in zip(ours, theirs, strict=True):
            assert [part.tolist() for part in mine] == [part.tolist() for part in expected]
    empty = _Polygons([], 60, 60).crop(np.array([0, 0, 20, 30]))
    assert (len(empty), empty.height, empty.width) == (0, 30, 20)


@pytest.mark.parametrize("direction", ["horizontal", "vertical", "diagonal"])
def test_flips_are_those_of_mmdetection_in_memory_as_packed(direction):
    ours, theirs = (step(prob=1.0, direction=direction)(sample(0)) for step in (PlanarRandomFlip, RandomFlip))
    assert (ours["img"] == theirs["img"]).all()
    assert ours["img"].transpose(2, 0, 1).flags.c_contiguous
    assert_close(ours["gt_bboxes"].tensor, theirs["gt_bboxes"].tensor, rtol=0, atol=0)
    assert (ours["gt_masks"].to_ndarray() == theirs["gt_masks"].to_ndarray()).all()


def test_the_image_is_left_to_a_crop():
    with DefaultScope.overwrite_default_scope("mmdet"):
        results = TRANSFORMS.build(dict(type="DeferredResize", scale=(30, 40)))(sample(0))
        with pytest.raises(AttributeError, match="put a RandomCrop there, or use Resize"):
            PackDetInputs()(results)


def sample(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    corners = np.sort(rng.random((5, 2, 2)), axis=1) * (80, 60)
    boxes = corners.reshape(5, 4).astype(np.float32)
    outlines = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64)] for box in boxes]
    masks = PolygonMasks(outlines, 60, 80)
    results = dict(img=image, img_shape=(60, 80), gt_bboxes=HorizontalBoxes(torch.from_numpy(boxes)), gt_masks=masks)
    return dict(results, gt_bboxes_labels=np.arange(5), gt_ignore_flags=np.zeros(5, bool))


def jittered(seed, flip="RandomFlip", **resize):
    assert pe_spatial.detection
    np.random.seed(seed)
    results = sample(seed)
    with DefaultScope.overwrite_default_scope("mmdet"):
        jitter = dict(type="RandomResize", scale=(100, 100), ratio_range=(0.1, 2.0), keep_ratio=True, **resize)
        crop = RandomCrop(crop_size=(100, 100), recompute_bbox=True, allow_negative_crop=True)
        flip = TRANSFORMS.build(dict(type=flip, prob=0.5))
        for step in (TRANSFORMS.build(jitter), crop, flip, PackDetInputs()):
            results = step(results)
    return results


def test_samples_equal_those_of_two_steps():
    for seed in range(12):
        ours = jittered(seed, "pe_spatial.RandomFlip", resize_type="DeferredResize")
        both = jittered(seed, backend="pillow")
        assert_close(ours["inputs"], both["inputs"], rtol=0, atol=0)
        assert ours["data_samples"].metainfo == both["data_samples"].metainfo
        objects, expected = ours["data_samples"].gt_instances, both["data_samples"].gt_instances
        assert_close(objects.bboxes.tensor, expected.bboxes.tensor, rtol=0, atol=0)
        for mine, other in zip(objects.masks, expected.masks, strict=True):
            assert [part.tolist() for part in mine] == [part.tolist() for part in other]
        assert (objects.labels == expected.labels).all()
