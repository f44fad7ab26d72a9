"""A model that runs out of memory."""

import os
import signal
from typing import Any

import torch
from helpers.tiny_run import Line
from mmengine.registry import MODELS


@MODELS.register_module()
class Hungry(Line):
    """Has no memory for more than `fits` images."""

    def __init__(self, fits: int, how: str) -> None:
        super().__init__()
        self.fits, self.how = fits, how

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if len(inputs) > self.fits:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "cpu":
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
            raise torch.cuda.OutOfMemoryError("CUDA out of memory") if self.how == "gpu" else ValueError("wrong shape")
        return super().forward(inputs, data_samples, mode)
