"""A model that runs out of memory."""

import os
import signal
from typing import Any

import torch
from helpers.tiny_run import Line
from mmengine.registry import MODELS


@MODELS.register_module()
class Hungry(Line):
    """Has no memory for more than `fits` images in its encoder at a time, and `heads` in its heads."""

    def __init__(self, fits: int, how: str, heads: int = 99, backbone: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.fits, self.how, self.heads = fits, how, heads
        self.micro_batch = (backbone or {}).get("micro_batch")

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if min(len(inputs), self.micro_batch or len(inputs)) > self.fits or len(inputs) > self.heads:
            if self.how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.how == "cpu":
                raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")
            raise torch.cuda.OutOfMemoryError("CUDA out of memory") if self.how == "gpu" else ValueError("wrong shape")
        return super().forward(inputs, data_samples, mode)
