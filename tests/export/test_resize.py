"""Resizing in numpy equals OpenCV's and torch's."""

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pe_spatial.runtime.resize import resize_area, resize_bilinear, resize_pixels

SIZES = (
    ((60, 80), (37, 41)),
    ((60, 80), (61, 200)),
    ((33, 17), (32, 17)),
    ((7, 9), (64, 48)),
    ((480, 640), (192, 256)),
)


def pixels(*size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_pixels_are_those_of_opencv(before, after):
    image = pixels(*before)
    expected = cv2.resize(image, after[::-1], interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(resize_pixels(image, after), expected)
    assert resize_pixels(image, before) is image


@pytest.mark.parametrize(("before", "after"), [(a, b) for a, b in SIZES if b <= a])
def test_areas_are_those_of_opencv(before, after):
    """But for means that lie between two levels, which OpenCV rounds in float32."""
    image = pixels(*before)
    expected = cv2.resize(image, after[::-1], interpolation=cv2.INTER_AREA)
    difference = np.abs(resize_area(image, after).astype(int) - expected)
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.01


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_maps_are_those_of_torch_and_opencv(before, after, align_corners):
    maps = np.random.default_rng(0).random((3, *before), dtype=np.float32)
    options = dict(mode="bilinear", align_corners=align_corners)
    expected = F.interpolate(torch.from_numpy(maps)[None], after, **options)[0].numpy()
    found = resize_bilinear(maps, after, align_corners=align_corners)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 if align_corners else 1e-5)
    if not align_corners:
        np.testing.assert_allclose(found[0], cv2.resize(maps[0], after[::-1]), rtol=0, atol=1e-5)
