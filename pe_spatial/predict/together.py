"""Several models of one frame, in any runtime: frames in, the results of all tasks out.

Importing it needs numpy alone: no torch for exported models, and nothing but torch for `pe_spatial.MultiTask`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_spatial.errors import ConfigError

if TYPE_CHECKING:
    from pe_spatial.predict.inputs import ImageLike
    from pe_spatial.predict.masks import MaskCrop
    from pe_spatial.predict.results import Detections
    from pe_spatial.predict.videos import Prompts
    from pe_spatial.tracking.sam2.prompts import Prompt

MAX_OBJECTS = 254
"""Objects that the boxes of a detector start."""


class Together:
    """Models that share the encode of each frame.

    Args:
        size: resize each frame to a square of so many pixels first; results are in pixels of the frame. None leaves
            frames as they are.

    Attributes:
        predictors: task -> its predictor; a second model for a task is 'detection_2'.
        sources: where they come from.
    """

    sources: tuple[str, ...]

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.predictors: dict[str, Any] = {}
        self._frames: list[dict[str, float]] = []  # times of each frame, in seconds

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the results."""
        return tuple(self.predictors)

    def __call__(self, image: ImageLike, prompts: Mapping[int, Any] | None = None) -> dict[str, Any]:
        """Return the result of each task for one image; `prompts` by object id are for a tracker."""
        return next(self.stream([image], prompts and {0: prompts}))

    def stream(self, images: Iterable[ImageLike], prompts: Prompts | None = None) -> Iterator[dict[str, Any]]:
        """Yield the results of each image by task, in order.

        With a tracker the images are the frames of a video, and `prompts` are frame number -> object id -> `Prompt`.
        Without prompts the objects of the first frame in which a detector among the models finds any are tracked.

        Raises ConfigError if no two models get an image in the same size, and for a tracker with nothing to track.
        """
        from pe_spatial.predict.inputs import read_images

        tracker = self.predictors["tracking"].start() if "tracking" in self.predictors else None
        if tracker and not prompts and "detection" not in self.predictors:
            raise ConfigError("the tracker has nothing to track; give prompts, or a detector whose boxes start objects")
        for number, rgb in enumerate(read_images(images)):
            yield self._frame(rgb, tracker, (prompts or {}).get(number), start=not prompts)

    def _frame(self, rgb: np.ndarray, tracker: Any, prompts: Mapping[int, Any] | None, *, start: bool) -> Any:
        from pe_spatial.predict.masks import MaskCrop
        from pe_spatial.predict.results import TrackedFrame

        seen = rgb if self.size is None else self._squeeze(rgb, self.size)
        self._begin(seen)
        times: dict[str, float] = {}
        results: dict[str, Any] = {}
        for name in sorted(self.predictors, key="tracking".__eq__):  # its objects may start from boxes
            before, begin = self._costs()["encoder"], self._now()
            if name == "tracking":
                if start and not tracker.objects:
                    prompts = _boxes(results["detection"])
                elif self.size is not None and prompts:
                    prompts = {i: _scaled(prompt, rgb.shape, self.size) for i, prompt in prompts.items()}
                masks = self._step(tracker, seen, prompts)
                objects = {i: MaskCrop.cut(mask) for i, mask in masks.items() if mask.any()}
                results[name] = TrackedFrame(objects=objects, image_size=(seen.shape[0], seen.shape[1]))
            else:
                results[name] = self.predictors[name](seen)
            times[name] = self._now() - begin - (self._costs()["encoder"] - before)
        self._check(seen.shape[:2])
        self._frames.append({**times, **self._costs()})
        named = {name: results[name] for name in self.predictors}
        return named if self.size is None else {k: to_size(x, rgb.shape[:2]) for k, x in named.items()}

    def _squeeze(self, rgb: np.ndarray, side: int) -> np.ndarray:
        """Resize (H, W, 3) to a square, whatever its form."""
        raise NotImplementedError

    def _begin(self, seen: np.ndarray) -> None:
        """Forget the last image."""

    def _costs(self) -> dict[str, float]:
        """Return `encoder`, the seconds of encoding this image, `alone`, those without sharing, and `encodes`."""
        raise NotImplementedError

    def _now(self) -> float:
        return time.perf_counter()

    def _check(self, size: tuple[int, ...]) -> None:
        """Raise ConfigError if nothing was shared."""

    def _step(self, tracker: Any, rgb: np.ndarray, prompts: Mapping[int, Any] | None) -> Mapping[int, np.ndarray]:
        return tracker.step(rgb, prompts)

    def groups(self) -> list[str]:
        """Say which models share an encode, and the layers that they read."""
        raise NotImplementedError

    def report(self) -> dict[str, Any]:
        """Return medians over frames in ms: the encoder, each head, all together, and an estimate for separate models.

        `encodes` counts those of a frame: 1 if all models share. The first frame, which fills caches, does not count if
        there are others. `separate` adds the encodes that were shared, from the times of those that ran. Empty before
        the first frame.
        """
        frames = self._frames[1:] or self._frames
        if not frames:
            return {}
        part = {key: 1000 * statistics.median(times[key] for times in frames) for key in frames[0]}
        heads = {name: round(part[name], 2) for name in self.predictors}
        total, alone = sum(heads.values()) + part["encoder"], sum(heads.values()) + part["alone"]
        return dict(
            frames=len(self._frames), encodes=part["encodes"] / 1000, encoder=round(part["encoder"], 2), heads=heads,
            total=round(total, 2), separate=round(alone, 2), ratio=round(total / alone, 3),
        )  # fmt: skip


def to_size(result: Any, size: tuple[int, int]) -> Any:
    """Return a result in pixels of an image of `size` (H, W), to which its own image is resized."""
    from pe_spatial.images import bilinear_weights
    from pe_spatial.predict.results import DepthMap, Detections, SegmentationMap, TrackedFrame

    height, width = size
    if isinstance(result, Detections):
        scale = np.array([width / result.image_size[1], height / result.image_size[0]] * 2, np.float32)
        crops = result.crops and tuple(_crop(crop, result.image_size, size) for crop in result.crops)
        return replace(result, boxes=result.boxes * scale, image_size=size, crops=crops)
    if isinstance(result, TrackedFrame):
        objects = {i: _crop(crop, result.image_size, size) for i, crop in result.objects.items()}
        return TrackedFrame(objects=objects, image_size=size)
    if isinstance(result, SegmentationMap):
        return replace(result, labels=_nearest(result.labels, size))
    assert isinstance(result, DepthMap)
    sides = zip(result.depth.shape, size, strict=True)
    rows, columns = (bilinear_weights(before, after).astype(np.float32) for before, after in sides)
    return replace(result, depth=rows @ result.depth @ columns.T)


def _crop(crop: MaskCrop, before: tuple[int, int], size: tuple[int, int]) -> MaskCrop:
    return crop.cut(_nearest(crop.full(before), size))


def _nearest(values: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Resize (h, w) to `size`, each pixel from the one that it lies in, as cv2.INTER_NEAREST."""
    rows, columns = (np.arange(new) * old // new for old, new in zip(values.shape, size, strict=True))
    return values[rows[:, None], columns]


def _boxes(found: Detections) -> dict[int, Any] | None:
    """Return the boxes of detections as prompts, with ids from 1."""
    from pe_spatial.tracking.sam2.prompts import Prompt

    height, width = found.image_size
    boxes = found.boxes[:MAX_OBJECTS].clip(0, (width, height, width, height))
    kept = [box for box in boxes if (box[2:] - box[:2] >= 1).all()]
    return {i: Prompt(box=box) for i, box in enumerate(kept, 1)} or None


def _scaled(prompt: Prompt, shape: Sequence[int], side: int) -> Prompt:
    """Bring a prompt from a frame of `shape` to a square."""
    from pe_spatial.tracking.sam2.prompts import Prompt

    scale = np.array([side / shape[1], side / shape[0]], np.float32)
    points = None if prompt.points is None else np.asarray(prompt.points, np.float32) * scale
    box = None if prompt.box is None else np.asarray(prompt.box, np.float32) * np.tile(scale, 2)
    mask = None if prompt.mask is None else _nearest(np.asarray(prompt.mask, np.uint8), (side, side))
    return Prompt(points=points, labels=prompt.labels, box=box, mask=mask)
