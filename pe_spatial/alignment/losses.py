"""Losses of spatial alignment and of distillation, on the tokens of a student and a frozen teacher.

Shapes: B images, N tokens of a grid, C channels of the student, M of the teacher (features or one mask per prompt).
Sources: the PE paper (arXiv 2504.13181), section 5.2, equations 2 and 3; NeurIPS version, appendix E.3. The authors
published no code.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SHARPNESS = 20.0
"""t of the paper's g(x) = exp(t (x - 1))."""

_BLOCK = 2**24  # similarities of all images that exist at the same time: 64 MB in float32


def token_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the negative cosine of tokens (B, N, C) of both, averaged over all tokens: between -1 and 1.

    The paper's self-distillation, the teacher being an inner layer of the frozen encoder; and the direct distillation
    of features, the student's being mapped to the teacher's width.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"student is {tuple(student.shape)} and teacher {tuple(teacher.shape)}; they must be the same")
    return -(_directions(student) * _directions(teacher.detach())).sum(-1).mean()


def pairwise_similarity(student: Tensor, teacher: Tensor, *, sharpness: float | None = SHARPNESS) -> Tensor:
    """Return the mean squared difference of two matrices of cosines between all pairs of an image's tokens.

    The matrices are never complete: blocks of rows exist one at a time, in the backward pass none.

    Args:
        student: tokens (B, N, C).
        teacher: tokens (B, N, M); the order of the M channels, and any common factor of them, do not matter.
        sharpness: t of g(x) = exp(t (x - 1)), which is applied to the teacher's cosines alone, as in the paper's
            locality loss; None compares the cosines themselves, as in distillation from PE-Spatial.
    """
    if student.shape[:2] != teacher.shape[:2]:
        counts = f"{tuple(student.shape[:2])} and {tuple(teacher.shape[:2])}"
        raise ValueError(f"(images, tokens) of student and teacher are {counts}; they must be the same")
    return _PairwiseSimilarity.apply(_directions(student), _directions(teacher.detach()), sharpness)


def _directions(tokens: Tensor) -> Tensor:
    """Return tokens of length 1, in float32 at least."""
    return F.normalize(tokens if tokens.dtype == torch.float64 else tokens.float(), dim=-1)


class _PairwiseSimilarity(torch.autograd.Function):
    """Both matrices are symmetric, so that a block of rows of their difference D gives these rows of the gradient.

    L = sum(D²) / (B N²) with D = S Sᵀ - G, hence dL/dS = 4 D S / (B N²).
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, sharpness: float | None) -> Tensor:
        batch, count = student.shape[:2]
        gradient = torch.empty_like(student) if student.requires_grad else None
        total = student.new_zeros(())
        with torch.autocast(student.device.type, enabled=False):
            for start in range(0, count, rows := max(1, _BLOCK // (batch * count))):
                block = slice(start, start + rows)
                target = teacher[:, block] @ teacher.mT  # (B, rows, N)
                if sharpness is not None:
                    target = target.sub_(1).mul_(sharpness).exp_()
                difference = (student[:, block] @ student.mT).sub_(target)
                if gradient is not None:
                    gradient[:, block] = difference @ student
                total += difference.square_().sum()
        pairs = batch * count**2
        if gradient is not None:
            ctx.save_for_backward(gradient.mul_(4 / pairs))
        return total / pairs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0], None, None
