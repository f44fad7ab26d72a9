"""Losses of depth: reference values and gradients, missing pixels, precision, ranks."""

import math
import os

import numpy as np
import pytest
import torch

pytest.importorskip("mmengine")
from helpers.golden import read_arrays, read_json
from helpers.processes import start
from mmengine.registry import MODELS

from pe_spatial.depth.losses import GradientLoss, ScaleAndShiftInvariantLoss, SigLoss, SiLog
from pe_spatial.errors import ConfigError

pytest.importorskip("mmseg")  # which pe_spatial.depth as a whole needs
pytestmark = pytest.mark.mmseg
LOSSES = {
    "sig": lambda: SigLoss(warm_up=0),
    "sig_warm_up": SigLoss,
    "gradient": GradientLoss,
    "silog": SiLog,
    "silog_variance": lambda: SiLog(variance_focus=1.0),
    "ssi_disparity": ScaleAndShiftInvariantLoss,
    "ssi_depth": lambda: ScaleAndShiftInvariantLoss(space="depth"),
}


@pytest.fixture(scope="module")
def reference(golden):
    folder = golden / "depth"
    return read_arrays(folder / "losses.npz"), read_json(folder / "losses.json")


def value_and_gradient(loss, pred, target):
    pred = torch.as_tensor(pred).clone().requires_grad_()
    value = loss(pred, torch.as_tensor(target))
    value.backward()
    return value.item(), pred.grad


@pytest.mark.parametrize(
    ("name", "loss"),
    [
        ("dinov2_sigloss", SigLoss(warm_up=0)),
        ("dinov2_sigloss_max10", SigLoss(warm_up=0, max_depth=10)),
        ("dinov2_sigloss_weight10", SigLoss(warm_up=0, loss_weight=10)),
        ("dinov2_sigloss_warm_up", SigLoss()),
        ("dinov3_sigloss", SigLoss(warm_up=0)),
        ("dinov3_sigloss_warm_up", SigLoss()),
        ("dinov3_gradient_log_loss", GradientLoss()),
        ("dinov3_gradient_loss", GradientLoss(log=False)),
        ("mmseg_silog", SiLog()),
    ],
)
def test_value_and_gradient_of_the_reference(reference, name, loss):
    arrays, values = reference
    value, gradient = value_and_gradient(loss, arrays["pred"], arrays["gt"])
    assert value == pytest.approx(values[name], abs=1e-6)
    torch.testing.assert_close(gradient, torch.from_numpy(arrays[f"grad/{name}"]), rtol=1e-4, atol=1e-8)


def test_dinov2s_gradient_loss_on_single_images(reference):
    arrays, values = reference
    pred, gt = (torch.from_numpy(arrays[key]) for key in ("pred", "gt"))
    for max_depth, suffix in ((None, ""), (10, "_max10")):
        loss = GradientLoss(max_depth=max_depth)
        each = [loss(p[None], g[None]).item() for p, g in zip(pred, gt, strict=True)]
        assert each == pytest.approx(values[f"dinov2_gradientloss_per_image{suffix}"], abs=1e-6)
    images = pred.clone().requires_grad_()
    torch.stack([GradientLoss()(p[None], g[None]) for p, g in zip(images, gt, strict=True)]).mean().backward()
    expected = torch.from_numpy(arrays["grad/dinov2_gradientloss_image_mean"])
    torch.testing.assert_close(images.grad, expected, rtol=1e-4, atol=1e-8)


def test_dinov2s_training_loss_is_ours_along_batch_and_channel(reference):
    """What DINOv2 trained with: each pixel's values over the batch as if they were an image of one column."""
    arrays, values = reference
    pred, gt = (torch.from_numpy(arrays[key]).permute(2, 3, 0, 1).flatten(0, 1)[:, None] for key in ("pred", "gt"))
    assert GradientLoss()(pred, gt).item() == pytest.approx(
        values["dinov2_gradientloss_batch_tensor"], abs=1e-6
    )
    assert GradientLoss()(pred[:, :, :2], gt[:, :, :2]).item() == 0  # two images a device, as in its recipe


def test_recipe_of_dinov2_before_and_after_the_warm_up(reference):
    arrays, values = reference
    pred, gt = (torch.from_numpy(arrays[key]) for key in ("pred", "gt"))
    released = values["dinov2_gradientloss_batch_tensor"]
    loss = SigLoss(warm_up=2)
    got = [loss(pred, gt).item() + 0.5 * released for _ in range(3)]
    expected = [values[f"dinov2_recipe_total_{when}"] for when in ("warm_up", "warm_up", "after_warm_up")]
    assert got == pytest.approx(expected, abs=1e-6)


def test_warm_up_lasts_100_training_calls_and_is_in_the_checkpoint(reference):
    pred, gt = (torch.from_numpy(reference[0][key])[:, :, ::8, ::8] for key in ("pred", "gt"))
    loss = SigLoss()
    first = loss(pred, gt)
    loss.eval()
    for _ in range(200):
        loss(pred, gt)
    loss.train()
    for _ in range(98):
        loss(pred, gt)
    resumed = SigLoss()
    resumed.load_state_dict(loss.state_dict())
    assert resumed(pred, gt) == first  # the 100th
    assert resumed(pred, gt) > 2 * first


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_valid_gives_zero_with_a_zero_gradient(name):
    pred = torch.rand(2, 1, 12, 16) + 0.1
    assert value_and_gradient(LOSSES[name](), pred, torch.zeros_like(pred)) == (0, pytest.approx(0))
    far = torch.full_like(pred, 20.0)
    assert value_and_gradient(SigLoss(max_depth=10), pred, far) == (0, pytest.approx(0))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("pixels", [1, 2])
def test_few_valid_pixels_give_finite_values_and_gradients(name, pixels):
    pred = torch.rand(2, 1, 12, 16) + 0.1
    target = torch.zeros_like(pred)
    target[1, 0, 3, :pixels] = 2.0
    value, gradient = value_and_gradient(LOSSES[name](), pred, target)
    assert math.isfinite(value)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_perfect_prediction_costs_nothing_and_has_a_finite_gradient(name):
    target = torch.rand(2, 1, 12, 16) + 1
    if name == "ssi_disparity":
        value, gradient = value_and_gradient(LOSSES[name](), 1 / target, target)
    else:
        value, gradient = value_and_gradient(LOSSES[name](), target, target)
    assert value == pytest.approx(0, abs=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_missing_pixels_do_not_matter(name):
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 12, 16) + 0.5, torch.rand(2, 1, 12, 16) + 1
    target[:, :, 4:8, ::2] = 0
    value, gradient = value_and_gradient(LOSSES[name](), pred, target)
    other = torch.where(target > 0, pred, torch.full_like(pred, 1e4))
    assert LOSSES[name]()(other, target).item() == pytest.approx(value, rel=1e-5)
    assert gradient[target == 0].abs().max() == 0
    for nothing in (0.0, -1.0):  # not even where the prediction has no logarithm
        value, gradient = value_and_gradient(LOSSES[name](), torch.where(target > 0, pred, nothing), target)
        assert math.isfinite(value)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", LOSSES)
def test_float32_under_autocast(name):
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 12, 16) + 0.5, torch.rand(2, 1, 12, 16) + 1
    with torch.autocast("cpu", torch.bfloat16):
        value = LOSSES[name]()(pred.bfloat16(), target)
    assert value.dtype == torch.float32
    assert value == LOSSES[name]()(pred.bfloat16().float(), target)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"\(1, 1, 4, 4\) and the target \(1, 1, 4, 5\); resize"):
        SigLoss()(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 4, 5))


def test_silog_is_that_of_each_image_and_leaves_empty_images_out():
    torch.manual_seed(0)
    pred, target = torch.rand(3, 1, 12, 16) + 0.5, torch.rand(3, 1, 12, 16) + 1
    target[1] = 0
    expected = [SiLog()(pred[i : i + 1], target[i : i + 1]).item() for i in (0, 2)]
    assert SiLog()(pred, target).item() == pytest.approx(np.mean(expected))
    assert SiLog(variance_focus=1)(3 * target, target).item() == pytest.approx(0, abs=1e-3)  # blind to the scale
    assert SiLog(variance_focus=0)(3 * target, target).item() == pytest.approx(math.log(3))
    with pytest.raises(ConfigError, match="variance_focus is 2"):
        SiLog(variance_focus=2)


@pytest.mark.parametrize("space", ["disparity", "depth"])
def test_scale_and_shift_do_not_matter(space):
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 24, 16, dtype=torch.float64), torch.rand(2, 1, 24, 16) + 1
    target[0, :, :9] = 0
    loss = ScaleAndShiftInvariantLoss(space=space)
    value, gradient = value_and_gradient(loss, pred, target)
    factors = torch.tensor([3.0, -0.2]).view(2, 1, 1, 1)  # of each image its own
    assert loss(factors * pred + 7, target).item() == pytest.approx(value, rel=1e-4)
    for image, direction in ((0, torch.ones_like(pred)), (1, pred)):  # no slope along shift and scale
        slope = (gradient * direction)[image].sum()
        assert abs(slope) < 1e-4 * (gradient * direction)[image].abs().sum()


@pytest.mark.parametrize("space", ["disparity", "depth"])
def test_scale_and_shift_invariant_loss_equals_a_plain_computation(space):
    rng = np.random.default_rng(0)
    pred, target = rng.uniform(0.1, 1, (2, 20, 17)), rng.uniform(1, 5, (2, 20, 17))
    target[:, 3:9, 5:9] = 0
    valid = target > 0
    truth = np.where(valid, 1 / np.where(valid, target, 1), 0) if space == "disparity" else target
    square = slopes = 0.0
    residuals = []
    for p, t, v in zip(pred, truth, valid, strict=True):
        system = np.stack([p[v], np.ones(v.sum())], 1)
        (scale, shift), *_ = np.linalg.lstsq(system, t[v], rcond=None)
        residuals.append(scale * p + shift - t)
        square += (residuals[-1][v] ** 2).sum()
    for stride in (1, 2, 4, 8):
        total = 0.0
        for r, v in zip(residuals, valid, strict=True):
            r, v = r[::stride, ::stride], v[::stride, ::stride]
            total += np.abs(np.diff(r, axis=0))[v[1:] & v[:-1]].sum()
            total += np.abs(np.diff(r, axis=1))[v[:, 1:] & v[:, :-1]].sum()
        slopes += total / valid[:, ::stride, ::stride].sum()
    expected = square / (2 * valid.sum()) + 0.5 * slopes
    loss = ScaleAndShiftInvariantLoss(space=space)
    got = loss(torch.from_numpy(pred)[:, None], torch.from_numpy(target)[:, None])
    assert got.item() == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ConfigError, match="space is 'log'"):
        ScaleAndShiftInvariantLoss(space="log")


def two_ranks(rank, folder, pred, target):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    mine = pred[rank : rank + 1].clone().requires_grad_()
    for across_ranks in (True, False):
        mine.grad = None
        value = SigLoss(warm_up=0, across_ranks=across_ranks)(mine, target[rank : rank + 1])
        value.backward()
        torch.save((value.item(), mine.grad), os.path.join(folder, f"{rank}_{across_ranks}.pt"))
    torch.distributed.destroy_process_group()


def test_statistics_across_ranks_make_the_loss_that_of_the_whole_batch(tmp_path):
    torch.manual_seed(0)
    pred, target = torch.rand(2, 1, 8, 8) + 0.5, torch.rand(2, 1, 8, 8) + 1
    target[0, :, :5] = 0
    start(two_ranks, (str(tmp_path), pred, target), number=2)
    value, gradient = value_and_gradient(SigLoss(warm_up=0), pred, target)
    for rank in (0, 1):
        got, slope = torch.load(tmp_path / f"{rank}_True.pt")
        assert got == pytest.approx(value, rel=1e-5)
        # DDP halves what each of two ranks brings
        torch.testing.assert_close(slope / 2, gradient[rank : rank + 1], rtol=1e-4, atol=1e-8)
        alone = SigLoss(warm_up=0)(pred[rank : rank + 1], target[rank : rank + 1])
        assert torch.load(tmp_path / f"{rank}_False.pt")[0] == pytest.approx(alone.item())


def test_registered():
    loss = MODELS.build(dict(type="SigLoss", warm_up=0, max_depth=10, loss_weight=2.0))
    assert repr(loss) == "SigLoss(max_depth=10, loss_weight=2.0, across_ranks=False, warm_up=0)"
    for name in ("GradientLoss", "SiLog", "ScaleAndShiftInvariantLoss"):
        assert name in repr(MODELS.build(dict(type=name)))
