"""Which layer of a frozen encoder suits a dataset best: one probe per layer, trained on cached feature maps.

The encoder runs once over the training images, which are read as in testing, and its maps are kept on disk. The
config's own head, loss, optimizer and schedule then train a probe for each layer. Without augmentation scores are lower
than those of the full recipe; what counts is their order. Evaluation is the config's own.

A model can be swept if its `backbone` is a frozen encoder of this package of which one layer is read, its `decode_head`
is trained, and one image in mode 'tensor' runs the encoder once. `LinearProbe` and `DepthEstimator` are such models.
"""

import copy
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from mmengine.structures import PixelData
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
from pe_spatial.atomic import atomic_write
from pe_spatial.engine.runner import prepare_loaders
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.probing.cache import (
    ArrayCache,
    CachedEncoder,
    CachedPreprocessor,
    CachedSamples,
    Features,
    SharedEncoderPass,
    digest,
    layer_digests,
)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iteration to show its progress, such as `tqdm`."""

_FLUSH_INTERVAL = 64  # images between two records of what the cache holds


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


class LayerSweep:
    """A probe for each of several layers; call `fill`, then `train` for each layer, then `evaluate`.

    Args:
        cfg: config of a probe; its `out_indices` is replaced.
        layers: blocks of the encoder, 0-based, negative ones counted from the end; None for all.
        folder: folder of the cache, the heads and the results.
        dtype: type of the cached maps: 'float32' is exact, 'float16' and 'bfloat16' take half the space.
        limit: number of training images, evenly spaced in their list; None for all.
        epochs: passes over these images; the config's schedule is compressed to that length.

    Raises ConfigError for models whose maps cannot be cached, for unknown layers and if the disk is too small.
    """

    def __init__(
        self, cfg: Config, *, layers: Sequence[int] | None, folder: str | Path, dtype: str = "float32",
        limit: int | None = None, epochs: int | None = None,
    ) -> None:  # fmt: skip
        self.cfg, self.folder = copy.deepcopy(cfg), Path(folder)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
        if any(number is not None and number < 1 for number in (limit, epochs)):
            raise ConfigError(f"limit is {limit} and epochs is {epochs}; both must be at least 1")
        init_default_scope(cfg.get("default_scope", "mmengine"))
        self.seed: int = (cfg.get("randomness") or {}).get("seed") or 0
        self.depth, self._times_read = _check_config(self.cfg)
        prepare_loaders(self.cfg)
        self.layers = _check_layers(layers, self.depth)
        self.dtype = DTYPES[dtype]
        set_random_seed(self.seed)
        self.encoder = MODELS.build({**self.cfg.model.backbone, "out_indices": list(self.layers)})
        self.encoder.init_weights()
        self.encoder.requires_grad_(False).eval().to(get_device())

        self.dataset = DATASETS.build({**self.cfg.train_dataloader.dataset, "pipeline": self._pipeline()})
        count = len(self.dataset)
        self.images = np.linspace(0, count - 1, min(limit or count, count)).round().astype(int).tolist()
        self._crop_size = _crop_size(self.cfg.train_dataloader.dataset.pipeline)
        if epochs is not None:
            _set_epochs(self.cfg, -(-len(self.images) // self.cfg.train_dataloader.batch_size) * epochs, epochs)
        self._reader = self._build(self.layers[0]).to(get_device()).eval()  # prepares images for the encoder
        self._open_cache()
        self._probes: dict[int, Any] = {}

    def _pipeline(self) -> list[Any]:
        """The pipeline of evaluation, with the labels read at the start, so that they are resized with the image."""
        steps = self.cfg.val_dataloader.dataset.pipeline
        return sorted(steps, key=lambda step: not _name(step).startswith("Load"))

    def _open_cache(self) -> None:
        self._size, layers, labels, self._sample_type = self._encode(self.images[0])
        digests = layer_digests(self.encoder, self.layers)
        self._labels = list(labels)
        self._arrays = {
            layer: {key: f"layer_{layer:02d}_{digests[layer]}_{key}" for key in features}
            for layer, features in zip(self.layers, layers, strict=True)
        }
        shapes = {name: (tuple(row.shape), row.dtype) for name, row in self._rows(layers, labels).items()}
        self.cache = ArrayCache(self.folder / "cache" / self._data_digest(), len(self.images), shapes)
        existing = next(path for path in [self.folder.resolve(), *self.folder.resolve().parents] if path.exists())
        free = shutil.disk_usage(existing).free
        if self.cache.bytes_missing > free:
            raise ConfigError(
                f"the cache needs {self.cache.bytes_missing / 1e9:.1f} GB more, but {self.folder} has "
                f"{free / 1e9:.1f} GB; choose fewer layers, fewer images (limit) or bfloat16 maps"
            )

    def _data_digest(self) -> str:
        """Return a digest of everything that the cached rows depend on, except for the weights."""
        stat = []
        for i in self.images:
            info = self.dataset.get_data_info(i)
            paths = sorted(value for value in info.values() if isinstance(value, str) and os.path.isfile(value))
            stat.append([info, [[os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths]])
        backbone = {k: v for k, v in self.cfg.model.backbone.items() if k not in ("out_indices", "init_cfg")}
        preprocessor = self.cfg.model.get("data_preprocessor")
        return digest([backbone, preprocessor, self._pipeline(), self._crop_size, str(self.dtype), stat])

    @torch.no_grad()
    def _encode(self, image: int) -> tuple[tuple[int, ...], list[Features], dict[str, Tensor], type]:
        """Return for one image the size that the model sees, each layer's features, the labels, and the sample type."""
        item = self.dataset[image]
        if self._crop_size:
            _crop_center(item, self._crop_size)
        shared = SharedEncoderPass(self.encoder)
        self._reader.backbone.read = shared.reader(0)
        batch = self._reader.data_preprocessor(pseudo_collate([item]), True)
        self._reader(**batch, mode="tensor")
        if len(shared.calls) != 1:
            raise ConfigError(f"the model runs its encoder {len(shared.calls)} times per image; a sweep allows one run")
        sample = batch["data_samples"][0]
        maps = {k: v.data for k, v in sample.items() if k.startswith("gt_") and isinstance(v, PixelData)}
        labels = {name: _compact(values.cpu()) for name, values in maps.items()}
        layers = [{key: values[0].to(self.dtype) for key, values in layer.items()} for layer in shared.calls[0]]
        if not all(values.isfinite().all() for layer in layers for values in layer.values()):
            raise ConfigError(f"the maps exceed the range of {str(self.dtype).removeprefix('torch.')}; use bfloat16")
        return tuple(batch["inputs"].shape[-2:]), layers, labels, type(sample)

    def fill(self, progress: Progress = iter) -> None:
        """Run the encoder over the images that the cache does not hold yet.

        Raises DatasetError for images of another size than the first, and ConfigError if the cache does not match the
        encoder's maps.
        """
        first = self.cache.first_missing
        if first:
            self._verify(0)
            self._verify(first - 1)
        for row in progress(range(first, len(self.images))):
            size, layers, labels, _ = self._encode(self.images[row])
            rows = self._rows(layers, labels)
            if size != self._size or any(x.shape != self.cache.shapes[name][0] for name, x in rows.items()):
                raise DatasetError(
                    f"training image {self.images[row]} reaches the model as {size[0]}x{size[1]} and the first one as "
                    f"{self._size[0]}x{self._size[1]}; probes train on batches of one size, so add a crop to the config"
                )
            for name, values in rows.items():
                self.cache.write(name, row, values)
            if (row + 1) % _FLUSH_INTERVAL == 0:
                self.cache.flush(row + 1)
        self.cache.flush(len(self.images))

    def _rows(self, layers: Sequence[Features], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the row of one image in each array of the cache."""
        rows = dict(labels)
        for names, features in zip(self._arrays.values(), layers, strict=True):
            rows |= {names[key]: values for key, values in features.items()}
        return rows

    def _verify(self, row: int) -> None:
        """Raise ConfigError if a row of the cache differs from what the encoder gives now."""
        _, layers, labels, _ = self._encode(self.images[row])
        for name, values in self._rows(layers, labels).items():
            cached, values = self.cache.read(name, row).float(), values.cpu().float()
            if not (cached - values).abs().max() <= 0.01 * values.abs().max():
                raise ConfigError(f"row {row} of {self.cache.path(name)} is damaged; delete {self.cache.folder}")

    def _build(self, layer: int) -> Any:
        """Return the config's model with a new head on `layer` and without the encoder."""
        backbone = dict(type=CachedEncoder, encoder=self.encoder, out_indices=[layer] * self._times_read)
        set_random_seed(self.seed)
        return MODELS.build({**self.cfg.model, "backbone": backbone})

    def train(self, layer: int, hooks: Sequence[Hook] = ()) -> bool:
        """Train the probe of `layer` with the config's schedule; return False if a finished one was loaded instead.

        Its logs are in the folder layer_N, its weights, those after the last step, in layer_N.safetensors.
        """
        model = self._build(layer)
        path, key = self.folder / f"layer_{layer:02d}.safetensors", self._training_key(layer)
        finished = False
        if path.is_file():
            with safe_open(path, framework="pt") as file:
                finished = (file.metadata() or {}).get("key") == key
        if not finished:
            preprocessor = model.data_preprocessor
            model.data_preprocessor = CachedPreprocessor(model.backbone, self._size)
            self._runner(model, layer, hooks).train()
            model.data_preprocessor = preprocessor.to(get_device())
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            with atomic_write(path) as unfinished:
                save_file(state, unfinished, {"key": key})
        model.load_state_dict(load_file(path))
        self._probes[layer] = model.to(get_device()).eval()
        return not finished

    def _runner(self, model: nn.Module, layer: int, hooks: Sequence[Hook]) -> Runner:
        about = dict(labels=self._labels, sample_type=self._sample_type, metainfo=self.dataset.metainfo)
        data = CachedSamples(self.cache, arrays=self._arrays[layer], **about)
        keys = ("train_cfg", "optim_wrapper", "param_scheduler", "log_processor")
        return Runner(
            **{key: self.cfg.get(key) for key in keys},
            model=model,
            work_dir=str(self.folder / f"layer_{layer:02d}"),
            train_dataloader={**self.cfg.train_dataloader, "dataset": data},
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
        return digest([self.cache.folder.name, self._arrays[layer], self.cfg.model, loader, recipe, self.seed])

    def evaluate(self, progress: Progress = iter) -> dict[int, dict[str, float]]:
        """Return the config's own metrics of every trained layer; the encoder runs once for all of them."""
        loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=self.seed)
        evaluators = {layer: Evaluator(copy.deepcopy(self.cfg.val_evaluator)) for layer in self._probes}
        for evaluator in evaluators.values():
            evaluator.dataset_meta = loader.dataset.metainfo
        with torch.no_grad():
            for batch in progress(loader):
                shared = SharedEncoderPass(self.encoder)
                for layer, model in self._probes.items():
                    model.backbone.read = shared.reader(self.layers.index(layer))
                    evaluators[layer].process(model.test_step(batch), batch)
        results = {layer: evaluator.evaluate(len(loader.dataset)) for layer, evaluator in evaluators.items()}
        return {layer: {name: float(value) for name, value in result.items()} for layer, result in results.items()}


def _check_config(cfg: Config) -> tuple[int, int]:
    """Return the number of the encoder's blocks and how often the head reads its layer.

    Raises ConfigError unless the maps of the config's model can be cached.
    """
    model = cfg.model
    if "decode_head" not in model or (model.get("backbone") or {}).get("type") != "PerceptionEncoder":
        raise ConfigError(
            f"a {model.get('type')} cannot be swept; give a model with a PerceptionEncoder as backbone and a "
            "decode_head, such as LinearProbe. Maps of detectors cannot be cached: the pyramid is trained inside the "
            "backbone, and each image is seen at random scales"
        )
    if cfg.get("launcher", "none") != "none":
        raise ConfigError("a layer sweep runs in one process; omit --launcher")
    if "pipeline" not in cfg.train_dataloader.dataset:
        kind = cfg.train_dataloader.dataset.type
        raise ConfigError(f"the training set is a {kind}, which has no pipeline; use the dataset that it wraps")
    with torch.device("meta"):
        encoder = MODELS.build(model).backbone
    if len(set(encoder.out_indices)) != 1:
        raise ConfigError(f"the config's head reads layers {encoder.out_indices}; a sweep needs a head that reads one")
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained:
        many = f"{len(trained)} parameters of the encoder are trained (such as {trained[0]})"
        raise ConfigError(f"{many}, so its maps change and cannot be cached; freeze the encoder")
    return encoder.config.depth, len(encoder.out_indices)


def _check_layers(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    chosen = range(depth) if layers is None else layers
    if not chosen or not all(-depth <= layer < depth for layer in chosen):
        names = ", ".join(map(str, chosen)) or "empty"
        raise ConfigError(f"layers are {names}; the encoder has blocks 0 to {depth - 1} (or {-depth} to -1)")
    return tuple(sorted({layer % depth for layer in chosen}))


def _name(step: Mapping[str, Any]) -> str:
    return str(getattr(step["type"], "__name__", step["type"])).rpartition(".")[2]


def _crop_size(pipeline: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the (height, width) of the pipeline's random crop, if it has one."""
    for step in pipeline:
        if _name(step).endswith("RandomCrop"):
            size = step.get("crop_size", step.get("size"))
            return (size, size) if isinstance(size, int) else tuple(size)
    return None


def _crop_center(item: dict[str, Any], size: tuple[int, int]) -> None:
    """Crop the image and its labels, in place, to at most (height, width) around the center."""
    h, w = item["inputs"].shape[-2:]
    top, left = max(h - size[0], 0) // 2, max(w - size[1], 0) // 2
    window = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    item["inputs"] = item["inputs"][window]
    for name, value in list(item["data_samples"].items()):
        if isinstance(value, PixelData):
            setattr(item["data_samples"], name, PixelData(data=value.data[window]))


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


def _compact(values: Tensor) -> Tensor:
    """Store class numbers in two bytes instead of eight."""
    if values.dtype != torch.int64:
        return values
    if values.abs().max() > 32767:
        raise ConfigError(f"a label is {int(values.abs().max())}; at most 32767 can be cached")
    return values.to(torch.int16)
