"""Which layer of a frozen encoder is best for one's own data: a probe for each layer, trained on cached maps.

The encoder runs once over the training images, which are read as in testing, and what its layers say is kept on disk.
On that a probe trains for each layer: the config's own head, loss, optimizer and schedule. Without augmentation, that
is, so scores are lower than those of the full recipe; it is their order that counts. Evaluation is the config's own.

What a model needs for that: a `backbone` that is an encoder of this package, is frozen and of which one layer is read,
and a `decode_head` that learns; one image in mode 'tensor' runs the encoder once. So `LinearProbe` and
`DepthEstimator` are.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.model import BaseDataPreprocessor
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed
from mmengine.structures import PixelData
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
from pe_spatial.atomic import atomic_write
from pe_spatial.errors import ConfigError, DatasetError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
HIGHER_IS_BETTER = {
    **dict.fromkeys(("mIoU", "mDice", "mAcc", "aAcc"), True),
    **dict.fromkeys(("rmse", "abs_rel", "sq_rel", "rmse_log", "log10", "silog", "mae"), False),
    **dict.fromkeys(("d1", "d2", "d3"), True),
}
"""Scores whose direction is known; without another wish, layers are compared by the first of them that there is."""

Track = Callable[[Iterable[Any]], Iterable[Any]]
_FLUSH = 64  # images between two notes of how far the cache is
_Layer = dict[str, Tensor]  # 'maps': a map (B, C, h, w); 'tokens': the class token (B, C), where there is one


@MODELS.register_module()
class CachedEncoder(nn.Module):
    """Stands in a model where its encoder was, and returns what `read(images)` has for one of its layers.

    Args:
        encoder: the one that is replaced.
        out_indices: the block, 0-based, as often as the head reads it.
    """

    def __init__(self, encoder: nn.Module, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.config = encoder.config
        self.patch_size: int = encoder.patch_size  # type: ignore[assignment]
        self.embed_dim: int = encoder.embed_dim  # type: ignore[assignment]
        self.prefix = getattr(encoder, "prefix", 0)
        self.out_indices = tuple(out_indices)
        self.read: Callable[[Tensor], _Layer]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `PerceptionEncoder.forward`."""
        return (self.read(images)["maps"],) * len(self.out_indices)

    def forward_with_class_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As that of `PerceptionEncoder`."""
        layer, times = self.read(images), len(self.out_indices)
        return (layer["maps"],) * times, (layer["tokens"],) * times


class _SharedEncoderPass:
    """Runs the encoder for the first of several models that ask for the same images in the same order."""

    def __init__(self, encoder: nn.Module) -> None:
        self.encoder = encoder
        self.calls: list[list[_Layer]] = []

    def reader(self, column: int) -> Callable[[Tensor], _Layer]:
        """Return what another model, which reads the layer at `column`, calls in the place of the encoder."""
        asked = 0

        def read(images: Tensor) -> _Layer:
            nonlocal asked
            if asked == len(self.calls):
                self.calls.append(self._encode(images))
            asked += 1
            return self.calls[asked - 1][column]

        return read

    @torch.no_grad()
    def _encode(self, images: Tensor) -> list[_Layer]:
        if hasattr(self.encoder, "forward_with_class_tokens"):
            maps, tokens = self.encoder.forward_with_class_tokens(images)
        else:
            maps, tokens = self.encoder(images), ()
        layers = [dict(maps=patches) for patches in maps]
        for layer, token in zip(layers, tokens):  # noqa: B905  (there are as many, or none)
            layer["tokens"] = token
        return layers


class _FromCache(BaseDataPreprocessor):
    """Hands the cached maps of a batch to the stand-in; the images themselves are not there any more."""

    def __init__(self, stand_in: CachedEncoder, size: Sequence[int]) -> None:
        super().__init__()
        self.stand_in, self.size = stand_in, tuple(size)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:  # noqa: ARG002
        data = self.cast_data(data)
        layer = {key: torch.stack(data[key]).float() for key in ("maps", "tokens") if key in data}
        self.stand_in.read = lambda _: layer
        images = torch.zeros((), device=self.device).expand(len(data["maps"]), 3, *self.size)
        return dict(inputs=images, data_samples=data["data_samples"])


class _Cache:
    """Arrays on disk with one row for each image, filled from the first row on; rows.json says how far each is.

    Args:
        folder: of the files.
        rows: images.
        shapes: file name without suffix -> shape of a row and its type.
    """

    def __init__(self, folder: Path, rows: int, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        self.folder, self.rows, self.shapes = folder, rows, dict(shapes)
        self.done: dict[str, int] = dict.fromkeys(shapes, 0)
        if self._state.is_file():
            known = json.loads(self._state.read_text())
            self.done = {name: known.get(name, 0) if self._fits(name) else 0 for name in shapes}
        self._files: dict[str, np.ndarray] = {}

    @property
    def _state(self) -> Path:
        return self.folder / "rows.json"

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _fits(self, name: str) -> bool:
        try:
            return np.load(self._path(name), mmap_mode="r").shape == (self.rows, *self.shapes[name][0])
        except (OSError, ValueError):  # absent, or shorter than its header says
            return False

    @property
    def bytes_missing(self) -> int:
        """Of the rows that are not there."""
        return sum((self.rows - self.done[name]) * self._row_bytes(name) for name in self.shapes)

    def _row_bytes(self, name: str) -> int:
        shape, dtype = self.shapes[name]
        return int(np.prod(shape)) * dtype.itemsize

    @property
    def first_missing(self) -> int:
        """The first row that one of the files lacks."""
        return min(self.done.values())

    def read(self, name: str, row: int) -> Tensor:
        """Return a row."""
        dtype = self.shapes[name][1]
        values = torch.from_numpy(np.array(self._open(name)[row]))
        return values.view(dtype) if dtype == torch.bfloat16 else values

    def write(self, name: str, row: int, values: Tensor) -> None:
        """Write a row."""
        values = values.cpu().contiguous()
        self._open(name)[row] = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()

    def flush(self, done: int) -> None:
        """Put the rows on disk, and then note that the first `done` of every file are."""
        for file in self._files.values():
            file.flush()  # type: ignore[attr-defined]
        self.done = {name: max(done, rows) for name, rows in self.done.items()}
        known = json.loads(self._state.read_text()) if self._state.is_file() else {}
        _write(self._state, json.dumps({**known, **self.done}, indent=1).encode())

    def _open(self, name: str) -> np.ndarray:
        if name not in self._files:
            shape, dtype = self.shapes[name]
            if not self._fits(name):
                self.folder.mkdir(parents=True, exist_ok=True)
                kind = np.dtype("int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
                np.lib.format.open_memmap(self._path(name), "w+", kind, (self.rows, *shape))
            self._files[name] = np.load(self._path(name), mmap_mode="r+")
        return self._files[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # a copy of a mapped array would hold all of it in memory


class _CachedSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """The training set of one layer's probe."""

    def __init__(
        self,
        cache: _Cache,
        *,
        files: Mapping[str, str],
        labels: Sequence[str],
        sample: type,
        metainfo: Mapping[str, Any],
    ) -> None:
        self.cache, self.files, self.labels, self.sample, self.metainfo = cache, files, labels, sample, metainfo

    def __len__(self) -> int:
        return self.cache.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        sample = self.sample()
        for name in self.labels:
            values = self.cache.read(name, row)
            setattr(sample, name, PixelData(data=values.long() if values.dtype == torch.int16 else values))
        return {**{key: self.cache.read(name, row) for key, name in self.files.items()}, "data_samples": sample}


class LayerSweep:
    """A probe for each of some layers; call `fill`, then `train` for each layer, then `evaluate`.

    Args:
        cfg: the configuration of a probe; its `out_indices` is replaced.
        layers: blocks of the encoder, 0-based, negative ones counted from the end; None for all.
        folder: for the cache, the heads and the results.
        dtype: of the cached maps: 'float32' is exact, 'float16' and 'bfloat16' take half the space.
        limit: use this many training images, evenly spaced in their list; None for all.
        epochs: passes over these images, in the place of the config's schedule, which is compressed to that length.

    Raises ConfigError for models whose maps cannot be cached, for unknown layers and for a disk that is too small.
    """

    def __init__(
        self,
        cfg: Config,
        *,
        layers: Sequence[int] | None,
        folder: str | Path,
        dtype: str = "float32",
        limit: int | None = None,
        epochs: int | None = None,
    ) -> None:
        self.cfg, self.folder = copy.deepcopy(cfg), Path(folder)
        if dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; allowed are {', '.join(DTYPES)}")
        if any(number is not None and number < 1 for number in (limit, epochs)):
            raise ConfigError(f"limit {limit} and epochs {epochs} must be at least 1")
        init_default_scope(cfg.get("default_scope", "mmengine"))
        self.seed: int = (cfg.get("randomness") or {}).get("seed") or 0
        self.depth, self._times = _check(self.cfg)
        self.layers = _blocks(layers, self.depth)
        self.dtype = DTYPES[dtype]
        set_random_seed(self.seed)
        self.encoder = MODELS.build({**self.cfg.model.backbone, "out_indices": list(self.layers)})
        self.encoder.init_weights()
        self.encoder.requires_grad_(False).eval().to(get_device())

        self.dataset = DATASETS.build({**self.cfg.train_dataloader.dataset, "pipeline": self._steps()})
        count = len(self.dataset)
        self.images = np.linspace(0, count - 1, min(limit or count, count)).round().astype(int).tolist()
        self._crop = _training_size(self.cfg.train_dataloader.dataset.pipeline)
        if epochs is not None:
            _set_epochs(self.cfg, -(-len(self.images) // self.cfg.train_dataloader.batch_size) * epochs, epochs)
        self._reading = self._model(self.layers[0]).to(get_device()).eval()  # brings images to the encoder
        self._open_cache()
        self._probes: dict[int, nn.Module] = {}

    def _steps(self) -> list[Any]:
        """The pipeline of evaluation, but with labels read at the beginning, so that they follow the image."""
        steps = self.cfg.val_dataloader.dataset.pipeline
        return sorted(steps, key=lambda step: not _name(step).startswith("Load"))

    def _open_cache(self) -> None:
        size, layers, labels, self._sample = self._features(self.images[0])
        self._size = size
        digests = _digests(self.encoder, self.layers)
        self._labels = list(labels)
        self._files = {  # file names of each layer: its maps and, where the encoder has one, its class tokens
            layer: {key: f"layer_{layer:02d}_{digests[layer]}_{key}" for key in parts}
            for layer, parts in zip(self.layers, layers, strict=True)
        }
        rows = self._rows(layers, labels)
        shapes = {name: (tuple(values.shape), values.dtype) for name, values in rows.items()}
        self.cache = _Cache(self.folder / "cache" / self._data_digest(), len(self.images), shapes)
        existing = next(path for path in [self.folder.resolve(), *self.folder.resolve().parents] if path.exists())
        free = shutil.disk_usage(existing).free
        if self.cache.bytes_missing > free:
            raise ConfigError(
                f"the cache needs {self.cache.bytes_missing / 1e9:.1f} GB more and {self.folder} has "
                f"{free / 1e9:.1f} GB; name fewer layers, take fewer images (limit), or bfloat16 maps"
            )

    def _data_digest(self) -> str:
        """Return a digest of everything that the cached rows follow from but the weights."""
        stat = []
        for i in self.images:
            info = self.dataset.get_data_info(i)
            paths = sorted(value for value in info.values() if isinstance(value, str) and os.path.isfile(value))
            stat.append([_plain(info), [[os.path.getsize(path), os.stat(path).st_mtime_ns] for path in paths]])
        backbone = {k: v for k, v in self.cfg.model.backbone.items() if k not in ("out_indices", "init_cfg")}
        preprocessor = self.cfg.model.get("data_preprocessor")
        return _digest([backbone, preprocessor, self._steps(), self._crop, str(self.dtype), stat])

    @torch.no_grad()
    def _features(self, image: int) -> tuple[tuple[int, ...], list[_Layer], dict[str, Tensor], type]:
        """Return for one image the size that the model sees, what each layer says, the labels, and their class."""
        item = self.dataset[image]
        if self._crop:
            _crop_centre(item, self._crop)
        shared = _SharedEncoderPass(self.encoder)
        self._reading.backbone.read = shared.reader(0)
        batch = self._reading.data_preprocessor(pseudo_collate([item]), True)
        self._reading(**batch, mode="tensor")
        if len(shared.calls) != 1:
            raise ConfigError(f"the model runs its encoder {len(shared.calls)} times an image; once can be cached")
        sample = batch["data_samples"][0]
        labels = {k: v.data.cpu() for k, v in sample.items() if k.startswith("gt_") and isinstance(v, PixelData)}
        labels = {name: _small(values) for name, values in labels.items()}
        layers = [{key: values[0].to(self.dtype) for key, values in layer.items()} for layer in shared.calls[0]]
        if not all(values.isfinite().all() for layer in layers for values in layer.values()):
            raise ConfigError(f"the maps do not fit into {str(self.dtype).removeprefix('torch.')}; take bfloat16")
        return tuple(batch["inputs"].shape[-2:]), layers, labels, type(sample)

    def fill(self, track: Track = iter) -> None:
        """Run the encoder over the images that are not in the cache yet.

        Args:
            track: wraps the iteration, to show how far it is: `tqdm`.

        Raises DatasetError for images of another size than the first, and ConfigError if the cache holds other maps
        than the encoder gives now.
        """
        first = self.cache.first_missing
        if first:
            self._verify(0)
            self._verify(first - 1)
        for row in track(range(first, len(self.images))):
            self._write(row, self._features(self.images[row]))
            if (row + 1) % _FLUSH == 0:
                self.cache.flush(row + 1)
        self.cache.flush(len(self.images))

    def _write(self, row: int, features: tuple[tuple[int, ...], list[_Layer], dict[str, Tensor], type]) -> None:
        size, layers, labels, _ = features
        rows = self._rows(layers, labels)
        if size != self._size or any(x.shape != self.cache.shapes[name][0] for name, x in rows.items()):
            raise DatasetError(
                f"training image {self.images[row]} is {size[0]}x{size[1]} to the model and the first one is "
                f"{self._size[0]}x{self._size[1]}; probes train on batches of one size: have the config crop to one"
            )
        for name, values in rows.items():
            self.cache.write(name, row, values)

    def _rows(self, layers: Sequence[_Layer], labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what an image has for each file of the cache."""
        rows = dict(labels)
        for files, parts in zip(self._files.values(), layers, strict=True):
            rows |= {files[key]: values for key, values in parts.items()}
        return rows

    def _verify(self, row: int) -> None:
        """Raise ConfigError if a row of the cache is not what the encoder gives now."""
        _, layers, labels, _ = self._features(self.images[row])
        for name, now in self._rows(layers, labels).items():
            cached, now = self.cache.read(name, row).float(), now.cpu().float()
            if not (cached - now).abs().max() <= 0.01 * now.abs().max():
                raise ConfigError(f"row {row} of {self.cache.folder / name}.npy is damaged; remove that folder")

    def _model(self, layer: int) -> nn.Module:
        """Return the config's model with a fresh head on `layer`; the encoder is not in it."""
        backbone = dict(type="CachedEncoder", encoder=self.encoder, out_indices=[layer] * self._times)
        set_random_seed(self.seed)
        return MODELS.build({**self.cfg.model, "backbone": backbone})

    def train(self, layer: int, hooks: Sequence[Hook] = ()) -> bool:
        """Train the probe of `layer` with the config's schedule; return False if a finished one was found.

        Its curves are in the folder layer_N, its weights in layer_N.safetensors. The head is as after the last step.
        """
        model = self._model(layer)
        path, key = self.folder / f"layer_{layer:02d}.safetensors", self._training_key(layer)
        found = path.is_file() and _metadata(path).get("key") == key
        if not found:
            preprocessor = model.data_preprocessor
            model.data_preprocessor = _FromCache(model.backbone, self._size)
            data = _CachedSamples(
                self.cache,
                files=self._files[layer],
                labels=self._labels,
                sample=self._sample,
                metainfo=self.dataset.metainfo,
            )
            Runner(
                model=model,
                work_dir=str(self.folder / f"layer_{layer:02d}"),
                train_dataloader={**self.cfg.train_dataloader, "dataset": data},
                train_cfg=self.cfg.train_cfg,
                optim_wrapper=self.cfg.optim_wrapper,
                param_scheduler=self.cfg.get("param_scheduler"),
                default_hooks=dict(checkpoint=None, logger=dict(type="LoggerHook", interval=10)),
                custom_hooks=[*(self.cfg.get("custom_hooks") or ()), *hooks],
                visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
                log_processor=self.cfg.get("log_processor"),
                log_level="WARNING",
                randomness=dict(seed=self.seed),
                default_scope=self.cfg.get("default_scope", "mmengine"),
                experiment_name=f"{self.folder.resolve()}_layer_{layer}",
            ).train()
            model.data_preprocessor = preprocessor.to(get_device())
            state = {name: value.contiguous() for name, value in model.state_dict().items()}
            with atomic_write(path) as unfinished:
                save_file(state, unfinished, {"key": key})
        model.load_state_dict(load_file(path))
        self._probes[layer] = model.to(get_device()).eval()
        return not found

    def _training_key(self, layer: int) -> str:
        loader = {key: value for key, value in self.cfg.train_dataloader.items() if key != "dataset"}
        recipe = [self.cfg.get(key) for key in ("optim_wrapper", "param_scheduler", "train_cfg")]
        return _digest([self.cache.folder.name, self._files[layer], self.cfg.model, loader, recipe, self.seed])

    def evaluate(self, track: Track = iter) -> dict[int, dict[str, float]]:
        """Return the config's own metrics of every trained layer; the encoder runs once for all of them."""
        loader = Runner.build_dataloader(self.cfg.val_dataloader, seed=self.seed)
        evaluators = {layer: Evaluator(copy.deepcopy(self.cfg.val_evaluator)) for layer in self._probes}
        for evaluator in evaluators.values():
            evaluator.dataset_meta = loader.dataset.metainfo
        with torch.no_grad():
            for batch in track(loader):
                shared = _SharedEncoderPass(self.encoder)
                for layer, model in self._probes.items():
                    model.backbone.read = shared.reader(self.layers.index(layer))
                    evaluators[layer].process(model.test_step(batch), batch)
        return {layer: _numbers(evaluator.evaluate(len(loader.dataset))) for layer, evaluator in evaluators.items()}


def _check(cfg: Config) -> tuple[int, int]:
    """Return the depth of the encoder and how often the head reads its layer.

    Raises ConfigError unless the maps of the config's model can be cached.
    """
    model = cfg.model
    if "decode_head" not in model or (model.get("backbone") or {}).get("type") != "PerceptionEncoder":
        raise ConfigError(
            f"a {model.get('type')} is not swept: models with a PerceptionEncoder as backbone and a decode_head are. "
            "Cached maps would not serve a detector, whose pyramid learns inside the backbone and whose recipe shows "
            "every image at random scales, which is another image to the encoder each time"
        )
    if cfg.get("launcher", "none") != "none":
        raise ConfigError("a layer sweep runs in one process; leave --launcher out")
    if "pipeline" not in cfg.train_dataloader.dataset:
        raise ConfigError(f"the training set is a {cfg.train_dataloader.dataset.type}; give the dataset that it wraps")
    with torch.device("meta"):
        encoder = MODELS.build(model).backbone
    if len(set(encoder.out_indices)) != 1:
        raise ConfigError(f"the config's head reads the layers {encoder.out_indices}; a sweep needs one that reads one")
    learned = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if learned:
        raise ConfigError(
            f"{len(learned)} parameters of the encoder learn, {learned[0]} among them, so its maps change from step to "
            "step and cannot be cached; freeze it"
        )
    return encoder.config.depth, len(encoder.out_indices)


def _blocks(layers: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    chosen = range(depth) if layers is None else layers
    unknown = [layer for layer in chosen if not -depth <= layer < depth]
    if unknown or not chosen:
        raise ConfigError(
            f"layers are {', '.join(map(str, chosen)) or 'empty'}; the encoder has blocks 0 to {depth - 1} "
            f"(or {-depth} to -1)"
        )
    return tuple(sorted({layer % depth for layer in chosen}))


def _name(step: Mapping[str, Any]) -> str:
    return str(getattr(step["type"], "__name__", step["type"])).rpartition(".")[2]


def _training_size(steps: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return the (height, width) to which the pipeline crops, if it does."""
    for step in steps:
        if _name(step).endswith("RandomCrop"):
            size = step.get("crop_size", step.get("size"))
            return (size, size) if isinstance(size, int) else tuple(size)
    return None


def _crop_centre(item: dict[str, Any], size: tuple[int, int]) -> None:
    """Cut the image and its labels, in place, to what their middle has of (height, width)."""
    h, w = item["inputs"].shape[-2:]
    top, left = max(h - size[0], 0) // 2, max(w - size[1], 0) // 2
    part = (..., slice(top, top + size[0]), slice(left, left + size[1]))
    item["inputs"] = item["inputs"][part]
    for name, value in list(item["data_samples"].items()):
        if isinstance(value, PixelData):
            setattr(item["data_samples"], name, PixelData(data=value.data[part]))


def _set_epochs(cfg: Config, iterations: int, epochs: int) -> None:
    """Give the schedule another length; its phases keep their shares."""
    key, new = ("max_iters", iterations) if "max_iters" in cfg.train_cfg else ("max_epochs", epochs)
    old = cfg.train_cfg[key]
    cfg.train_cfg[key] = new
    schedules = cfg.get("param_scheduler") or []
    for schedule in [schedules] if isinstance(schedules, Mapping) else schedules:
        for name in ("begin", "end", "T_max", "total_steps", "step_size", "milestones"):
            value = schedule.get(name)
            if value is not None and value != float("inf"):
                points = value if isinstance(value, list) else [value]
                points = [max(round(point * new / old), int(point > 0)) for point in points]
                schedule[name] = points if isinstance(value, list) else points[0]


def _small(values: Tensor) -> Tensor:
    """Class numbers take two bytes on disk; eight are read again."""
    if values.dtype != torch.int64:
        return values
    if values.abs().max() > 32767:
        raise ConfigError(f"a label is {int(values.abs().max())}; numbers to 32767 are cached")
    return values.to(torch.int16)


def _digests(encoder: nn.Module, layers: Sequence[int]) -> dict[int, str]:
    """Return for each layer a digest of the weights that it follows from: those of no block and of blocks up to it."""
    state = {name: value.contiguous().cpu() for name, value in encoder.state_dict().items()}
    blocks = {name: re.search(r"\bblocks\.(\d+)\.", name) for name in state}
    total, result = hashlib.sha256(), {}
    for block in range(-1, max(layers) + 1):
        for name, match in blocks.items():
            if (int(match[1]) if match else -1) == block:
                total.update(name.encode())
                total.update(state[name].flatten().view(torch.uint8).numpy().data)
        if block in layers:
            result[block] = total.hexdigest()[:12]
    return result


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(_plain(value), sort_keys=True).encode()).hexdigest()[:16]


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.metadata() or {}


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items()}


def choose_score(metrics: Mapping[str, float], name: str | None = None) -> tuple[str, bool]:
    """Return the key of the score to compare layers by, and whether higher is better.

    Args:
        metrics: of one layer; keys may have a prefix that ends in a slash.
        name: of `HIGHER_IS_BETTER`; None takes the first there is.
    """
    keys = {key.rpartition("/")[2]: key for key in metrics}
    known = [score for score in HIGHER_IS_BETTER if score in keys]
    chosen = name or next(iter(known), None)
    if chosen not in known:
        raise ConfigError(f"the score {chosen} is not among those of the config: {', '.join(known) or 'none is known'}")
    return keys[chosen], HIGHER_IS_BETTER[chosen]


def best_layer(metrics: Mapping[int, Mapping[str, float]], score: str, higher: bool) -> int:
    """Return the layer with the best score; the deepest of equals; layers without a number (NaN) never win."""
    sign = 1 if higher else -1
    return max(metrics, key=lambda layer: (np.nan_to_num(sign * metrics[layer][score], nan=-np.inf), layer))


def draw_scores(path: str | Path, metrics: Mapping[int, Mapping[str, float]], score: str, best: int) -> None:
    """Draw the score against the layer into a PNG, with the best layer and the last of them marked."""
    layers, last = sorted(metrics), max(metrics)
    figure = Figure(figsize=(6.4, 4), dpi=150, layout="constrained")
    axes = figure.add_subplot(xlabel="block of the encoder, from 0", ylabel=score)
    axes.plot(layers, [metrics[layer][score] for layer in layers], "o-", color="0.5", markersize=4)
    for name, layer, marker in (("best", best, "*"), ("last", last, "s")):
        value = metrics[layer][score]
        axes.plot(layer, value, marker, markersize=12, fillstyle="none" if name == "last" else "full",
                  label=f"{name}: {value:.4g} (block {layer})")  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file)
    _write(Path(path), file.getvalue())


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value`, complete or not at all."""
    _write(Path(path), json.dumps(value, indent=1).encode())


def _write(path: Path, data: bytes) -> None:
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(data)
