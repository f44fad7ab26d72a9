"""`pe_spatial.MultiTask`: several checkpoints, one encode per frame. Importing this module needs torch alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pe_spatial.errors import ConfigError
from pe_spatial.multitask.sharing import SharedEncoder, now
from pe_spatial.predict.together import Together

if TYPE_CHECKING:
    import numpy as np


class MultiTask(Together):
    """Several models whose heads were trained on one frozen encoder, which runs once per frame for all of them.

    Each result equals that of the model alone (`pe_spatial.load`): bit for bit on a CPU where models get bitwise the
    same input, and up to rounding where they normalize it differently, as trackers do. The encoder runs once for each
    geometry and each size in which models get a frame; `report` says what that costs.

    Args:
        sources: checkpoints as `pe_spatial.load` takes them: detectors, segmenters, depth models, at most one tracker.
        device: as in `pe_spatial.load`.
        dtype: as in `pe_spatial.load`.
        score: lowest score of a detection.
        size: resize each frame to a square of so many pixels first, so that models which resize it in different ways
            get one image; results are in pixels of the frame. None leaves frames as they are.

    Attributes:
        shared: the encoder.

    Raises ConfigError for models of different encoders; as `pe_spatial.load` does for each of them.
    """

    def __init__(
        self, sources: Sequence[str | Path], *, device: str = "cpu", dtype: torch.dtype | None = None,
        score: float = 0.0, size: int | None = None,
    ) -> None:  # fmt: skip
        from pe_spatial.loading import load
        from pe_spatial.predict.models import config_and_weights, task_of

        if len(sources) < 2:
            raise ConfigError(f"there is {len(sources)} model to share an encoder; give at least two checkpoints")
        if size is not None and size < 1:
            raise ConfigError(f"the size is {size}; give a number of pixels, or None for frames as they are")
        super().__init__(size)
        self.sources = tuple(str(source) for source in sources)
        self.device, self.dtype = device, dtype
        self.shared = SharedEncoder()
        counts: Counter[str] = Counter()
        for source in sources:
            task = task_of(config_and_weights(source)[0])
            counts[task] += 1
            options = dict(score=score) if task == "detection" else {}
            predictor = load(source, device=device, dtype=dtype, **options)  # type: ignore[arg-type]
            self.shared.attach(str(source), predictor.model)
            self.predictors[task if counts[task] == 1 else f"{task}_{counts[task]}"] = predictor
        if counts["tracking"] > 1:
            raise ConfigError("there are two trackers, and prompts belong to one; give one of them")

    def _squeeze(self, rgb: np.ndarray, side: int) -> np.ndarray:
        import cv2

        shrink = side < min(rgb.shape[:2])
        return cv2.resize(rgb, (side, side), interpolation=cv2.INTER_AREA if shrink else cv2.INTER_LINEAR)

    def _begin(self, seen: np.ndarray) -> None:  # noqa: ARG002
        self.shared.begin()

    def _costs(self) -> dict[str, float]:
        return {"encoder": self.shared.seconds, "alone": self.shared.alone, "encodes": self.shared.encodes}

    def _now(self) -> float:
        return now(self.device)

    @torch.inference_mode()
    def _step(self, tracker: Any, rgb: np.ndarray, prompts: Mapping[int, Any] | None) -> Mapping[int, np.ndarray]:
        with torch.autocast(torch.device(self.device).type, self.dtype) if self.dtype else nullcontext():
            masks = tracker.step(rgb, prompts)
        return {i: mask.cpu().numpy() for i, mask in masks.items()}

    def _check(self, size: tuple[int, ...]) -> None:
        """Raise ConfigError if no image was read twice: the models have no common size."""
        inputs = self.shared.inputs
        if len(inputs) < 2 or any(len({*one.readers}) > 1 for one in inputs):
            return
        sizes = ", ".join(f"{x.images.shape[-1]}x{x.images.shape[-2]} ({Path(x.readers[0]).name})" for x in inputs)
        remedy = "predict with each model alone" if self.size else "give one size for all (--size PIXELS)"
        raise ConfigError(
            f"an image of {size[1]}x{size[0]} pixels reaches the encoder as {sizes}: the models have no common image "
            f"size or resize it differently, so nothing would be shared; {remedy}"
        )

    def groups(self) -> list[str]:
        """Say for each geometry which models share it, and the layers that they read."""
        return [
            f"{', '.join(Path(name).name for name in group.members)}: layers {sorted(group.layers)} of one encode"
            for group in self.shared.groups
        ]
