"""SAM 2.1's mask logits for a grid of point prompts: the teacher of the locality loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor

from pe_spatial.alignment.teachers import Grid, Teacher
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.integrations.sam2 import SIZES, check_sam2, load_sam2

_MEAN = (123.675, 116.28, 103.53)
_STD = (58.395, 57.12, 57.375)


@MODELS.register_module()
class SAM2MaskTeacher(Teacher):
    """Mask logits of SAM 2.1, one map for each of a grid of point prompts, before any threshold.

    As in the paper: SAM 2.1-L, 32 x 32 prompts, images resized to 1024 pixels, logits interpolated to the student's
    grid.

    Args:
        size: 'large', 'base_plus', 'small' or 'tiny'.
        checkpoint: 'released' (from the hub) or a file in sam2's layout.
        points: prompts on a side of the grid, in the centers of its cells.
        mask: which of SAM's masks of a prompt is taken. 'best' is the one of three with the highest predicted IoU,
            'single' SAM's fourth, made for prompts without ambiguity, and 'all' takes the three as maps of their own.
            The paper does not say.
        prompts: prompts that are decoded together; memory grows with it, results do not change.
        image_size: side of SAM's image in pixels.

    Raises ConfigError if sam2 is not installed.
    """

    def __init__(
        self,
        *,
        size: str = "large",
        checkpoint: str = "released",
        points: int = 32,
        mask: str = "best",
        prompts: int = 64,
        image_size: int = 1024,
    ) -> None:
        super().__init__()
        check_sam2("SAM2MaskTeacher")
        one_of("size of SAM2MaskTeacher", size, list(SIZES))
        one_of("mask of SAM2MaskTeacher", mask, ["best", "single", "all"])
        if min(points, prompts) < 1 or image_size % 32:
            raise ConfigError(
                f"SAM2MaskTeacher has points={points}, prompts={prompts} and image_size={image_size}; the first two "
                "are at least 1, and image_size is a multiple of 32"
            )
        self.size, self.checkpoint, self.mask = size, checkpoint, mask
        self.points, self.prompts, self.image_size = points, prompts, image_size
        self.sam: Any = None

    @property
    def channels(self) -> int:
        """Number of maps."""
        return self.points**2 * (3 if self.mask == "all" else 1)

    def load(self) -> None:
        """Build SAM and load its weights, strictly."""
        if self.sam is None:
            self.sam = load_sam2(self.size, self.checkpoint, self.image_size)

    def forward(self, images: Tensor, grid: Grid, samples: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Return logits (B, maps, h, w), one image and `prompts` prompts at a time."""
        mean, std = (images.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        size = (self.image_size, self.image_size)
        resized = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return torch.stack([self._masks(((one - mean) / std)[None], grid) for one in resized])

    def _masks(self, image: Tensor, grid: Grid) -> Tensor:
        """Return logits (maps, h, w) of one image (1, 3, S, S)."""
        sam = self.sam
        _, features, _, sizes = sam._prepare_backbone_features(sam.forward_image(image))
        if sam.directly_add_no_mem_embed:
            features[-1] = features[-1] + sam.no_mem_embed
        *fine, coarse = (x.permute(1, 2, 0).unflatten(2, size) for x, size in zip(features, sizes, strict=True))
        found = []
        for points in point_grid(self.points, self.image_size).to(image.device).split(self.prompts):
            labels = torch.ones(len(points), 1, dtype=torch.int, device=image.device)
            sparse, dense = sam.sam_prompt_encoder(points=(points[:, None], labels), boxes=None, masks=None)
            logits, scores, *_ = sam.sam_mask_decoder(
                image_embeddings=coarse,
                image_pe=sam.sam_prompt_encoder.get_dense_pe(),
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                multimask_output=self.mask != "single",
                repeat_image=True,
                high_res_features=fine,
            )
            if self.mask == "best":
                logits = logits[torch.arange(len(points)), scores.argmax(1)][:, None]
            logits = F.interpolate(logits.float(), grid, mode="bilinear", align_corners=False, antialias=True)
            found.append(logits.flatten(0, 1))
        return torch.cat(found)


def point_grid(side: int, image_size: int) -> Tensor:
    """Return (x, y) of the centers of side x side cells, (side², 2), in pixels, as sam2 places them."""
    at = (torch.arange(side) + 0.5) * (image_size / side)
    y, x = torch.meshgrid(at, at, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
