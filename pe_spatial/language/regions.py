"""Words for regions of an image: boxes or masks of any source are compared with phrases, without training.

R regions, D channels of the common space. Boxes are x0, y0, x1, y1 in pixels of the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_spatial.errors import one_of

from .embedding import squash
from .model import PECore
from .protocol import DEFAULT_TEMPLATE, check_names, class_embeddings

BY = ("tokens", "crops")
CONTEXT = 0.1
"""Share of its side by which a crop is larger than its box, at each end."""


class RegionClassifier:
    """Probabilities of phrases for regions.

    Args:
        model: the PE-Core, in evaluation mode.
        names: phrases, such as class names.
        background: phrases that compete, for what is none of the names.
        templates: texts with {} for a phrase, averaged.
        by: 'tokens' pools the image's own tokens over each region, in one forward pass: attention pooling that sees
            the patches of the region alone. 'crops' encodes a square of each region, with more detail and as many
            forward passes; masks do not count.
        side: side in pixels of the square that 'tokens' squashes an image to; None is that of the pretraining.

    Raises ConfigError for no name, an empty one, and two that are equal.
    """

    def __init__(
        self, model: PECore, names: Sequence[str], *, background: Sequence[str] = (),
        templates: Sequence[str] = (DEFAULT_TEMPLATE,), by: str = "tokens", side: int | None = None,
    ) -> None:  # fmt: skip
        phrases = check_names([*names, *background], "the list")
        self.model, self.by, self.side = model, one_of("by", by, BY), side
        self.names, self.background = phrases[: len(names)], phrases[len(names) :]
        self.classifier = class_embeddings(model, phrases, templates)

    @torch.inference_mode()
    def __call__(self, rgb: np.ndarray, boxes: np.ndarray, masks: Iterable[np.ndarray] | None = None) -> np.ndarray:
        """Return the probabilities (R, names and background) of the regions of an image (H, W, 3) uint8 RGB.

        `masks` (H, W) bool, one for each box, limit the regions to what they cover.
        """
        if not len(boxes):
            return np.zeros((0, len(self.classifier)), np.float32)
        features = F.normalize(self.features(rgb, boxes, masks).float(), dim=-1)
        logits = self.model.logit_scale.exp().float() * features @ self.classifier.T
        return logits.softmax(-1).cpu().numpy()

    @torch.inference_mode()
    def features(self, rgb: np.ndarray, boxes: np.ndarray, masks: Iterable[np.ndarray] | None = None) -> Tensor:
        """Return the features (R, D) of the regions, not normalized."""
        config, like = self.model.config.vision, self.model.logit_scale
        if self.by == "crops":
            crops = torch.stack([squash(crop(rgb, box), config) for box in boxes])
            parts = [self.model.encode_image(part.to(like.device, like.dtype)) for part in crops.split(32)]
            return torch.cat(parts)
        visual = self.model.visual
        patches = visual.patches(squash(rgb, config, self.side)[None].to(like.device, like.dtype))[0]  # (h, w, C)
        grid = (patches.shape[0], patches.shape[1])
        shares = box_shares(boxes, rgb.shape[:2], grid) if masks is None else mask_shares(masks, grid)
        regions = chosen_patches(shares).flatten(1).to(like.device)
        return visual.head(visual.attn_pool.regions(patches.flatten(0, 1), regions))


def crop(rgb: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Return the part of an image at a box and `CONTEXT` around it, at least one pixel."""
    height, width = rgb.shape[:2]
    x0, y0, x1, y1 = map(float, box)
    dx, dy = CONTEXT * (x1 - x0), CONTEXT * (y1 - y0)
    left, top = int(np.clip(x0 - dx, 0, width - 1)), int(np.clip(y0 - dy, 0, height - 1))
    right, bottom = int(np.ceil(min(x1 + dx, width))), int(np.ceil(min(y1 + dy, height)))
    return rgb[top : max(bottom, top + 1), left : max(right, left + 1)]


def box_shares(boxes: np.ndarray, size: tuple[int, ...], grid: tuple[int, int]) -> Tensor:
    """Return the share of each patch (R, h, w), from 0 to 1, that lies in the boxes of an image (H, W)."""
    (height, width), (h, w) = size[:2], grid
    scaled = torch.from_numpy(np.asarray(boxes, np.float32)) * torch.tensor([w / width, h / height] * 2)
    x0, y0, x1, y1 = scaled.unbind(1)

    def along(start: Tensor, end: Tensor, number: int) -> Tensor:
        left = torch.arange(number)
        return (torch.minimum(end[:, None], left + 1) - torch.maximum(start[:, None], left)).clamp(0, 1)

    return along(y0, y1, h)[:, :, None] * along(x0, x1, w)[:, None]


def mask_shares(masks: Iterable[np.ndarray], grid: tuple[int, int]) -> Tensor:
    """Return the share of each patch (R, h, w), from 0 to 1, that the masks (H, W) cover."""
    full = (torch.from_numpy(np.asarray(mask, np.float32))[None, None] for mask in masks)
    return torch.cat([F.interpolate(mask, size=grid, mode="area")[0] for mask in full])


def chosen_patches(shares: Tensor) -> Tensor:
    """Return the patches (R, h, w) of regions: those that lie in it by half, or the best one of a smaller region."""
    best = shares.flatten(1).argmax(1)
    chosen = (shares >= 0.5).flatten(1)
    chosen[torch.arange(len(best)), best] = True
    return chosen.view_as(shares)
