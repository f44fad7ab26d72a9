"""The same seed gives the same losses to the last bit, whether a run was interrupted or not.

Nothing is stored: the random numbers of a step follow from (seed, rank, step), those of an image's augmentation from
(seed, rank, number of images drawn before). `make_deterministic` puts it into any config.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, HOOKS, TRANSFORMS
from mmengine.runner import Runner
from torch.utils.data import Sampler

from pe_spatial.engine.weights import plain_model
from pe_spatial.errors import ConfigError


def seed_augmentation(numbers: Sequence[int]) -> int:
    """Seed Python and NumPy from several numbers, so that adjacent ones share nothing; return the seed."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    return seed


def seed_everything(*numbers: int) -> None:
    """Seed Python, NumPy and torch in this way."""
    torch.manual_seed(seed_augmentation(numbers))


class SeededIndex(int):
    """An index into a dataset that carries the seed of its augmentation."""

    seed: tuple[int, ...]

    def __new__(cls, index: int, *seed: int) -> SeededIndex:
        """Return `index` with the numbers from which its augmentation is seeded."""
        self = super().__new__(cls, index)
        self.seed = seed
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the numbers when pickled for a data worker."""
        return SeededIndex, (int(self), *self.seed)


@DATA_SAMPLERS.register_module()
class SeededSampler(Sampler[int]):
    """Wrap a sampler and turn its indices into `SeededIndex`s.

    Args:
        dataset: dataset of the sampler.
        sampler: config of the sampler.
        seed: seed of the run.
    """

    def __init__(self, dataset: Sized, *, sampler: Mapping[str, Any], seed: int | None = None) -> None:
        self.inner = DATA_SAMPLERS.build(dict(sampler), default_args=dict(dataset=dataset, seed=seed))
        self.seed = self.inner.seed
        self.epoch = self.skipped = 0

    def __iter__(self) -> Iterator[int]:
        """Yield the indices of this process."""
        for number, index in enumerate(self.inner, self.skipped):
            yield SeededIndex(index, self.seed, get_rank(), self.epoch, number)

    def __len__(self) -> int:
        """Return the length of the wrapped sampler."""
        return len(self.inner)

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch."""
        self.epoch = epoch
        self.inner.set_epoch(epoch)

    def skip(self, number: int) -> None:
        """Start after `number` indices, as a resumed run does."""
        if not hasattr(self.inner, "skip"):
            raise ConfigError(
                f"a run of iterations cannot resume with a {type(self.inner).__name__}; use InfiniteSampler"
            )
        self.skipped = number
        self.inner.skip(number)


@TRANSFORMS.register_module()
class SeedAugmentation(BaseTransform):
    """Seed Python's and NumPy's random numbers for the augmentation of one image; the first step of a pipeline."""

    def __init__(self) -> None:
        self._seeded = False

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Read the seed from `sample_idx`, a `SeededIndex`; ConfigError if a dataset wrapper lost it.

        An image that replaces a broken one has a plain index and continues with the random numbers of the broken one.
        """
        draw = results.get("sample_idx")
        if isinstance(draw, SeededIndex):
            seed_augmentation(draw.seed)
            self._seeded = True
        elif not self._seeded:
            raise ConfigError(
                f"sample_idx is {draw!r} and carries no seed: a wrapper around the dataset (RepeatDataset, "
                "ConcatDataset, ...) lost it; --deterministic needs the dataset itself"
            )
        return results


@HOOKS.register_module()
class SeedStepHook(Hook):
    """Seed all random numbers of a step (drop path, sampling of proposals, prompts) from the step's number."""

    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        """Seed; a model of several tasks (`step_seed`) seeds before each, so that it computes as it does alone."""
        numbers = runner.seed, get_rank(), runner.iter
        seed_everything(*numbers)
        model: Any = plain_model(runner.model)
        if hasattr(model, "step_seed"):
            model.step_seed = numbers


def make_deterministic(cfg: Config, seed: int) -> None:
    """Change `cfg` so that each run with `seed` gives the same losses."""
    cfg.randomness = dict(seed=seed, deterministic=True)
    if "tasks" in cfg.train_dataloader.dataset:
        cfg.train_dataloader.dataset.deterministic = True  # it seeds the loader of each task
    else:
        seed_loader(cfg.train_dataloader)
    cfg.custom_hooks = [dict(type="SeedStepHook"), *(cfg.get("custom_hooks") or ())]


def seed_loader(loader: Any) -> None:
    """Seed the augmentation of each image that a loader, a config, draws; ConfigError if it has no pipeline."""
    if "pipeline" not in loader.dataset:
        raise ConfigError(
            f"the training dataset is a {loader.dataset.get('type')} without its own pipeline; "
            "--deterministic needs the dataset itself"
        )
    loader.dataset.pipeline = [dict(type="SeedAugmentation"), *loader.dataset.pipeline]
    loader.sampler = dict(type="SeededSampler", sampler=loader.sampler)
