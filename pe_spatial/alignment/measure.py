"""Scores of every layer of a frozen encoder by cheap probes: segmentation, depth, tracking, correspondence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from pe_spatial.alignment.material import Example, Material
from pe_spatial.alignment.probes import (
    LeastSquares,
    count_confusion,
    matched,
    mean_iou,
    pool_classes,
    pool_depth,
    random_warp,
    to_pixels,
    warp_image,
)
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.features.extract import fit_size
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.jandf import boundary_f, region_similarity
from pe_spatial.tracking.vos.masks import read_mask
from pe_spatial.tracking.zero_shot import ZeroShotTracker

METRICS = {"segmentation": "mIoU", "depth": "rmse", "tracking": "J&F", "correspondence": "matches"}
"""What is measured by task: percent, meters, percent, percent."""

HIGHER_IS_BETTER = {"mIoU": True, "rmse": False, "J&F": True, "matches": True}

Scores = dict[int, dict[str, float]]
"""Layer -> metric -> value."""

_WARPS = 2  # of each image


@dataclass(frozen=True)
class Encoding:
    """An encoder as the probes see it.

    Args:
        maps: images (1, 3, H, W), RGB in [0, 255], sides in whole patches -> a map (1, C, h, w) for each layer.
        layers: their numbers, 0-based.
        config, patch_size: of the encoder.
        device: where images go.
    """

    maps: Callable[[Tensor], Sequence[Tensor]]
    layers: Sequence[int]
    config: Any
    patch_size: int
    device: torch.device | str = "cpu"

    def encode(self, rgb: np.ndarray, long_side: int) -> list[Tensor]:
        """Resize (H, W, 3) uint8 to a longer side of `long_side` pixels; return a map (C, h, w) for each layer."""
        height, width = fit_size(rgb.shape[:2], long_side, self.patch_size)
        resized = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
        images = torch.from_numpy(resized).to(self.device).permute(2, 0, 1)[None].float()
        with torch.no_grad():
            return [maps[0].float() for maps in self.maps(images)]


def encoding_of(encoder: Any, device: str = "cpu") -> Encoding:
    """Return an encoder of this project, in evaluation mode, as the probes see it."""
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (encoder.config.mean, encoder.config.std))

    def maps(images: Tensor) -> Sequence[Tensor]:
        return encoder((images - mean) / std)

    return Encoding(maps, tuple(encoder.out_indices), encoder.config, encoder.patch_size, device)


def check_tasks(material: Material, tasks: Sequence[str]) -> None:
    """Raise ConfigError for a task that `material` has no labels for; correspondence needs images alone."""
    allowed = (*material.tasks, *(["correspondence"] if material.val else []))
    unknown = [task for task in tasks if task not in allowed]
    if unknown:
        raise ConfigError(f"the data has no labels for {', '.join(unknown)}; it allows {', '.join(material.tasks)}")


def measure(
    encoding: Encoding,
    material: Material,
    *,
    size: int,
    tasks: Sequence[str] | None = None,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Scores:
    """Return the scores of every layer.

    Args:
        encoding: of a frozen encoder.
        material: what to measure on.
        size: longer side of the images, in pixels; for tracking the shorter one.
        tasks: some of `material.tasks`; None for all.
        progress: wraps an iteration over images and clips.
    """
    chosen = tuple(material.tasks if tasks is None else tasks)
    check_tasks(material, chosen)
    scores: Scores = {layer: {} for layer in encoding.layers}
    found = []
    if {"segmentation", "depth"} & set(chosen):
        found.append(_probe(encoding, material, size, chosen, progress))
    if "correspondence" in chosen:
        found.append(_correspond(encoding, material.val, size, progress))
    if "tracking" in chosen:
        found.append(_track(encoding, material.clips, size, progress))
    for values in found:
        for layer in scores:
            scores[layer].update(values[layer])
    return scores


def _targets(example: Example, task: str, classes: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    if task == "segmentation":
        assert example.classes is not None
        return pool_classes(example.classes(), classes, grid)
    assert example.depth is not None
    return pool_depth(example.depth(), grid)


def _probe(encoding: Encoding, material: Material, size: int, tasks: Sequence[str], progress: Any) -> Scores:
    tasks = [task for task in ("segmentation", "depth") if task in tasks]
    probes = {(layer, task): LeastSquares() for layer in encoding.layers for task in tasks}
    for example in progress(material.train):
        maps = encoding.encode(example.rgb(), size)
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        for task in tasks:
            targets, weights = (x.to(maps[0].device) for x in _targets(example, task, material.classes, grid))
            for layer, one in zip(encoding.layers, maps, strict=True):
                probes[layer, task].add(one.flatten(1).T, targets, weights)
    for probe in probes.values():
        probe.solve()
    confusion = {layer: torch.zeros(material.classes, material.classes) for layer in encoding.layers}
    squares = {layer: np.zeros(2) for layer in encoding.layers}
    for example in progress(material.val):
        maps = encoding.encode(example.rgb(), size)
        grid = (maps[0].shape[-2], maps[0].shape[-1])
        classes = example.classes() if "segmentation" in tasks and example.classes else None
        depth = example.depth() if "depth" in tasks and example.depth else None
        for layer, one in zip(encoding.layers, maps, strict=True):
            tokens = one.flatten(1).T
            if classes is not None:
                out = to_pixels(probes[layer, "segmentation"].balanced(tokens), grid, classes.shape)
                confusion[layer] += count_confusion(out.argmax(0), classes, material.classes)
            if depth is not None:
                meters = to_pixels(probes[layer, "depth"](tokens), grid, depth.shape)[0].exp().cpu().numpy()
                known = depth > 0
                squares[layer] += [np.square(meters - depth)[known].sum(dtype=np.float64), known.sum()]
    scores: Scores = {layer: {} for layer in encoding.layers}
    for layer, values in scores.items():
        if "segmentation" in tasks:
            values["mIoU"] = mean_iou(confusion[layer])
        if "depth" in tasks:
            values["rmse"] = float(np.sqrt(squares[layer][0] / max(squares[layer][1], 1)))
    return scores


def _correspond(encoding: Encoding, examples: Sequence[Example], size: int, progress: Any) -> Scores:
    right: dict[int, list[Tensor]] = {layer: [] for layer in encoding.layers}
    for number, example in enumerate(progress(examples)):
        rgb = example.rgb()
        before = encoding.encode(rgb, size)
        for repetition in range(_WARPS):
            warp = random_warp(rgb.shape[:2], np.random.default_rng((number, repetition)))
            after = encoding.encode(warp_image(rgb, warp), size)
            for layer, a, b in zip(encoding.layers, before, after, strict=True):
                right[layer].append(matched(a, b, warp, rgb.shape[:2]))
    return {layer: {"matches": float(100 * torch.cat(values).float().mean())} for layer, values in right.items()}


class _Given(nn.Module):
    """An `Encoding` in the place of a tracker's backbone, which gets normalized images."""

    def __init__(self, encoding: Encoding) -> None:
        super().__init__()
        self.encoding, self.config, self.patch_size = encoding, encoding.config, encoding.patch_size
        self.out_indices = tuple(encoding.layers)
        self.mean, self.std = (torch.tensor(x)[:, None, None] for x in (self.config.mean, self.config.std))

    def init_weights(self) -> None:
        """Do nothing: the weights are there."""

    def forward(self, images: Tensor) -> Sequence[Tensor]:
        return [
            maps.float()
            for maps in self.encoding.maps(images * self.std.to(images.device) + self.mean.to(images.device))
        ]


def _track(encoding: Encoding, clips: Sequence[Clip], size: int, progress: Any) -> Scores:
    tracker = ZeroShotTracker(dict(type=_Given, encoding=encoding), protocol="aligned", size=size)
    tracker.to(encoding.device)
    values: dict[int, list[float]] = {layer: [] for layer in encoding.layers}
    for clip in progress(clips):
        for layer, value in _score_clip(tracker, clip).items():
            values[layer] += value
    if not values[encoding.layers[0]]:
        raise DatasetError("no clip has a frame with a mask between its first and its last; give more annotated frames")
    return {layer: {"J&F": float(100 * np.mean(x))} for layer, x in values.items()}


def _score_clip(tracker: ZeroShotTracker, clip: Clip) -> dict[int, list[float]]:
    """Return J&F of each object for each layer, over the annotated frames between the first and the last."""
    first, frames = clip.load()
    assert clip.mask is not None
    ids = np.setdiff1d(first, [0])
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in tracker.backbone.out_indices}
    for number, (name, masks) in enumerate(tracker.track(frames, first)):
        path = clip.mask.with_name(f"{name}.png")
        if not 0 < number < len(clip) - 1 or not path.is_file():
            continue
        truth = read_mask(path)[None] == ids[:, None, None]
        for layer, mask in zip(found, masks, strict=True):
            guess = mask[None] == ids[:, None, None]
            found[layer].append((region_similarity(truth, guess) + boundary_f(truth, guess)) / 2)
    return {layer: list(np.mean(x, axis=0)) if x else [] for layer, x in found.items()}
