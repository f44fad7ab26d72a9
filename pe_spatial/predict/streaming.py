"""How models of any runtime take images: one, several, or a stream in batches. Importing it needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pe_spatial.errors import ConfigError
from pe_spatial.predict.inputs import ImageLike, ahead, is_single, read_images
from pe_spatial.predict.results import Result


class Streamed:
    """A trained model that takes images and returns results.

    `task` is 'detection', 'segmentation', 'depth' or 'tracking'; `class_names` are the model's classes, if it has any.
    """

    task: str
    class_names: tuple[str, ...] = ()

    def __call__(self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 1) -> Any:
        """Return the result of one image, or the list of results of several.

        Images are paths, PIL images, arrays (H, W, 3) or tensors (3, H, W), both uint8 RGB, and may differ in size.
        Raises DatasetError for an image that cannot be used.
        """
        if is_single(images):
            return next(self.stream([images]))  # type: ignore[list-item]
        return list(self.stream(images, batch_size=batch_size))  # type: ignore[arg-type]

    def stream(self, images: Iterable[ImageLike], *, batch_size: int = 1) -> Iterator[Result]:
        """Yield the result of each image, in order; images are read when they are needed.

        Consecutive images run as one batch where the model gets them in one size, so that a batch changes nothing. A
        thread reads and prepares the next images meanwhile.
        """
        if batch_size < 1:
            raise ConfigError(f"the batch size is {batch_size}; it must be at least 1")
        waiting: list[Any] = []
        for item in ahead(map(self._prepare, read_images(images)), batch_size):
            if waiting and self._shape(waiting[0]) != self._shape(item):
                yield from self._predict(waiting)
                waiting = []
            waiting.append(item)
            if len(waiting) == batch_size:
                yield from self._predict(waiting)
                waiting = []
        if waiting:
            yield from self._predict(waiting)

    def _prepare(self, rgb: np.ndarray) -> Any:
        """Return what `_predict` needs of an image (H, W, 3)."""
        return rgb

    def _shape(self, item: Any) -> Any:
        """Return what items of one batch must have in common."""
        return item.shape

    def _predict(self, items: Sequence[Any]) -> list[Any]:
        raise NotImplementedError
