"""Repeated sampling of images with rare classes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DATA_SAMPLERS
from torch import Tensor

from pe_spatial.errors import ConfigError


def repeat_factors(labels: Sequence[Sequence[int]], repeat_thr: float) -> Tensor:
    """Return how often to show each image (images,), at least 1, from the labels of its objects.

    For a class in a fraction f of the images it is max(1, sqrt(repeat_thr / f)), for an image the maximum over its
    classes (detectron2@02b5c4e:detectron2/data/samplers/distributed_sampler.py).
    """
    classes = [np.unique(np.asarray(of_image, dtype=np.int64)) for of_image in labels]
    images = np.repeat(np.arange(len(classes)), [len(of_image) for of_image in classes])
    flat = np.concatenate(classes)
    share = np.bincount(flat)[flat] / len(classes)
    factors = np.ones(len(classes))
    np.maximum.at(factors, images, np.sqrt(repeat_thr / share))
    return torch.from_numpy(factors).float()


@DATA_SAMPLERS.register_module()
class RepeatFactorSampler(InfiniteSampler):
    """Infinite, shuffled sampler that shows images of rare classes more often.

    Repeat factors are rounded at random in every epoch, so that they are exact on average (mmengine's
    ClassBalancedDataset rounds them up).

    Args:
        dataset: a dataset, or a wrapper, with instances with bbox_label in `get_data_info`.
        repeat_thr: images of a class are repeated if it occurs in less than this fraction of images, in (0, 1].
        seed: random seed of the shuffle, the same in all processes; None agrees on one.
    """

    def __init__(self, dataset: Any, *, repeat_thr: float = 0.001, seed: int | None = None) -> None:
        if not 0 < repeat_thr <= 1:
            raise ConfigError(f"repeat_thr is {repeat_thr}; give a fraction of the images in (0, 1]; 0.001 as released")
        super().__init__(dataset, shuffle=True, seed=seed)
        infos = map(dataset.get_data_info, range(len(dataset)))
        self.factors = repeat_factors([[i["bbox_label"] for i in info["instances"]] for info in infos], repeat_thr)

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        fractions = self.factors.frac()
        while True:
            up = torch.rand(self.size, generator=generator) < fractions
            indices = torch.arange(self.size).repeat_interleave(self.factors.long() + up)
            yield from indices[torch.randperm(len(indices), generator=generator)].tolist()
