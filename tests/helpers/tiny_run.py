"""A training run that takes milliseconds, under mmengine's own Runner."""

import os
import random
import time
import uuid
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, TRANSFORMS
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from pe_spatial.engine.fault_tolerance import add_fault_tolerance


@DATASETS.register_module()
class Numbers(BaseDataset):
    """Twenty samples; number 7 may be poisoned."""

    def load_data_list(self) -> list[dict[str, Any]]:
        return [dict(value=float(i), img_path=f"{i}.png") for i in range(20)]


@TRANSFORMS.register_module()
class Jitter:
    """An augmentation with Python's and NumPy's random numbers."""

    def __init__(self, poisoned: int = -1) -> None:
        self.poisoned = poisoned

    def __call__(self, results: dict[str, Any]) -> dict[str, Any]:
        value = results["value"] + random.random() + np.random.rand()
        if results["value"] == self.poisoned:
            value = float("nan")
        sample = BaseDataElement(metainfo=dict(img_path=results["img_path"]))
        return dict(inputs=torch.full((4,), value), data_samples=sample)


@MODELS.register_module()
class Line(BaseModel):
    """A linear map behind dropout."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = "tensor") -> Any:
        if mode == "predict":
            return data_samples
        time.sleep(float(os.environ.get("SLOW_STEPS", 0)))
        x = torch.stack(list(inputs)) / 20
        return dict(loss=self.linear(nn.functional.dropout(x, 0.5, self.training)).square().mean())


def tiny_config(work_dir: Any, *, epochs: bool = False, workers: int = 0, **changes: Any) -> Config:
    """Return the config of a run of ten steps of two samples, or of two epochs of ten steps."""
    sampler = dict(type="DefaultSampler" if epochs else "InfiniteSampler", shuffle=True)
    loop = dict(by_epoch=True, max_epochs=2) if epochs else dict(type="IterBasedTrainLoop", max_iters=10)
    cfg = Config(
        dict(
            model=dict(type="Line"),
            work_dir=str(work_dir),
            train_dataloader=dict(
                batch_size=2,
                num_workers=workers,
                sampler=sampler,
                dataset=dict(type="Numbers", pipeline=[dict(type="Jitter")]),
            ),
            optim_wrapper=dict(optimizer=dict(type="AdamW", lr=0.1)),
            train_cfg=loop,
            default_hooks=dict(
                checkpoint=dict(type="CheckpointHook", by_epoch=epochs, interval=1 if epochs else 4, max_keep_ckpts=2),
                logger=dict(type="LoggerHook", interval=1),
            ),
            default_scope="mmengine",
            log_level="WARNING",
            experiment_name=f"tiny_{uuid.uuid4()}",
            randomness=dict(seed=0),
        )
    )
    cfg.merge_from_dict(changes)
    return cfg


def losses(runner: Runner) -> dict[int, float]:
    """Record the loss of each step of `runner`, once it trains."""
    found: dict[int, float] = {}
    step = runner.model.train_step

    def record(*args: Any, **options: Any) -> Any:
        outputs = step(*args, **options)
        found[runner.iter + 1] = outputs["loss"].item()
        return outputs

    runner.model.train_step = record
    return found


def build(cfg: Config, *, non_finite_steps: int = 1) -> Runner:
    add_fault_tolerance(cfg, non_finite_steps=non_finite_steps)
    return Runner.from_cfg(cfg)
