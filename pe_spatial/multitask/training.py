"""Train heads of several tasks together on one encoder, from a dataset for each task, in one run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict, build_optim_wrapper
from mmengine.registry import (
    DATA_SAMPLERS,
    DATASETS,
    FUNCTIONS,
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    DefaultScope,
)
from mmengine.runner import Runner
from mmengine.utils import import_modules_from_strings
from torch import Tensor, nn
from torch.utils.data import BatchSampler, Dataset, Sampler

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.determinism import seed_everything, seed_loader
from pe_spatial.engine.precision import BFloat16OptimWrapper
from pe_spatial.engine.summary import encoders as encoder_options
from pe_spatial.engine.weights import plain_model
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

    With a frozen encoder each head trains as it does alone: it starts from the same weights, and its losses are
    computed in the precision of its own config. In a deterministic run they are the same to the last bit.

    Args:
        tasks: see `Tasks`. Their encoders must have the same variant and the same geometry; they may read other layers.
        checkpoint: weights of the encoder, as in `load_checkpoint`.
        frozen: keep the encoder as it is; False tunes it with the losses of all tasks.

    Attributes:
        step_seed: in a deterministic run, the numbers that the random numbers of each task follow from in this step.

    Raises ConfigError for encoders that cannot be one.
    """

    def __init__(self, tasks: Tasks, *, checkpoint: str | None = "released", frozen: bool = True) -> None:
        super().__init__(data_preprocessor=BaseDataPreprocessor())
        if len(tasks) < 2:
            raise ConfigError(f"tasks has {len(tasks)} of them; give at least two, or train the config itself")
        self.checkpoint, self.frozen = checkpoint, frozen
        self.weights = {task: float(options.get("weight", 1.0)) for task, options in tasks.items()}
        self.configs = {task: task_config(**options) for task, options in tasks.items()}
        self.step_seed: tuple[int, ...] | None = None
        self.shared = SharedEncoder(loaded=False)
        self.models = nn.ModuleDict()
        self._names: dict[str, dict[str, str]] = {}  # task -> name in its model -> name in the encoder, '' for heads
        self._random: dict[str, Tensor] = {}  # the state of random numbers before a model initializes its weights
        start = torch.get_rng_state()
        for task, cfg in self.configs.items():
            torch.set_rng_state(start)
            model: Any = _build(cfg)
            self._random[task] = torch.get_rng_state()
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
        for task, model in models.items():
            torch.set_rng_state(self._random[task])
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
        if self.step_seed is not None:
            seed_everything(*self.step_seed)
        half = self.configs[task].optim_wrapper.get("type") == BFloat16OptimWrapper.__name__
        device = next(self.parameters()).device.type
        self.shared.begin()
        with torch.autocast(device, torch.bfloat16) if half else nullcontext():
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


class TaskOptimWrappers(OptimWrapperDict):
    """An optimizer for each task, which all step after one backward pass through the sum of the losses."""

    def optim_context(self, model: nn.Module) -> Any:  # noqa: ARG002
        """Return no context: the model computes the losses of each task in its own precision."""
        return nullcontext()

    def update_params(self, loss: Tensor, *_: Any, **__: Any) -> None:
        """Limit the gradients of each task, and step, as its own wrapper does."""
        loss.backward()
        for wrapper in self.values():
            wrapper.step()
            wrapper.zero_grad()


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TaskOptimWrapperConstructor:
    """Optimize each head by the `optim_wrapper` of its own config, and an encoder that is tuned by `encoder`.

    So a head has its own learning rate, decay, precision and limit of gradients: one limit for all would let the task
    with the largest gradients shrink those of the others. `param_scheduler` of the run holds for all of them, or has
    a list for each task.

    Raises ConfigError for other options, and for wrappers that scale losses or accumulate gradients.
    """

    def __init__(self, optim_wrapper_cfg: Mapping[str, Any], paramwise_cfg: Mapping[str, Any] | None = None) -> None:
        options = {**optim_wrapper_cfg, **({"paramwise_cfg": paramwise_cfg} if paramwise_cfg else {})}
        self.encoder = options.pop("encoder", None)
        if options or not self.encoder:
            raise ConfigError(
                f"optim_wrapper has {', '.join(options) or 'no encoder'}; heads that train together are optimized as "
                "their own configs say (tasks.NAME.options changes them), and a tuned encoder by optim_wrapper.encoder"
            )

    def __call__(self, model: nn.Module) -> TaskOptimWrappers:
        """Build the wrappers of a `MultiTaskModel`."""
        tasks: Any = plain_model(model)
        parts = {task: (tasks.models[task], cfg.optim_wrapper) for task, cfg in tasks.configs.items()}
        if not tasks.frozen:
            parts["encoder"] = (tasks.encoder, self.encoder)
        wrappers = {name: build_optim_wrapper(part, cfg) for name, (part, cfg) in parts.items()}
        for name, wrapper in wrappers.items():
            if type(wrapper) not in (OptimWrapper, BFloat16OptimWrapper) or wrapper._accumulative_counts != 1:
                raise ConfigError(
                    f"the optim_wrapper of {name} is {type(wrapper).__name__} with accumulative_counts="
                    f"{wrapper._accumulative_counts}; heads that train together step after each batch, with "
                    "OptimWrapper or BFloat16OptimWrapper"
                )
            if wrapper.clip_grad_kwargs:
                wrapper.grad_name = f"{name}.{wrapper.grad_name}"  # in the log
        return TaskOptimWrappers(**wrappers)


@DATASETS.register_module()
class MultiTaskDataset(Dataset):
    """The training datasets of several tasks; an item is a batch of each, {task: batch}, as `MultiTaskSampler` draws.

    Its loader has `batch_size=1` and `collate_fn=dict(type='only_item')`. The length is that of the longest epoch.

    Args:
        tasks: see `Tasks`; datasets and batch sizes are those of `train_dataloader`.
        deterministic: seed the augmentation of each image, as `make_deterministic` does.
    """

    def __init__(self, tasks: Tasks, *, deterministic: bool = False) -> None:
        self.metainfo: Mapping[str, Any] = {}  # mmengine requires it
        self.loaders: dict[str, Any] = {}
        self.datasets: dict[str, Any] = {}
        for task, options in tasks.items():
            cfg = task_config(**options)
            if deterministic:
                seed_loader(cfg.train_dataloader)
            self.loaders[task] = cfg.train_dataloader
            with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmengine")):
                self.datasets[task] = DATASETS.build(cfg.train_dataloader.dataset)

    def __len__(self) -> int:
        return max(math.ceil(len(x) / self.loaders[task].batch_size) for task, x in self.datasets.items())

    def __getitem__(self, drawn: Mapping[str, Sequence[int]]) -> dict[str, Any]:
        batches = {}
        for task, indices in drawn.items():
            kind = FUNCTIONS.get((self.loaders[task].get("collate_fn") or dict(type="pseudo_collate"))["type"])
            batches[task] = kind([self.datasets[task][i] for i in indices])
        return batches


@DATA_SAMPLERS.register_module()
class MultiTaskSampler(Sampler):
    """Draws for each step the batch of each task, {task: indices}, as the task's own loader draws it.

    Args:
        dataset: a `MultiTaskDataset`.
        seed: that of the run, which the samplers of the tasks get.
    """

    def __init__(self, dataset: MultiTaskDataset, *, seed: int | None = None) -> None:
        self.length, self.skipped = len(dataset), 0
        self.samplers: dict[str, tuple[Any, Any]] = {}  # one for images, and one for batches
        for task, loader in dataset.loaders.items():
            images = DATA_SAMPLERS.build(loader.sampler, default_args=dict(dataset=dataset.datasets[task], seed=seed))
            options = dict(sampler=images, batch_size=loader.batch_size)
            kind = loader.get("batch_sampler")
            own = DATA_SAMPLERS.build(kind, default_args=options) if kind else BatchSampler(**options, drop_last=False)
            self.samplers[task] = images, own

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        drawn = [self._batches(task) for task in self.samplers]
        steps = (dict(zip(self.samplers, batches, strict=True)) for batches in zip(*drawn, strict=True))
        return islice(steps, self.skipped, None)

    def _batches(self, task: str) -> Iterator[list[int]]:
        images, batches = self.samplers[task]

        def epoch(number: int) -> Iterator[list[int]]:
            images.set_epoch(number)
            return iter(batches)

        return chain.from_iterable(map(epoch, count()))

    def __len__(self) -> int:
        return self.length

    def skip(self, number: int) -> None:
        """Start after `number` steps, as a resumed run does."""
        self.skipped += number


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
