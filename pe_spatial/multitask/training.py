"""Train heads of several tasks together on one encoder, from a dataset for each task, in one run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import DATASETS, FUNCTIONS, HOOKS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn
from torch.utils.data import Dataset

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.runner import plain_model
from pe_spatial.engine.summary import encoders as encoder_options
from pe_spatial.errors import ConfigError
from pe_spatial.multitask.sharing import SharedEncoder, encoders

Tasks = Mapping[str, Mapping[str, Any]]
"""Name -> `config` (a file, or 'pe_spatial::NAME.py'), `options` (dotted key -> value), `weight` of its losses."""
_SCOPES = {"mmdet": "mmdet.models", "mmseg": "mmseg.models"}


def task_config(config: str, options: Mapping[str, Any] | None = None, weight: float = 1.0) -> Config:
    """Return the config of one of `Tasks`; ConfigError for a weight that is not positive."""
    if not weight > 0:
        raise ConfigError(f"the weight of {config} is {weight:g}; it must be more than 0, or omit the task")
    cfg = read_config(config)
    object.__setattr__(cfg, "_format_python_code", False)  # yapf takes seconds
    cfg.merge_from_dict(dict(options or {}))
    scope = cfg.get("default_scope", "mmengine")
    imports = cfg.get("custom_imports", {}).get("imports", ())
    import_modules_from_strings([*([_SCOPES[scope]] if scope in _SCOPES else []), *imports])
    return cfg


@MODELS.register_module()
class MultiTaskModel(BaseModel):
    """The models of several configs on one encoder; each step has a batch of each task, and one update.

    Args:
        tasks: see `Tasks`. Their encoders must have the same variant and the same geometry; they may read other layers.
        checkpoint: weights of the encoder, as in `load_checkpoint`.
        frozen: keep the encoder as it is; False tunes it with the losses of all tasks.

    Raises ConfigError for encoders that cannot be one.
    """

    def __init__(self, tasks: Tasks, *, checkpoint: str | None = "released", frozen: bool = True) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        if len(tasks) < 2:
            raise ConfigError(f"tasks has {len(tasks)} of them; give at least two, or train the config itself")
        self.checkpoint, self.frozen = checkpoint, frozen
        self.weights = {task: float(options.get("weight", 1.0)) for task, options in tasks.items()}
        self.configs = {task: task_config(**options) for task, options in tasks.items()}
        self.shared = SharedEncoder(loaded=False)
        self.models = nn.ModuleDict()
        self._names: dict[str, dict[str, str]] = {}  # task -> name in its model -> name in the encoder, '' for heads
        for task, cfg in self.configs.items():
            model: Any = _build(cfg)
            if hasattr(model, "frozen"):  # a depth estimator runs its encoder without autograd otherwise
                model.frozen = model.frozen and frozen
            self._names[task] = _encoder_names(model)
            self.shared.attach(task, model)
            self.models[task] = model
        if len(self.shared.groups) > 1:
            first, second = (group.members[0] for group in self.shared.groups[:2])
            raise ConfigError(f"the encoders of {first} and {second} have different geometries; give both the same")
        self.encoder = self.shared.groups[0].encoder
        self.encoder.requires_grad_(not frozen)  # whatever the configs of the tasks freeze
        self.encoder.frozen_stages = self.encoder.depth if frozen else -1

    def init_weights(self) -> None:
        """Initialize the heads as their configs say, and load the encoder."""
        models: Any = self.models
        for model in models.values():
            model.init_weights()
        if self.checkpoint is not None:
            load_checkpoint(self.encoder, self.checkpoint)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """Set training mode; a frozen encoder stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.encoder.eval()
        return self

    def forward(self, mode: str = "loss", **batches: Any) -> dict[str, Any]:
        """Return the weighted losses of all tasks as TASK.NAME; other modes belong to the models of the tasks."""
        if mode != "loss":
            raise ConfigError(f"a MultiTaskModel only trains (mode 'loss', not {mode!r}); test the files of its tasks")
        losses: dict[str, Any] = {}
        for task in self.models:
            losses |= {f"{task}.{name}": value for name, value in self.task_losses(task, batches[task]).items()}
        return losses

    def task_losses(self, task: str, batch: Any) -> dict[str, Any]:
        """Return the losses of a task, times its weight, and its other numbers."""
        model: Any = self.models[task]
        weight = self.weights[task]
        self.shared.begin()
        found = model._run_forward(model.data_preprocessor(batch, True), mode="loss")
        self.shared.begin()  # frees the maps
        for name, value in found.items():
            if "loss" in name:
                found[name] = [weight * x for x in value] if isinstance(value, Sequence) else weight * value
        return found

    def task_state(self, task: str) -> dict[str, Tensor]:
        """Return the state dict of the model of a task, as its own training has it."""
        own, encoder = self.models[task].state_dict(), self.encoder.state_dict()
        return {name: encoder[inner] if inner else own[name] for name, inner in self._names[task].items()}


def _build(cfg: Config) -> nn.Module:
    """Build the model of a task with an encoder that loads no weights."""
    for _, options in encoder_options(cfg.model):
        options.pop("init_cfg", None)  # type: ignore[attr-defined]
    if "encoder_weights" in cfg.model:  # of a tracker
        cfg.model.encoder_weights = None
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
        return MODELS.build(cfg.model)


def _encoder_names(model: nn.Module) -> dict[str, str]:
    """Return for each name of a state dict the name in the encoder, or '' for what is not of the encoder."""
    paths = {id(module): f"{name}." for name, module in model.named_modules()}
    places = [paths[id(encoder)] for _, _, encoder in encoders(model)]
    return {
        name: next((name.removeprefix(place) for place in places if name.startswith(place)), "")
        for name in model.state_dict()
    }


@DATASETS.register_module()
class MultiTaskDataset(Dataset):
    """Each item is a batch of each task, {task: batch}, drawn at random from the task's training dataset.

    Its loader has `batch_size=1` and `collate_fn=dict(type='only_item')`. The length is that of the longest epoch.

    Args:
        tasks: see `Tasks`; datasets and batch sizes are those of `train_dataloader`.
    """

    def __init__(self, tasks: Tasks) -> None:
        self.metainfo: Mapping[str, Any] = {}  # mmengine requires it
        self.loaders: dict[str, Any] = {}
        self.datasets: dict[str, Any] = {}
        for task, options in tasks.items():
            cfg = task_config(**options)
            self.loaders[task] = cfg.train_dataloader
            with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
                self.datasets[task] = DATASETS.build(cfg.train_dataloader.dataset)

    def __len__(self) -> int:
        return max(math.ceil(len(x) / self.loaders[task].batch_size) for task, x in self.datasets.items())

    def __getitem__(self, index: int) -> dict[str, Any]:
        batches = {}  # of any images: the sampler's index only counts steps
        for task, dataset in self.datasets.items():
            size = self.loaders[task].batch_size
            chosen = np.random.choice(len(dataset), size, replace=size > len(dataset))
            kind = FUNCTIONS.get((self.loaders[task].get("collate_fn") or dict(type="pseudo_collate"))["type"])
            batches[task] = kind([dataset[int(i)] for i in chosen])
        return batches


@FUNCTIONS.register_module()
def only_item(items: Sequence[Any]) -> Any:
    """Return the item of a batch that has one; ConfigError for another batch size."""
    if len(items) != 1:
        raise ConfigError(f"the batch size is {len(items)}; an item holds a batch of each task already: set it to 1")
    return items[0]


@HOOKS.register_module()
class WriteTasks(Hook):
    """After training, write <work dir>/TASK.pth for each task: a checkpoint as training its config writes it."""

    def after_train(self, runner: Runner) -> None:
        model: Any = plain_model(runner.model)
        dataset: Any = runner.train_dataloader.dataset
        for task, cfg in model.configs.items():
            with atomic_write(Path(runner.work_dir, f"{task}.pth")) as unfinished:
                meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(dataset.datasets[task].metainfo))
                torch.save({"state_dict": model.task_state(task), "meta": meta}, unfinished)


@HOOKS.register_module()
class ClipTasks(Hook):
    """Limit the gradients of each task's head as `optim_wrapper.clip_grad` of its config does, before each step.

    One limit for all would let the task with the largest gradients shrink those of the others.

    Args:
        encoder: the limit of an encoder that is tuned, such as dict(max_norm=1.0); None for no limit.
    """

    def __init__(self, encoder: Mapping[str, Any] | None = None) -> None:
        self.encoder = encoder

    def before_train(self, runner: Runner) -> None:
        """Take the parameters, which are sharded by now if they are."""
        model: Any = plain_model(runner.model)
        limits = [(model.models[task], cfg.optim_wrapper.get("clip_grad")) for task, cfg in model.configs.items()]
        limits.append((model.encoder, self.encoder))
        parts = [(list(part.parameters()), dict(limit)) for part, limit in limits if limit]
        kinds: dict[str, Any] = {"norm": nn.utils.clip_grad_norm_, "value": nn.utils.clip_grad_value_}

        def clip(*_: Any) -> None:
            for parameters, options in parts:
                rest = {name: value for name, value in options.items() if name != "type"}
                kinds[options.get("type", "norm")]([p for p in parameters if p.grad is not None], **rest)

        runner.optim_wrapper.optimizer.register_step_pre_hook(clip)
