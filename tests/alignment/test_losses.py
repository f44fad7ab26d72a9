"""Losses of alignment against straightforward references in double precision, and what must not change them."""

import pytest
import torch

from pe_spatial.alignment import losses
from pe_spatial.alignment.losses import pairwise_similarity, token_cosine


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    student, same, masks = (
        torch.randn(2, 12, width, generator=generator, dtype=torch.float64) for width in (7, 7, 30)
    )  # fmt: skip
    return student.requires_grad_(), same, masks


def reference_similarity(student, teacher, sharpness):
    """The paper's equation, one pair of tokens after the other."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        for i in range(len(s)):
            for j in range(len(s)):
                target = torch.cosine_similarity(t[i], t[j], dim=0)
                if sharpness is not None:
                    target = torch.exp(sharpness * (target - 1))
                total = total + (torch.cosine_similarity(s[i], s[j], dim=0) - target) ** 2
    return total / (len(student) * student.shape[1] ** 2)


def gradient(loss, x):
    return torch.autograd.grad(loss, x)[0]


def test_token_cosine_is_the_mean_over_all_tokens(tokens):
    student, teacher, _ = tokens
    expected = (
        -sum(
            torch.cosine_similarity(a, b, dim=0)
            for a, b in zip(student.flatten(0, 1), teacher.flatten(0, 1), strict=True)
        )
        / student[..., 0].numel()
    )
    loss = token_cosine(student, teacher)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student), rtol=0, atol=1e-12)
    assert token_cosine(teacher, 3 * teacher) == pytest.approx(-1)


@pytest.mark.parametrize("sharpness", [20.0, 3.0, None])
@pytest.mark.parametrize("block", [1, 2 * 12 * 5, 2**24])
def test_pairwise_similarity_equals_the_sum_over_pairs_in_blocks_of_any_size(tokens, sharpness, block, monkeypatch):
    monkeypatch.setattr(losses, "_BLOCK", block)
    student, _, masks = tokens
    expected = reference_similarity(student, masks, sharpness)
    loss = pairwise_similarity(student, masks, sharpness=sharpness)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient(loss, student), gradient(expected, student), rtol=0, atol=1e-12)
    single = pairwise_similarity(student.float(), masks.float(), sharpness=sharpness)
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=1e-6)


def test_scale_of_features_and_order_of_prompts_change_nothing(tokens):
    student, teacher, masks = tokens
    scales = torch.rand(2, 12, 1, dtype=torch.float64) + 0.5
    order = torch.randperm(30)
    for before, after in (
        (token_cosine(student, teacher), token_cosine(student * scales, teacher * scales.flip(1))),
        (pairwise_similarity(student, masks), pairwise_similarity(student * scales, masks[..., order] * scales)),
    ):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-12)
    moved = torch.randperm(12)
    assert pairwise_similarity(student, masks) == pairwise_similarity(student, masks, sharpness=20.0)  # the paper's t
    both = pairwise_similarity(student[:, moved], masks[:, moved])
    torch.testing.assert_close(both, pairwise_similarity(student, masks), rtol=0, atol=1e-12)


def test_no_matrix_of_all_pairs_exists(monkeypatch):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.size = max(self.size, out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    monkeypatch.setattr(losses, "_BLOCK", 2**10)
    student = torch.randn(2, 256, 4, requires_grad=True)
    with Largest() as seen:
        pairwise_similarity(student, torch.randn(2, 256, 3)).backward()
    assert seen.size <= max(2**10, student.numel())
    assert student.grad.abs().sum() > 0


def test_half_precision_is_computed_in_single(tokens):
    student, teacher, masks = (x.detach().bfloat16().requires_grad_() for x in tokens)
    with torch.autocast("cpu", torch.bfloat16):
        loss = token_cosine(student, teacher) + pairwise_similarity(student, masks)
    assert loss.dtype == torch.float32
    expected = token_cosine(student.double(), teacher.double()) + pairwise_similarity(student.double(), masks.double())
    torch.testing.assert_close(loss.double(), expected, rtol=0, atol=1e-6)
    assert teacher.grad is masks.grad is None


def test_other_shapes_are_refused_with_both():
    with pytest.raises(ValueError, match=r"\(1, 4, 3\) and teacher \(1, 4, 5\)"):
        token_cosine(torch.ones(1, 4, 3), torch.ones(1, 4, 5))
    with pytest.raises(ValueError, match=r"\(1, 4\) and \(1, 5\)"):
        pairwise_similarity(torch.ones(1, 4, 3), torch.ones(1, 5, 3))
