"""SAM 2.1's masks of a grid of points as objects without classes, which words can name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pe_spatial.errors import one_of
from pe_spatial.integrations.sam2 import SIZES, check_sam2, load_sam2
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.predictor import ObjectPredictor, load_words
from pe_spatial.predict.results import Detections

if TYPE_CHECKING:
    from pe_spatial.language.model import PECore

PREFIX = "sam2:"
"""Begins the name of a SAM 2.1: 'sam2:large'."""


class MaskProposer(ObjectPredictor):
    """Finds objects of any kind: the masks of a grid of point prompts, filtered and merged by sam2's own generator.

    The score is the IoU that SAM predicts.

    Args:
        sam: SAM 2.1, for images of 1024 pixels.
        points: prompts on a side of the grid.
    """

    task = "detection"
    class_names = ("object",)

    def __init__(
        self, sam: Any, *, device: str, dtype: torch.dtype | None = None, score: float = 0.0, points: int = 32
    ) -> None:
        from sam2.automatic_mask_generator import SAM2AutomaticMaskGenerator

        super().__init__(sam.to(device), device=device, dtype=dtype)
        self.score, self.generator = score, SAM2AutomaticMaskGenerator(self.model, points_per_side=points)

    @torch.inference_mode()
    def _predict(self, items: Sequence[np.ndarray]) -> list[Detections]:
        with self._precision():
            return [self._objects(rgb) for rgb in items]

    def _propose(self, items: Sequence[Any], images: Sequence[np.ndarray]) -> list[Detections]:  # noqa: ARG002
        return self._predict(items)

    def _objects(self, rgb: np.ndarray) -> Detections:
        found = sorted(self.generator.generate(rgb), key=lambda one: -one["predicted_iou"])
        crops = tuple(MaskCrop.cut(one["segmentation"]) for one in found)
        return Detections(
            boxes=np.array([crop.box for crop in crops], np.float32).reshape(-1, 4),
            scores=np.array([one["predicted_iou"] for one in found], np.float32).clip(0, 1),
            labels=np.zeros(len(found), np.int64),
            class_names=self.class_names,
            image_size=(rgb.shape[0], rgb.shape[1]),
            crops=crops,
        ).filter(score=self.score)


def load_proposer(
    name: str, weights: str, *, device: str, dtype: torch.dtype | None, score: float, words: str | Path | PECore | None
) -> MaskProposer:
    """Return the proposer of a name such as 'sam2:large', with weights from 'released' or a file."""
    check_sam2(name)
    size = one_of("the size of SAM 2.1", name.removeprefix(PREFIX), list(SIZES))
    proposer = MaskProposer(load_sam2(size, weights), device=device, dtype=dtype, score=score)
    proposer.words = load_words(words, device)
    return proposer
