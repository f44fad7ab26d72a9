"""PECore: images, texts and videos in one space.

Source: facebookresearch/perception_models@3e352cc:core/vision_encoder/pe.py (CLIP).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .image_tower import ImageTower
from .text_tower import TextTower
from .variants import CoreConfig, get_core_config


class PECore(nn.Module):
    """Meta's PE-Core: two towers whose features are compared by cosine similarity.

    Args:
        variant: a name such as 'PE-Core-L14-336' or 'pe_core_l14_336', a `CoreConfig` or its fields.
        options: options of the image tower's `PerceptionEncoder`, such as `geometry` or `grad_checkpointing`.

    Raises ConfigError for an encoder that has no text space, such as PE-Spatial.
    """

    def __init__(self, variant: str | CoreConfig | Mapping[str, Any], **options: Any) -> None:
        super().__init__()
        self.config = get_core_config(variant)
        self.visual = ImageTower(self.config, **options)
        self.text = TextTower(self.config.text, self.config.output_dim)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        variant: str | CoreConfig | Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = torch.float32,
        **options: Any,
    ) -> PECore:
        """Build a PE-Core, load its weights strictly, and return it in evaluation mode.

        Args:
            source: a released name ('PE-Core-L14-336': from the hub, through its cache), or what `files.locate` takes.
            variant: as above; None takes it from the name, the file's metadata or its shapes.
            dtype: dtype of the weights; None keeps that of the file.
            options: as above.

        Raises ConfigError for an encoder that has no text space, and CheckpointError for a file that does not fit.
        """
        from .checkpoint import load_core

        return load_core(source, variant=variant, dtype=dtype, **options).eval()

    def forward(self, images: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) and token ids (T, N) -> normalized features (B, D) and (T, D), and exp(logit_scale).

        Logits are `scale * image_features @ text_features.T`.
        """
        return self.encode_image(images, normalize=True), self.encode_text(ids, normalize=True), self.logit_scale.exp()

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> features (B, D)."""
        return _scaled(self.visual(images), normalize)

    def encode_text(self, ids: Tensor, normalize: bool = False) -> Tensor:
        """Token ids (B, N), as `tokenizer` returns them -> features (B, D)."""
        return _scaled(self.text(ids), normalize)

    def encode_video(self, frames: Tensor, normalize: bool = False) -> Tensor:
        """Frames (B, T, 3, H, W) in [-1, 1] -> the mean of their features (B, D).

        With `normalize`, the mean of normalized features, which is not normalized again: as released.
        """
        return self.encode_image(frames.flatten(0, 1), normalize).unflatten(0, frames.shape[:2]).mean(dim=1)

    def tokenizer(self, texts: str | Sequence[str]) -> Tensor:
        """Return the token ids (B, context length) of one text or several; longer texts are cut, with a warning.

        Raises ImportError without the package open_clip_torch, which has the vocabulary.
        """
        from .tokenizer import tokenize

        return tokenize(texts, self.config.text.context_length).to(self.text.pos_embed.device)


def _scaled(features: Tensor, normalize: bool) -> Tensor:
    return F.normalize(features, dim=-1) if normalize else features
