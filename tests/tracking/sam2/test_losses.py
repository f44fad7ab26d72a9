"""SAM 2's training loss against the released values; absent objects, competing candidates."""


import numpy as np
import pytest
import torch
from helpers.golden import read_arrays, read_json
from torch.testing import assert_close

from pe_spatial.tracking.sam2.losses import MultiStepLoss, Prediction

OPTIONS = {
    "release": {},
    "class_defaults": dict(all_ious=False, iou_l1=False, predicts_scores=False, score_weight=0.0),
    "focal_scores_best_iou": dict(
        mask_weight=5.0,
        dice_weight=2.0,
        iou_weight=0.5,
        score_weight=3.0,
        alpha=0.6,
        gamma=1.5,
        score_alpha=0.25,
        score_gamma=2.0,
        all_ious=False,
        iou_l1=False,
    ),
}
NAMES = {"loss_mask": "loss_mask", "loss_dice": "loss_dice", "loss_iou": "loss_iou", "loss_score": "loss_class"}


@pytest.fixture
def reference(golden):
    folder = golden / "sam2"
    values, facts = read_arrays(folder / "losses.npz"), read_json(folder / "losses.json")
    targets = torch.from_numpy(np.unpackbits(values["targets"], axis=-1).astype(bool))
    frames = [
        [
            Prediction(
                *(
                    torch.from_numpy(values[f"frame{t}/step{s}/{name}"]).requires_grad_()
                    for name in ("masks", "ious", "scores")
                )
            )
            for s in range(len(steps))
        ]
        for t, steps in enumerate(facts["steps_masks"].values())
    ]
    return frames, targets, facts["results"], values


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_reference(reference, name):
    frames, targets, results, _ = reference
    loss = MultiStepLoss(**OPTIONS[name])
    found = loss(frames, targets)
    weights = (loss.mask_weight, loss.dice_weight, loss.iou_weight, loss.score_weight)
    for (ours, theirs), weight in zip(NAMES.items(), weights, strict=True):
        assert found[ours].item() == pytest.approx(weight * results[name]["total"][theirs], rel=1e-5)
    assert sum(found.values()).item() == pytest.approx(results[name]["total"]["core_loss"], rel=1e-5)
    for predictions, target, expected in zip(frames, targets, results[name]["per_frame"], strict=True):
        one = loss([predictions], target[None])
        assert sum(one.values()).item() == pytest.approx(expected["core_loss"], rel=1e-5)


def test_gradients_equal_reference(reference):
    frames, targets, _, values = reference
    sum(MultiStepLoss()(frames, targets).values()).backward()
    for t, predictions in enumerate(frames):
        for s, prediction in enumerate(predictions):
            for name, tensor in zip(("masks", "ious", "scores"), prediction, strict=True):
                expected = torch.from_numpy(values[f"frame{t}/step{s}/grad_{name}"])
                assert_close(tensor.grad, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def prediction(count=2, candidates=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    masks = torch.randn(count, candidates, 8, 8, generator=draw)
    ious, scores = (torch.rand(count, n, generator=draw) for n in (candidates, 1))
    return Prediction(masks.requires_grad_(), ious.requires_grad_(), scores.requires_grad_())


def test_an_absent_object_trains_its_score_alone():
    one = prediction()
    targets = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    targets[0, 1, 2:5, 2:5] = True
    sum(MultiStepLoss()([[one]], targets).values()).backward()
    assert not one.masks.grad[0].any()
    assert not one.ious.grad[0].any()
    assert one.masks.grad[1].any()
    assert one.scores.grad.all()


def test_one_candidate_of_each_object_is_trained():
    one = prediction()
    targets = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    sum(MultiStepLoss()([[one]], targets).values()).backward()
    assert [int(object_grad.flatten(1).any(1).sum()) for object_grad in one.masks.grad] == [1, 1]
    assert one.ious.grad.all()


def test_objects_are_counted_once_and_frames_and_steps_add_up():
    targets = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    loss = MultiStepLoss()
    once = loss([[prediction()]], targets)
    steps = loss([[prediction(), prediction()]], targets)
    frames = loss([[prediction()], [prediction()]], targets.expand(2, -1, -1, -1))
    for name, value in once.items():
        assert_close(steps[name], 2 * value)
        assert_close(frames[name], 2 * value)
    both = Prediction(*(torch.cat([x, x]) for x in prediction()))
    for name, value in loss([[both]], targets.repeat(1, 2, 1, 1)).items():
        assert_close(value, once[name])


def test_losses_of_bfloat16_predictions_are_float32():
    half = Prediction(*(x.detach().bfloat16() for x in prediction()))
    targets = torch.ones(1, 2, 8, 8, dtype=torch.bool)
    for name, value in MultiStepLoss()([[half]], targets).items():
        assert value.dtype == torch.float32
        assert_close(value, MultiStepLoss()([[Prediction(*(x.float() for x in half))]], targets)[name])
