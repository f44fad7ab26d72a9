"""Training on cached features: the encoder is frozen and the images are fixed, so its maps are computed once.

Data loader, samples and preprocessor stay; where a batch reaches the encoder, its maps are read from the disk instead.
With K views each image is seen in K fixed random augmentations.
"""

import dataclasses
import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import barrier, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pe_spatial.engine.determinism import SeededIndex, seed_augmentation
from pe_spatial.engine.feature_cache import DTYPES, FeatureCache, digest, layer_digests
from pe_spatial.engine.nodes import pipelines, type_name
from pe_spatial.engine.weights import plain_model
from pe_spatial.errors import ConfigError, DatasetError, listed, one_of

Progress = Callable[[Iterable[Any]], Iterable[Any]]
"""Wraps an iteration to show its progress, such as `tqdm`."""

Features = tuple[tuple[Tensor, ...], tuple[Tensor, ...]]
"""What `forward_with_class_tokens` returns: maps (B, C, h, w) and class tokens (B, C) of each layer."""

_LABELS = ("LoadAnnotations", "LoadPanopticAnnotations", "LoadObjectLabels", "LoadDepth", "SeedAugmentation")
_TRIES = 8  # draws of an image that must be equal without views


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """Where features are kept, and how: `dtype` is a key of `DTYPES`, `views` the augmentations of each image."""

    folder: str | Path
    dtype: str = "float32"
    views: int = 1

    def __post_init__(self) -> None:
        one_of("the type of cached features", self.dtype, tuple(DTYPES))
        if self.views < 1:
            raise ConfigError(f"{self.views} views of each image are cached; give at least 1")


class CachedFeatures:
    """The features of the images of a training set, by the encoder of a model.

    Args:
        model: its `backbone` is an encoder, or has one as `encoder`, which is frozen and has its weights.
        dataset: training set; its items have inputs (3, H, W) and data_samples.
        options: of the cache.
        transform: what makes an input of an image, as JSON values, for instance `input_transform(cfg)`.
        batch_size: images per forward pass. With that of training, float32 features equal those of training to the
            last bit.
        workers: processes that read images.
        context: makes a context for forward passes, such as autocast.

    Raises ConfigError for an encoder that trains, for images that are augmented at random without views, for views
    without augmentation, and for a folder with other features; DatasetError for images of several sizes.
    """

    def __init__(
        self,
        model: Any,
        dataset: Any,
        options: CacheOptions,
        *,
        transform: Any = None,
        batch_size: int = 1,
        workers: int = 0,
        context: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.model, self.dataset, self.views = model, dataset, options.views
        self.batch_size, self.workers, self.context = batch_size, workers, context
        self.encoder = frozen_encoder(model)
        self.layers = tuple(dict.fromkeys(self.encoder.out_indices))
        origin = getattr(dataset, "_get_ori_dataset_idx", int)  # of repeated images
        keys = [origin(i) for i in range(len(dataset))]
        images = {key: i for i, key in reversed(list(enumerate(keys)))}
        rows = {key: row for row, key in enumerate(sorted(images, key=images.__getitem__))}
        self.row_of = [rows[key] for key in keys]
        self.images = sorted(images.values())
        with own_random_numbers():
            self._check_augmentation()
            self._size, first = self._encode([self._item(row) for row in self._filled(range(1))])
        arrays = {name: (tuple(values.shape[1:]), values.dtype) for name, values in first.items()}
        digests = layer_digests(self.encoder, self.layers)
        self.cache = FeatureCache(
            options.folder,
            self._about(transform),
            arrays,
            {name: digests[int(name.split("_")[1])] for name in arrays},
            rows=len(self.images) * self.views,
            dtype=options.dtype,
            batch=batch_size,
        )
        self.error = max(self.cache.error(values) for values in first.values())
        self._strides = {name: values.stride() for name, values in first.items()}
        self._verify(first)

    def _about(self, transform: Any) -> dict[str, Any]:
        encoder = self.encoder
        geometry = getattr(encoder, "geometry", None)
        files = [_identity(self.dataset.get_data_info(i), labels=self.views > 1) for i in self.images]
        return {
            "encoder": getattr(encoder, "variant", None) or digest(str(encoder.config)),
            "geometry": dataclasses.asdict(geometry) if geometry else str(getattr(encoder, "final_norm", None)),
            "image set": {"images": len(files), "files": digest(files)},
            "input": {"transform": digest(transform), "size": list(self._size), "views": self.views},
            "computed in": str(self._precision()).removeprefix("torch."),
        }

    def _precision(self) -> torch.dtype:
        one = torch.ones(1, 1, device=next(self.encoder.parameters()).device)
        with self.context():
            return (one @ one).dtype

    def describe(self) -> str:
        """Return a sentence on what is cached, with the error of its type."""
        kind = str(self.cache.dtype or self._precision()).removeprefix("torch.")
        error = f"relative error {self.error:.1e}" if self.error else "exact"
        views = f" in {self.views} views" if self.views > 1 else ""
        blocks = ", ".join(map(str, self.layers))
        what = f"{len(self.images)} images{views}, layers {blocks}, {kind} ({error})"
        return f"features of {what}, in {self.cache.folder}"

    def _check_augmentation(self) -> None:
        """Draw the first images several times and compare."""
        names = [type(one).__name__ for one in _transforms(self.dataset)]
        same = True
        for i in self.images[:2]:
            draws = [self._draw(i, number)["inputs"] for number in range(_TRIES)]
            same &= all(torch.equal(draws[0], other) for other in draws[1:])
        if not same and self.views == 1:
            chance = [name for name in names if "Random" in name or "Distort" in name or "Aug" in name]
            raise ConfigError(
                f"the training images are augmented at random ({listed(chance or names)}), so their features cannot be "
                "computed once; cache K views of each image (--cache-views K), or read them without (--no-augmentation)"
            )
        if same and self.views > 1:
            raise ConfigError(f"{self.views} views of an image are equal: nothing augments it; omit --cache-views")

    def _draw(self, image: int, view: int) -> dict[str, Any]:
        with own_random_numbers(image, view):
            return self.dataset[SeededIndex(image, image, view)]

    def _item(self, row: int) -> dict[str, Any]:
        return self._draw(self.images[row // self.views], row % self.views)

    def _filled(self, rows: range) -> list[int]:
        """Return rows, with the last one repeated to complete batches: small batches may differ in their last bits."""
        return [*rows, *[rows[-1]] * (-len(rows) % self.batch_size)]

    @torch.no_grad()
    def _encode(self, items: Sequence[Mapping[str, Any]]) -> tuple[tuple[int, int], dict[str, Tensor]]:
        """Return the size (H, W) that the encoder sees, and the rows (B, ...) of each array."""
        samples, images = [], []
        for item in items:
            batch = self.model.data_preprocessor(pseudo_collate([item]), True)
            samples += batch["data_samples"]
            images.append(batch["inputs"])
            if images[-1].shape != images[0].shape:
                sizes = [f"{one.shape[-2]}x{one.shape[-1]}" for one in (images[0], images[-1])]
                raise DatasetError(
                    f"training images reach the model as {sizes[0]} and as {sizes[1]}; cached features need one size: "
                    "pad to it (data_preprocessor.pad_size_divisor), or add a crop or a resize to the config"
                )
        size, (maps, tokens) = self._stop_at_encoder(torch.cat(images), samples)
        rows = {array_name(layer): values for layer, values in zip(self.encoder.out_indices, maps, strict=True)}
        for layer, values in zip(self.encoder.out_indices, tokens or (), strict=bool(tokens)):
            rows[array_name(layer, "token")] = values
        return size, rows

    def _stop_at_encoder(self, images: Tensor, samples: Sequence[Any]) -> tuple[tuple[int, int], Features]:
        """Run the model until its encoder has run."""
        original, found = self.encoder.forward_with_class_tokens, []

        def stop(inputs: Tensor) -> Features:
            found.append(((inputs.shape[-2], inputs.shape[-1]), original(inputs)))
            raise _Encoded

        self.encoder.forward_with_class_tokens = stop
        try:
            with self.context():
                self.model(images, samples, mode="loss")
        except _Encoded:
            pass
        finally:
            del self.encoder.forward_with_class_tokens
        if not found:
            raise ConfigError(f"a {type(self.model).__name__} computes its loss without its encoder; omit the cache")
        return found[0]

    def _verify(self, first: Mapping[str, Tensor]) -> None:
        """Raise DatasetError if the first row of the cache differs from what the encoder gives now."""
        for name, values in first.items():
            if self.cache.has(name, 0):
                exact = values[0].cpu().float()
                if not (self.cache.read(name, 0).float() - exact).abs().max() <= 0.02 * exact.abs().max():
                    raise DatasetError(f"{self.cache.path(name, 0)} is damaged; delete {self.cache.folder}")

    def fill(self, progress: Progress = iter) -> None:
        """Compute the blocks that the cache lacks; the processes of a run share them."""
        missing = self.cache.missing[get_rank() :: get_world_size()]
        size = self.batch_size
        batches = [
            rows[start : start + size]
            for rows in (self._filled(self.cache.rows_of(block)) for block in missing)
            for start in range(0, len(rows), size)
        ]
        read = _Batches(self, batches)
        with own_random_numbers():
            loader = DataLoader(read, batch_size=None, num_workers=self.workers, collate_fn=list)
            pending: list[dict[str, Tensor]] = []
            for items in progress(loader):
                shape, rows = self._encode(items)
                if shape != self._size:
                    raise DatasetError(
                        f"training images reach the encoder as {shape[0]}x{shape[1]} and the first ones as "
                        f"{self._size[0]}x{self._size[1]}; cached features need one size: pad to it "
                        "(data_preprocessor.pad_size_divisor), or add a crop or a resize to the config"
                    )
                pending.append({name: values.cpu() for name, values in rows.items()})
                count = len(self.cache.rows_of(missing[0]))
                if len(pending) * size >= count:
                    values = {name: torch.cat([one[name] for one in pending])[:count] for name in pending[0]}
                    self.cache.write(missing.pop(0), values)
                    pending = []
        barrier()

    def samples(self, layers: Sequence[int] | None = None) -> "CachedDataset":
        """Return the training set with the features of these layers; None for all."""
        names = [name for name in self.cache.arrays if layers is None or int(name.split("_")[1]) in layers]
        return CachedDataset(self, names)

    def feed(self, model: Any, encoder: Any) -> None:
        """Let `encoder`, of `model`, return the features that a batch of `samples` brings instead of computing them."""
        waiting: list[dict[str, Tensor]] = []
        original: Any = getattr(encoder, "forward_with_class_tokens", None)

        def take(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            waiting.clear()
            cached = arguments[0].pop(_KEY, None) if isinstance(arguments[0], dict) else None
            if cached is not None:
                waiting.append(cached)

        def forward_with_class_tokens(images: Tensor) -> Features:
            if not waiting:
                return original(images)
            if tuple(images.shape[-2:]) != self._size:
                size = tuple(images.shape[-2:])
                raise DatasetError(f"images of {size} px reach the encoder, and those of the cache had {self._size}")
            rows = waiting.pop()
            stacked = {name: torch.stack(list(values)) for name, values in rows.items()}
            arrays = {name: self._as_computed(name, values, images.device) for name, values in stacked.items()}
            layers = encoder.out_indices
            maps = tuple(arrays[array_name(layer)] for layer in layers)
            return maps, tuple(arrays[name] for layer in layers if (name := array_name(layer, "token")) in arrays)

        model.data_preprocessor.register_forward_pre_hook(take)
        encoder.forward_with_class_tokens = forward_with_class_tokens

    def _as_computed(self, name: str, values: Tensor, device: torch.device) -> Tensor:
        """Return features (B, ...) in the memory layout of the encoder, which decides on the last bits of a head."""
        result = torch.empty_strided(values.shape, self._strides[name], dtype=values.dtype, device=device)
        return result.copy_(values)


_KEY = "cached_features"


class _Encoded(Exception):
    """Ends a forward pass behind the encoder."""


class _Batches(Dataset[list[dict[str, Any]]]):
    def __init__(self, features: CachedFeatures, batches: Sequence[Sequence[int]]) -> None:
        self.features, self.batches = features, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, number: int) -> list[dict[str, Any]]:
        return [self.features._item(row) for row in self.batches[number]]


class CachedDataset(Dataset[dict[str, Any]]):
    """A training set whose items bring their features; other attributes are those of the training set."""

    def __init__(self, features: CachedFeatures, names: Sequence[str]) -> None:
        self._features, self._names = features, tuple(names)

    def __len__(self) -> int:
        return len(self._features.row_of)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self._features
        row = features.row_of[index] * features.views
        if features.views > 1:
            seed = getattr(index, "seed", None)
            row += (random.Random(str(seed)) if seed else random).randrange(features.views)
        return {**features._item(row), _KEY: {name: features.cache.read(name, row) for name in self._names}}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_features":
            raise AttributeError(name)
        return getattr(self._features.dataset, name)

    def __getstate__(self) -> dict[str, Any]:  # for data workers that are spawned: without the model
        features = object.__new__(CachedFeatures)
        kept = ("dataset", "views", "row_of", "images", "cache")
        features.__dict__.update({key: getattr(self._features, key) for key in kept})
        return {"_features": features, "_names": self._names}


def array_name(layer: int, kind: str = "map") -> str:
    """Return the name of the array of a layer's maps or class tokens ('token')."""
    return f"layer_{layer:02d}_{kind}"


def frozen_encoder(model: Any) -> Any:
    """Return the encoder of a model; ConfigError if it has none, or one that trains."""
    backbone = getattr(model, "backbone", None)
    encoder: Any = getattr(backbone, "encoder", backbone)
    if not hasattr(encoder, "forward_with_class_tokens"):
        raise ConfigError(
            f"a {type(model).__name__} has no encoder of this package as its backbone, whose features could be cached; "
            "swap its backbone (--swap VARIANT), or omit the cache"
        )
    if getattr(encoder, "lora", None) is not None:
        raise ConfigError("the encoder trains LoRA adapters, so its features change; omit backbone.lora or the cache")
    trained = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    if trained:
        raise ConfigError(
            f"{len(trained)} parameters of the encoder are trained (such as {trained[0]}), so its features change and "
            f"cannot be cached; freeze the encoder: --freeze {encoder.depth}"
        )
    if any(hasattr(parameter, "full_tensor") for parameter in encoder.parameters()):
        raise ConfigError("the encoder is sharded over processes; cached features need it whole: omit ShardedRunner")
    return encoder


def input_transform(cfg: Config) -> Any:
    """Return what makes an input of an image in a config of a training, as nested lists and dictionaries."""
    steps = [
        dict(step)
        for pipeline in pipelines({"train_dataloader": cfg.train_dataloader})
        for step in pipeline
        if type_name(step) not in _LABELS and not type_name(step).startswith(("Pack", "Filter"))
    ]
    return [steps, cfg.model.get("data_preprocessor")]


@contextmanager
def own_random_numbers(*seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch on the CPU, if there are numbers, and restore all of them at the end."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    if seed:
        torch.default_generator.manual_seed(seed_augmentation(seed))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _identity(info: Mapping[str, Any], *, labels: bool) -> Any:
    """Return what tells an image from others: its name, size and time; with its labels, which steer augmentation."""
    path = str(info["img_path"])
    stat = os.stat(path) if os.path.isfile(path) else None
    known = [os.path.basename(path), *([stat.st_size, stat.st_mtime_ns] if stat else [])]
    return [known, {key: value for key, value in info.items() if not key.endswith("_path")}] if labels else known


def _transforms(dataset: Any) -> list[Any]:
    while getattr(dataset, "pipeline", None) is None and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return list(getattr(getattr(dataset, "pipeline", None), "transforms", ()))


@HOOKS.register_module()
class CacheFeaturesHook(Hook):
    """Train on cached features; before the first step the missing ones are computed. Options: `CacheOptions`."""

    priority = "LOW"

    def __init__(self, **options: Any) -> None:
        self.options = CacheOptions(**options)

    def before_train(self, runner: Runner) -> None:
        """Fill the cache, and let the training read it."""
        from tqdm import tqdm

        model, loader = plain_model(runner.model), runner.train_dataloader
        model.train()
        features = CachedFeatures(
            model,
            loader.dataset,
            self.options,
            transform=input_transform(runner.cfg),
            batch_size=loader.batch_size or loader.batch_sampler.batch_size,
            workers=loader.num_workers,
            context=lambda: runner.optim_wrapper.optim_context(runner.model),
        )
        missing = features.cache.bytes_missing
        features.fill(lambda batches: tqdm(batches, desc="features", unit="batch", disable=get_rank() > 0, leave=False))
        runner.logger.info(f"{features.describe()}; {missing / 1e9:.2f} GB were computed now")
        features.feed(model, features.encoder)
        loader.__dict__["dataset"] = features.samples()  # DataLoader refuses to have it set
        loop: Any = runner.train_loop
        if getattr(getattr(loop, "dataloader_iterator", None), "_iterator", None):  # MMEngine 0.10.7 starts it early
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loader)
