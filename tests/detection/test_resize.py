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
from pe_spatial.detection.resize import resize_part

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


def sample(seed):
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (60, 80, 3), np.uint8)
    corners = np.sort(rng.random((5, 2, 2)), axis=1) * (80, 60)
    boxes = corners.reshape(5, 4).astype(np.float32)
    outlines = [[box[[0, 1, 2, 1, 2, 3, 0, 3]].astype(np.float64)] for box in boxes]
    masks = PolygonMasks(outlines, 60, 80)
    results = dict(img=image, img_shape=(60, 80), gt_bboxes=HorizontalBoxes(torch.from_numpy(boxes)), gt_masks=masks)
    return dict(results, gt_bboxes_labels=np.arange(5), gt_ignore_flags=np.zeros(5, bool))


def jittered(seed, **resize):
    assert pe_spatial.detection
    np.random.seed(seed)
    results = sample(seed)
    with DefaultScope.overwrite_default_scope("mmdet"):
        jitter = dict(type="RandomResize", scale=(100, 100), ratio_range=(0.1, 2.0), keep_ratio=True, **resize)
        crop = RandomCrop(crop_size=(100, 100), recompute_bbox=True, allow_negative_crop=True)
        for step in (TRANSFORMS.build(jitter), crop, RandomFlip(prob=0.5), PackDetInputs()):
            results = step(results)
    return results


def test_samples_equal_those_of_two_steps():
    for seed in range(12):
        ours, both = jittered(seed, resize_type="DeferredResize"), jittered(seed, backend="pillow")
        assert_close(ours["inputs"], both["inputs"], rtol=0, atol=0)
        assert ours["data_samples"].metainfo == both["data_samples"].metainfo
        objects, expected = ours["data_samples"].gt_instances, both["data_samples"].gt_instances
        assert_close(objects.bboxes.tensor, expected.bboxes.tensor, rtol=0, atol=0)
        assert (objects.masks.to_ndarray() == expected.masks.to_ndarray()).all()
