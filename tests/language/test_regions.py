"""Features of regions: which patches they have, and what pooling over them gives."""

import numpy as np
import pytest
import torch
from helpers.language import WORD_CORE, tiny_core
from torch.testing import assert_close

from pe_spatial.errors import ConfigError
from pe_spatial.language.embedding import squash
from pe_spatial.language.regions import RegionClassifier, box_shares, chosen_patches, crop, mask_shares

RGB = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)


def full_mask(box, size=(90, 120)):
    mask = np.zeros(size, bool)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def test_shares_are_areas():
    boxes = [(0, 0, 120, 90), (10, 20, 70, 65), (30, 0, 31, 1)]
    shares = box_shares(np.array(boxes, np.float32), (90, 120), (3, 4))  # patches of 30x30 pixels
    assert_close(shares, mask_shares([full_mask(box) for box in boxes], (3, 4)))
    assert shares[0].min() == 1
    assert_close(shares[1].sum() * 900, torch.tensor(60.0 * 45))
    chosen = chosen_patches(shares)
    assert chosen[1].nonzero().tolist() == [[1, 0], [1, 1]]
    assert chosen[2].nonzero().tolist() == [[0, 1]]  # smaller than half of a patch


@torch.inference_mode()
def test_the_complete_image_is_pooled_as_an_image_without_its_class_token():
    pytest.importorskip("open_clip")
    model = tiny_core(WORD_CORE)
    regions = RegionClassifier(model, ["cat"])
    image = squash(RGB, model.config.vision)[None]
    got = regions.features(RGB, np.array([[0, 0, 120, 90]], np.float32))
    expected = model.visual.head(model.visual.attn_pool(model.visual.patches(image).flatten(1, 2)))
    assert_close(got, expected)


@torch.inference_mode()
def test_a_single_patch_has_its_dense_feature():
    pytest.importorskip("open_clip")
    model = tiny_core(WORD_CORE)
    dense = model.visual.dense(squash(RGB, model.config.vision)[None])[0]  # (D, 4, 4)
    mask = full_mask((31, 23, 59, 44))  # inside of the patch in row 1, column 1
    for options in (dict(masks=[mask]), {}):
        got = RegionClassifier(model, ["cat"]).features(RGB, np.array([[31, 23, 59, 44]], np.float32), **options)
        assert_close(got[0], dense[:, 1, 1])


@pytest.mark.parametrize("by", ["tokens", "crops"])
def test_probabilities(by):
    pytest.importorskip("open_clip")
    model = tiny_core(WORD_CORE)
    regions = RegionClassifier(model, ["a cat", "犬"], background=["an object"], by=by)
    boxes = np.array([[0, 0, 60, 60], [50, 20, 120, 90], [119, 89, 120, 90]], np.float32)
    probabilities = regions(RGB, boxes)
    assert probabilities.shape == (3, 3)
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    assert regions(RGB, np.zeros((0, 4), np.float32)).shape == (0, 3)
    features = regions.features(RGB, boxes)
    if by == "crops":
        with torch.inference_mode():
            one = model.encode_image(squash(crop(RGB, boxes[1]), model.config.vision)[None])
        assert_close(features[1], one[0], rtol=1e-4, atol=1e-5)
    cosines = torch.nn.functional.normalize(features, dim=-1) @ regions.classifier.T
    expected = (model.logit_scale.exp() * cosines).softmax(-1)
    np.testing.assert_allclose(probabilities, expected.detach().numpy(), rtol=1e-4)


def test_crops_have_context_and_a_pixel():
    assert crop(RGB, np.array([20, 20, 40, 60])).shape == (48, 24, 3)
    assert crop(RGB, np.array([0, 0, 120, 90])).shape == RGB.shape
    assert crop(RGB, np.array([119.5, 89.5, 119.6, 89.6])).shape == (1, 1, 3)


def test_impossible_words():
    model = tiny_core()
    with pytest.raises(ConfigError, match="the list names no class"):
        RegionClassifier(model, [])
    with pytest.raises(ConfigError, match="the list names cat twice"):
        RegionClassifier(model, ["cat"], background=["cat"])
    with pytest.raises(ConfigError, match="by is 'boxes'; allowed are 'tokens', 'crops'"):
        RegionClassifier(model, ["cat"], by="boxes")
