"""The predictor of depth estimators."""

from collections.abc import Sequence

import numpy as np
import torch
from mmengine.config import Config

from pe_spatial.depth.inference import DepthPredictor
from pe_spatial.predict.predictor import Predictor
from pe_spatial.predict.results import DepthMap


class DepthMapPredictor(Predictor):
    """Depth in meters; `size` is the short side in pixels that the model gets, at first that of its training images."""

    task = "depth"

    def __init__(
        self, cfg: Config, weights: str, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        self.estimator = DepthPredictor(cfg, weights, device=device)
        super().__init__(self.estimator.model, device=device, dtype=dtype, compile=compile)
        self.quantity, self.size = self.estimator.quantity, self.estimator.training_size

    @torch.inference_mode()
    def _predict(self, items: Sequence[np.ndarray]) -> list[DepthMap]:
        with self._precision():
            depths = self.estimator(items, size=self.size)
        return [DepthMap(depth=depth, quantity=self.quantity) for depth in depths]
