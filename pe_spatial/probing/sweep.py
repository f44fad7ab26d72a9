"""Which layer of a frozen encoder suits a dataset best: the model of a config, trained on each layer alone.

The encoder runs once over the training images, which are read as in testing, and its maps are kept on disk. The
config's own heads (with a pyramid, if it has one), losses, optimizer and schedule then train on each layer; all layers
see the same images in the same order, and their heads start from the same weights. Without augmentation scores are
lower than those of the full recipe; what counts is their order. Evaluation is the config's own.

A model can be swept if its `backbone` is an encoder of this package, alone or with a pyramid, of which one layer is
read. Detectors are swept as in PE's paper (Fig. 8 and Tab. 36): in windows of the pretraining grid, without global
blocks.
"""

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.geometry import get_geometry
from pe_spatial.engine.cached_training import (
    CachedFeatures,
    CacheOptions,
    Features,
    Progress,
    array_name,
    input_transform,
)
from pe_spatial.engine.feature_cache import digest
from pe_spatial.engine.recipe import read_as_in_testing
from pe_spatial.engine.runner import prepare_loaders
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.openmmlab import build_encoder
from pe_spatial.integrations.timm import PREFIX

_OF_PYRAMIDS = ("type", "pyramid", "adapter", "any_size", "renormalize", "eval_level")  # options of no encoder


class ProgressBar(Hook):
    """A progress bar for the training of one layer."""

    def __init__(self, layer: int) -> None:
        self.layer = layer

    def before_train(self, runner: Runner) -> None:
        self.bar = tqdm(total=runner.max_iters, desc=f"layer {self.layer}", unit="step", leave=False)

    def after_train_iter(self, _: Runner, **step: Any) -> None:
        self.bar.set_postfix(loss=f"{float(step['outputs']['loss'].detach()):.4f}", refresh=False)
        self.bar.update()

    def after_train(self, _: Runner) -> None:
        self.bar.close()


class LayerReader(nn.Module):
    """Takes the encoder's place in a model that reads the block `layer`, as often as `times`.

    `forward_with_class_tokens` is set from outside: to cached features, or to a shared pass of the encoder.
    """

    def __init__(self, encoder: nn.Module, layer: int, times: int) -> None:
        super().__init__()
        for name in ("config", "patch_size", "embed_dim", "variant"):
            setattr(self, name, getattr(encoder, name))
        self.num_prefix_tokens = encoder.num_prefix_tokens
        self.out_indices, self.depth = (layer,) * times, layer + 1
        self.forward_with_class_tokens: Callable[[Tensor], Features]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps."""
        return self.forward_with_class_tokens(images)[0]

    def init_weights(self) -> None:
        """Do nothing: there are no parameters."""

    def layer_of(self, name: str) -> int:
        """As encoders have it; there are no parameters."""
        raise KeyError(name)


class SharedEncoderPass:
    """Runs the encoder once for several models that ask for the same images in the same order."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.calls: list[Features] = []

    def reader(self, layer: int, times: int) -> Callable[[Tensor], Features]:
        """Return what another model, which reads `layer`, calls in place of the encoder."""
        calls, place = 0, self.encoder.out_indices.index(layer)

        def read(images: Tensor) -> Features:
            nonlocal calls
            if calls == len(self.calls):
                with torch.no_grad():
                    self.calls.append(self.encoder.forward_with_class_tokens(images))
            calls += 1
            maps, tokens = self.calls[calls - 1]
            return (maps[place],) * times, (tokens[place],) * times if tokens else ()

        return read


class LayerSweep:
    """A model for each of several layers; call `fill`, then `train` for each layer, then `evaluate`.

    Args:
        cfg: config of a training; its `out_indices` is replaced, and its encoder is frozen.
        layers: blocks of the encoder, 0-based, negative ones counted from the end; None for all.
        folder: folder of the heads and the results.
        cache: where and how maps are kept; None keeps them in `folder`, in float32.
        limit: number of training images, evenly spaced in their list; None for all.
        epochs: passes over these images; the config's schedule is compressed to that length.

    Raises ConfigError for models of which no layer can be exchanged, for unknown layers and if the disk is too small.
    """

    def __init__(
        self, cfg: Config, *, layers: Sequence[int] | None, folder: str | Path, cache: CacheOptions | None = None,
        limit: int | None = None, epochs: int | None = None,
    ) -> None:  # fmt: skip
        self.cfg, self.folder = copy.deepcopy(cfg), Path(folder)
        if any(number is not None and number < 1 for number in (limit, epochs)):
            raise ConfigError(f"limit is {limit} and epochs is {epochs}; both must be at least 1")
        init_default_scope(cfg.get("default_scope", "mmengine"))
        self.seed: int = (cfg.get("randomness") or {}).get("seed") or 0
        self.depth, self._times_read = _check_config(self.cfg)
        if cache is None or cache.views == 1:
            read_as_in_testing(self.cfg)
        prepare_loaders(self.cfg)
        self.layers = _check_layers(layers, self.depth)
        backbone = self.cfg.model.backbone
        if "pyramid" in backbone or self.cfg.get("default_scope") == "mmdet":
            _use_windows(backbone)
        set_random_seed(self.seed)
        options = {key: value for key, value in backbone.items() if key not in _OF_PYRAMIDS}
        self.encoder = build_encoder(**{**options, "out_indices": list(self.layers), "frozen_stages": -1})
        self.encoder.init_weights()
        self.encoder.requires_grad_(False).eval().to(get_device())
        self.checkpoint = backbone.pop("init_cfg", None)

        dataset = DATASETS.build(self.cfg.train_dataloader.dataset)
        if limit is not None and limit < len(dataset):
            dataset = dataset.get_subset(np.linspace(0, len(dataset) - 1, limit).round().astype(int).tolist())
        loader = self.cfg.train_dataloader
        if epochs is not None:
            _set_epochs(self.cfg, -(-len(dataset) // loader.batch_size) * epochs, epochs)
        reader = self._build(self.layers[0]).to(get_device()).train()
        _replace_encoder(reader, self.encoder)
        self.encoder.eval()
        self.features = CachedFeatures(
            reader,
            dataset,
            cache or CacheOptions(folder=self.folder / "cache"),
            transform=input_transform(self.cfg),
            batch_size=loader.batch_size,
            workers=loader.get("num_workers", 0),
        )
        self._models: dict[int, Any] = {}

    def fill(self, progress: Progress = iter) -> None:
        """Run the encoder over the images that the cache does not hold yet."""
        self.features.fill(progress)

    def _build(self, layer: int) -> Any:
        """Return the config's model with new heads on `layer` and without the encoder."""
        set_random_seed(self.seed)
        backbone = {**self.cfg.model.backbone, "out_indices": [0] * self._times_read, "frozen_stages": -1}
        model = MODELS.build({**self.cfg.model, "backbone": backbone})
        _replace_encoder(model, LayerReader(self.encoder, layer, self._times_read))
        return model

    def train(self, layer: int, hooks: Sequence[Hook] = ()) -> bool:
        """Train the heads on `layer` with the config's schedule; return False if finished ones were loaded instead.

        Their logs are in the folder layer_N, their weights, those after the last step, in layer_N.safetensors.
        """
        model = self._build(layer)
        path, key = self.folder / f"layer_{layer:02d}.safetensors", self._training_key(layer)
        finished = False
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                finished = (file.metadata() or {}).get("key") == key
        if not finished:
            self.features.feed(model, _encoder_of(model))
            self._runner(model, layer, hooks).train()
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            with atomic_write(path) as unfinished:
                save_file(state, unfinished, {"key": key})
        model.load_state_dict(load_file(path))
        self._models[layer] = model.to(get_device()).eval()
        return not finished

    def _runner(self, model: nn.Module, layer: int, hooks: Sequence[Hook]) -> Runner:
        keys = ("train_cfg", "optim_wrapper", "param_scheduler", "log_processor")
        return Runner(
            **{key: self.cfg.get(key) for key in keys},
            model=model,
            work_dir=str(self.folder / f"layer_{layer:02d}"),
            train_dataloader={**self.cfg.train_dataloader, "dataset": self.features.samples([layer])},
            default_hooks=dict(checkpoint=None, logger=dict(type="LoggerHook", interval=10)),
            custom_hooks=[*(self.cfg.get("custom_hooks") or ()), *hooks],
            visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
            log_level="WARNING",
            randomness=dict(seed=self.seed),
            default_scope=self.cfg.get("default_scope", "mmengine"),
            experiment_name=f"{self.folder.resolve()}_layer_{layer}",
        )

    def _training_key(self, layer: int) -> str:
        loader = {key: value for key, value in self.cfg.train_dataloader.items() if key != "dataset"}
        recipe = [self.cfg.get(key) for key in ("optim_wrapper", "param_scheduler", "train_cfg")]
        cache = self.features.cache
        data = [cache.about, cache.weights[array_name(layer)], self.cfg.train_dataloader.dataset]
        return digest([data, layer, self.cfg.model, loader, recipe, self.seed])

    def evaluate(self, progress: Progress = iter) -> dict[int, dict[str, float]]:
        """Return the config's own metrics of every trained layer; the encoder runs once for all of them."""
        loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=self.seed)
        evaluators = {layer: Evaluator(copy.deepcopy(self.cfg.val_evaluator)) for layer in self._models}
        for evaluator in evaluators.values():
            evaluator.dataset_meta = loader.dataset.metainfo
        with torch.no_grad():
            for batch in progress(loader):
                shared = SharedEncoderPass(self.encoder)
                for layer, model in self._models.items():
                    reader = shared.reader(layer, self._times_read)
                    _encoder_of(model).forward_with_class_tokens = reader
                    evaluators[layer].process(model.test_step(batch), batch)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
            results = {layer: evaluator.evaluate(len(loader.dataset)) for layer, evaluator in evaluators.items()}
        return {
            layer: {name: float(value) for name, value in result.items() if not isinstance(value, str)}
            for layer, result in results.items()
        }


def _encoder_of(model: Any) -> Any:
    return getattr(model.backbone, "encoder", model.backbone)


def _replace_encoder(model: Any, encoder: nn.Module) -> None:
    if hasattr(model.backbone, "encoder"):
        model.backbone.encoder = encoder
    else:
        model.backbone = encoder


def _use_windows(backbone: Any) -> None:
    """Attend in windows of the pretraining grid alone, as in the paper's sweep."""
    if str(backbone.get("variant")).startswith(PREFIX):
        return
    windows = get_geometry(backbone.get("geometry", "release")).window_size or backbone.get("window_size")
    if not windows:
        backbone.geometry = dict(pos_embed_mode="tile", rope_mode="interpolate", window_size="pretraining")
    backbone.global_attn_indexes = []


def _check_config(cfg: Config) -> tuple[int, int]:
    """Return the number of the encoder's blocks and how often the model reads its layer.

    Raises ConfigError unless the layer of the config's model can be exchanged.
    """
    model = cfg.model
    if (model.get("backbone") or {}).get("type") not in ("PerceptionEncoder", "PerceptionEncoderPyramid"):
        raise ConfigError(
            f"a {model.get('type')} cannot be swept; give a config with a PerceptionEncoder or a "
            "PerceptionEncoderPyramid as model.backbone (pe-spatial swap_backbone writes one)"
        )
    if model.backbone.get("lora"):
        raise ConfigError("a layer sweep is for frozen encoders, and this one trains LoRA adapters; omit backbone.lora")
    if cfg.get("launcher", "none") != "none":
        raise ConfigError("a layer sweep runs in one process; omit --launcher")
    try:
        with torch.device("meta"):
            encoder = _encoder_of(MODELS.build(model))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cfg.filename} cannot be built: {' '.join(str(error).split())}") from error
    if len(set(encoder.out_indices)) != 1:
        raise ConfigError(f"the config's head reads layers {encoder.out_indices}; a sweep needs a head that reads one")
    return encoder.config.depth, len(encoder.out_indices)


def _check_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    chosen = range(depth) if layers is None else layers
    if not chosen or not all(-depth <= layer < depth for layer in chosen):
        names = ", ".join(map(str, chosen)) or "empty"
        raise ConfigError(f"layers are {names}; the encoder has blocks 0 to {depth - 1} (or {-depth} to -1)")
    return tuple(sorted({layer % depth for layer in chosen}))


def _set_epochs(cfg: Config, iterations: int, epochs: int) -> None:
    """Change the length of the schedule; its phases keep their proportions."""
    key, new = ("max_iters", iterations) if "max_iters" in cfg.train_cfg else ("max_epochs", epochs)
    old = cfg.train_cfg[key]
    cfg.train_cfg[key] = new
    schedules: Any = cfg.get("param_scheduler") or []
    for schedule in schedules if isinstance(schedules, list | tuple) else [schedules]:
        for name in ("begin", "end", "T_max", "total_steps", "step_size", "milestones"):
            value = schedule.get(name)
            if value is not None and value != float("inf"):
                points = value if isinstance(value, list) else [value]
                points = [max(round(point * new / old), int(point > 0)) for point in points]
                schedule[name] = points if isinstance(value, list) else points[0]
