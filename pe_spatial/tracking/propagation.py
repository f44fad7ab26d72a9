"""Label propagation: the mask of the first frame, carried through a video by the similarity of frozen features.

The results follow facebookresearch/dino@7c446df:eval_video_segmentation.py (Apache-2.0), the script behind the
published DAVIS scores of PE; the computation differs.

Shapes: h x w patches on the grid, C channels of the features, K labels (background and objects).
"""

from itertools import accumulate, repeat

import torch
import torch.nn.functional as F
from torch import Tensor

SHAPES = ("square", "circle")
_TILE = 16  # side of the blocks of queries in patches: smaller ones copy more, larger ones multiply more for nothing


class LabelPropagation:
    """Soft masks of a video, frame by frame: `start` with the first frame, then `step` with each following one.

    Every patch of a new frame gets the mean label of its most similar patches in the first frame and in the last
    `context` frames, weighted by softmax(cosine / temperature). Memory and time per frame do not depend on the number
    of frames and, with a radius, only on the neighborhood of each patch.

    Args:
        context: number of frames remembered beside the first one, at least 1.
        radius: radius in patches of the neighborhood in which patches are compared, in every frame; None compares all
            patches (0 in the script).
        shape: shape of the neighborhood: 'square' (as in the script) or 'circle' (as in DINOv3's evaluation).
        topk: number of most similar patches, over all frames together; ties with the last one count too.
        temperature: temperature of the softmax; 0.1 in the script.
    """

    def __init__(
        self,
        *,
        context: int = 7,
        radius: int | None = 12,
        shape: str = "square",
        topk: int = 5,
        temperature: float = 0.1,
    ) -> None:
        for name, value in (("context", context), ("radius", radius), ("topk", topk)):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1" + (", or None" * (name == "radius")))
        if shape not in SHAPES:
            raise ValueError(f"shape is {shape!r}; allowed are {', '.join(map(repr, SHAPES))}")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; it must be above 0")
        self.context, self.radius, self.shape, self.topk, self.temperature = context, radius, shape, topk, temperature
        self._seen = 0

    def start(self, features: Tensor, soft: Tensor) -> None:
        """Begin a video with the features (C, h, w) and the labels (K, h, w) of its first frame (see `first_soft`)."""
        key = _unit(features)
        # Slot 0 keeps the first frame; the other slots are reused in turn.
        self._keys = key.new_empty(self.context + 1, *key.shape)  # (frames, h, w, C)
        self._labels = key.new_empty(self.context + 1, *key.shape[:2], len(soft))  # (frames, h, w, K)
        self._seen = 0
        self._remember(key, soft.to(key.device).permute(1, 2, 0))

    def step(self, features: Tensor) -> Tensor:
        """Return the labels (K, h, w) of the next frame from its features (C, h, w); they sum to 1 in every patch."""
        if self._seen == 0:
            raise RuntimeError("step was called before start; give start the first frame and its mask")
        key = _unit(features)
        if key.shape != self._keys.shape[1:]:
            first = tuple(self._keys[0].permute(2, 0, 1).shape)
            raise ValueError(f"features are {tuple(features.shape)} but those of the first frame were {first}")
        labels = torch.empty_like(self._labels[0])
        height, width = key.shape[:2]
        for y in range(0, height, _TILE):
            for x in range(0, width, _TILE):
                tile = slice(y, min(y + _TILE, height)), slice(x, min(x + _TILE, width))
                labels[tile] = self._labels_of(key, tile)
        self._remember(key, labels)
        return labels.permute(2, 0, 1)

    def _remember(self, key: Tensor, labels: Tensor) -> None:
        slot = 0 if self._seen == 0 else 1 + (self._seen - 1) % self.context
        self._keys[slot], self._labels[slot] = key, labels
        self._seen += 1

    def _labels_of(self, key: Tensor, tile: tuple[slice, slice]) -> Tensor:
        """Return the labels of a tile of queries, compared with the patches within its reach in each frame."""
        queries = key[tile]
        reach = max(key.shape[:2]) if self.radius is None else self.radius
        rows, columns = (
            slice(max(side.start - reach, 0), min(side.stop + reach, length))
            for side, length in zip(tile, key.shape, strict=False)
        )
        frames = min(self._seen, self.context + 1)
        sources = self._keys[:frames, rows, columns].flatten(0, 2)  # (sources of all frames, C)
        similarity = queries.flatten(0, 1) @ sources.T  # (queries, sources of all frames)
        if self.radius is not None:
            far = ~self._near(tile, (rows, columns), self.radius).to(key.device)
            similarity.unflatten(1, (frames, -1)).masked_fill_(far[:, None], -torch.inf)
        best, source = similarity.topk(min(self.topk, similarity.shape[1]), dim=1)
        # -2 is below every cosine: never take a far patch if fewer than topk are near
        least = best[:, -1:].clamp(min=-2)
        count = int((similarity >= least).sum(1).max())
        if count > best.shape[1]:  # ties with the last one
            best, source = similarity.topk(count, dim=1)
        weights = (best / self.temperature).masked_fill(best < least, -torch.inf).softmax(dim=1)
        labels = self._labels[:frames, rows, columns].flatten(0, 2)[source]  # (queries, count, K)
        return (weights[:, None] @ labels).view(*queries.shape[:2], -1)

    def _near(self, tile: tuple[slice, slice], around: tuple[slice, slice], radius: int) -> Tensor:
        """Return which patches of `around` each query of `tile` may see: (queries, sources of one frame) bool."""
        dy, dx = (
            (torch.arange(query.start, query.stop)[:, None] - torch.arange(source.start, source.stop)).abs()
            for query, source in zip(tile, around, strict=True)
        )
        dy, dx = dy[:, None, :, None], dx[None, :, None, :]
        near = torch.maximum(dy, dx) if self.shape == "square" else (dy**2 + dx**2).sqrt()
        return (near <= radius).flatten(2, 3).flatten(0, 1)


def first_soft(mask: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Reduce the mask of the first frame to the grid: the id at the center of each patch.

    An object that covers the center of no patch is lost, and its id is not returned. Ids may skip numbers; the script
    keeps an empty channel for each skipped number, which never wins.

    From a `mask` of object ids (H, W), 0 for background, and a `grid` (h, w) in patches it returns the one-hot labels
    (K, h, w) float32, and the ids (K,) of their channels, ascending and including 0.
    """
    small = nearest(mask, grid)
    ids = torch.cat((small.flatten(), small.new_zeros(1))).unique()
    return (small == ids[:, None, None]).float(), ids


def hard_mask(soft: Tensor, ids: Tensor, size: tuple[int, int], *, patch_size: int | None) -> Tensor:
    """Turn labels on the grid into a mask of object ids in pixels.

    Labels are resized bilinearly, each one is shifted and scaled to 0..1 separately (which lifts weak ones), and the
    largest wins, the first of equals. A constant label keeps its value (in the script it becomes NaN and wins
    everywhere).

    Args:
        soft: labels (K, h, w).
        ids: ids (K,) of their channels; the result (H, W) has their dtype.
        size: (H, W) of the mask, in pixels.
        patch_size: in pixels, to resize like the script: labels by the patch size, then the winners to `size` by
            nearest neighbor. None resizes the labels directly to `size`.
    """
    resize = {"size": size} if patch_size is None else {"scale_factor": patch_size}
    ids = ids.to(soft.device)
    best, winner = soft.new_tensor(-torch.inf), ids[0]
    for channel, number in zip(soft, ids, strict=True):  # one at a time, so that 200 objects in 4K fit
        score = F.interpolate(channel[None, None], **resize, mode="bilinear", align_corners=False)[0, 0]
        low, high = score.aminmax()
        if high > low:
            score = score - low
            score = score / score.max()
        winner = torch.where(score > best, number, winner)
        best = torch.maximum(score, best)
    return winner if patch_size is None else nearest(winner, size)


def nearest(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize (..., H, W) to `size` by nearest neighbor, pixel by pixel equal to Pillow.

    Like Pillow it accumulates the step from pixel to pixel in double precision, because the sums decide ties.
    """
    rows, columns = (
        torch.tensor([int(x) for x in accumulate(repeat(length / new, new - 1), initial=length / new * 0.5)])
        for length, new in zip(image.shape[-2:], size, strict=True)
    )
    return image[..., rows[:, None], columns]


def _unit(features: Tensor) -> Tensor:
    """(C, h, w) -> (h, w, C) float32 with length 1 in every patch."""
    if features.ndim != 3:
        raise ValueError(f"features are {tuple(features.shape)}; expected (C, h, w) of one frame")
    features = F.normalize(features.permute(1, 2, 0).float(), dim=-1)
    if not features.isfinite().all():
        raise ValueError("features contain values that are not finite; run the encoder in float32")
    return features
