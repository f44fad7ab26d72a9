"""Cheap probes of frozen features: linear maps by least squares, and correspondence of an image with its warp.

A linear probe has one solution, which needs no learning rate and no schedule, so that layers, sizes and geometries can
be compared in seconds. Scores are below those of probes that are trained on augmented images.

Shapes: N patches of all images, C channels, K outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_spatial.alignment.material import NO_CLASS

DECAY = 0.01
"""Weight of the penalty, relative to the variance of each channel."""

PART = 0.05
"""Part of the longer side within which a match counts as right."""


class LeastSquares:
    """A linear map with offset from features to outputs; images are added one after the other."""

    def __init__(self) -> None:
        self._sums: list[Tensor] = []
        self._solution: tuple[Tensor, Tensor] | None = None

    def add(self, features: Tensor, targets: Tensor, weights: Tensor) -> None:
        """Add patches (N, C) with targets (N, K) and weights (N,), such as how much of a patch is labeled."""
        x, y, w = (value.double() for value in (features, targets, weights))
        scaled = x * w[:, None]
        sums = [w.sum(), scaled.sum(0), (y * w[:, None]).sum(0), scaled.T @ x, scaled.T @ y]
        self._sums = [a + b for a, b in zip(self._sums, sums, strict=True)] if self._sums else sums

    def solve(self) -> None:
        """Find the map; called once, after all images were added."""
        count, x, y, xx, xy = self._sums
        count = count.clamp_min(1e-9)
        mean_x, mean_y = x / count, y / count
        covariance = xx / count - mean_x[:, None] * mean_x
        variance = covariance.diagonal().clamp_min(1e-12)
        system = covariance + torch.diag(DECAY * variance)
        weight = torch.linalg.solve(system, xy / count - mean_x[:, None] * mean_y)
        self._solution = weight.float(), (mean_y - mean_x @ weight).float()
        self._mean = mean_y.float()

    def __call__(self, features: Tensor) -> Tensor:
        """(N, C) -> (N, K)."""
        assert self._solution is not None, "solve comes first"
        weight, offset = self._solution
        return features.float() @ weight + offset

    def balanced(self, features: Tensor) -> Tensor:
        """(N, C) -> parts of classes (N, K) over the square roots of their frequencies, so that rare ones win too."""
        return self(features).clamp_min(0) / self._mean.clamp_min(1e-4).sqrt()


def pool_classes(classes: np.ndarray, number: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the part of each patch that each class has (h w, number), and the part that is labeled (h w,)."""
    labels = torch.from_numpy(classes.astype(np.int64))
    known = labels != NO_CLASS
    if known.any() and int(labels[known].max()) >= number:
        raise ValueError(f"a label is {int(labels[known].max())}, and there are {number} classes")
    one_hot = F.one_hot(labels.where(known, torch.zeros(())).long(), number).movedim(-1, 0).float() * known
    pooled = F.adaptive_avg_pool2d(torch.cat((one_hot, known[None].float())), grid).flatten(1).T
    return pooled[:, :-1] / pooled[:, -1:].clamp_min(1e-6), pooled[:, -1]


def pool_depth(depth: np.ndarray, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Return the mean logarithm of the depth of each patch (h w, 1), and the part with a depth (h w,)."""
    meters = torch.from_numpy(np.ascontiguousarray(depth))
    known = meters > 0
    values = torch.stack((meters.clamp_min(1e-3).log() * known, known.float()))
    total, part = F.adaptive_avg_pool2d(values, grid).flatten(1)
    return (total / part.clamp_min(1e-6))[:, None], part


def to_pixels(outputs: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(h w, K) -> (K, H, W), by bilinear interpolation."""
    maps = outputs.T.unflatten(1, grid)[None]
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)[0]


def count_confusion(predicted: Tensor, classes: np.ndarray, number: int) -> Tensor:
    """Return how many pixels of each true class (rows) got each predicted one (number, number)."""
    truth = torch.from_numpy(classes.astype(np.int64)).flatten()
    known = truth != NO_CLASS
    pairs = truth[known] * number + predicted.flatten().cpu()[known]
    return torch.bincount(pairs, minlength=number**2).unflatten(0, (number, number))


def mean_iou(confusion: Tensor) -> float:
    """Return the mean over the classes that occur, in percent."""
    both = confusion.diagonal().double()
    either = confusion.sum(0) + confusion.sum(1) - both
    occurs = confusion.sum(1) > 0
    return float(100 * (both / either.clamp_min(1))[occurs].mean())


def random_warp(size: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    """Return the matrix (2, 3) that turns, scales, stretches and moves an image of `size` (H, W) about its center."""
    height, width = size
    angle, scale = np.deg2rad(generator.uniform(-30, 30)), np.exp(generator.uniform(-0.3, 0.3))
    stretch = np.diag(np.exp(generator.uniform(-0.1, 0.1, 2)))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    linear = scale * turn @ stretch
    center = np.array([width, height]) / 2
    moved = center + generator.uniform(-0.1, 0.1, 2) * [width, height]
    return np.concatenate((linear, (moved - linear @ center)[:, None]), axis=1)


def warp_image(rgb: np.ndarray, warp: np.ndarray) -> np.ndarray:
    """Return the warped image of the same size; outside, it is mirrored."""
    return cv2.warpAffine(
        rgb, warp, (rgb.shape[1], rgb.shape[0]), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101
    )


def matched(before: Tensor, after: Tensor, warp: np.ndarray, size: Sequence[int]) -> Tensor:
    """Return for each patch of `before` that the warp keeps inside whether its nearest patch of `after` is right.

    Maps are (C, h, w), of an image of `size` (H, W) before and after the warp.
    """
    grid, (height, width) = (before.shape[-2], before.shape[-1]), size
    y, x = torch.meshgrid(*((torch.arange(n) + 0.5) * s / n for n, s in zip(grid, size, strict=True)), indexing="ij")
    at = torch.stack((x, y), dim=-1).flatten(0, 1).double()
    matrix = torch.from_numpy(warp)
    true = at @ matrix[:, :2].T + matrix[:, 2]
    inside = ((true >= 0) & (true < torch.tensor([width, height]))).all(1)
    a, b = (F.normalize(maps.flatten(1).T.float(), dim=1) for maps in (before, after))
    nearest = (a[inside.to(a.device)] @ b.T).argmax(1).cpu()
    return (at[nearest] - true[inside]).norm(dim=1) <= PART * max(size)
