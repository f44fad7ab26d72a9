"""Where in an image a phrase is: similarity of every patch to a text, by a PE-Core."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.features.extract import fit_size
from pe_spatial.features.sheet import Strip, draw_strips, heat
from pe_spatial.language.model import PECore
from pe_spatial.language.protocol import check_names, class_embeddings


class PhraseMaps:
    """Maps of phrases.

    A patch has the feature that attention pooling would give if it attended to this patch alone: its value path, the
    MLP and the projection (MaskCLIP, arXiv 2112.01071, does so with CLIP).

    Args:
        model: the PE-Core, in evaluation mode.
        phrases: texts, each in the template 'a photo of a {}.'.
        long_side: longer side that images are resized to, in pixels; None is the side of the pretraining.
    """

    def __init__(self, model: PECore, phrases: Sequence[str], *, long_side: int | None = None) -> None:
        self.model, self.phrases = model, check_names(phrases, "--phrase")
        self.patch = model.visual.encoder.patch_size
        self.long_side = long_side or model.config.vision.img_size
        if self.long_side < self.patch:
            raise ConfigError(f"--size is {self.long_side}, less than a patch of {self.patch} pixels")
        self.texts = class_embeddings(model, self.phrases)

    @torch.inference_mode()
    def maps(self, rgb: np.ndarray, name: str) -> Tensor:
        """Return the cosine similarities (phrases, h, w) of an image (H, W, 3); DatasetError for a tiny one."""
        if min(rgb.shape[:2]) < self.patch:
            raise DatasetError(f"{name} is smaller than one patch of {self.patch}x{self.patch}; give a larger image")
        height, width = fit_size((rgb.shape[0], rgb.shape[1]), self.long_side, self.patch)
        resized = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BILINEAR))
        like, config = self.model.logit_scale, self.model.config.vision
        x = torch.from_numpy(resized).permute(2, 0, 1)[None].to(like.device, like.dtype)
        mean, std = (x.new_tensor(value)[:, None, None] for value in (config.mean, config.std))
        dense = F.normalize(self.model.visual.dense((x - mean) / std).float(), dim=1)[0]
        return torch.einsum("pd,dhw->phw", self.texts, dense).cpu()


def draw_phrases(maps: PhraseMaps, images: Sequence[tuple[str, np.ndarray]], *, columns: int, width: int) -> np.ndarray:
    """Return a sheet (H, W, 3) uint8 RGB: each image beside the map of each phrase, from its least to its most."""
    strips = []
    for name, rgb in images:
        cells = [(f"{rgb.shape[1]}x{rgb.shape[0]}", rgb)]
        for phrase, values in zip(maps.phrases, maps.maps(rgb, name), strict=True):
            cells.append((f"{phrase}: {values.min():.2f} to {values.max():.2f}", heat(values, cv2.COLORMAP_VIRIDIS)))
        strips.append(Strip(f"{name}: cosine similarity to phrases", cells))
    return draw_strips(strips, columns=columns, width=width)
