"""`pe_spatial.MultiTask`: several checkpoints, one encode per frame. Importing this module needs torch alone."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pe_spatial.errors import ConfigError
from pe_spatial.multitask.sharing import SharedEncoder, now

if TYPE_CHECKING:
    import numpy as np

    from pe_spatial.predict.inputs import ImageLike
    from pe_spatial.predict.videos import Prompts

MAX_OBJECTS = 254
"""Objects that the boxes of a detector start."""


class MultiTask:
    """Several models whose heads were trained on one frozen encoder, which runs once per frame for all of them.

    Each result equals that of the model alone (`pe_spatial.load`): bit for bit on a CPU where models get bitwise the
    same input, and up to rounding where they normalize it differently, as trackers do. The encoder runs once for each
    geometry and each size in which models get a frame; `report` says what that costs.

    Args:
        sources: checkpoints as `pe_spatial.load` takes them: detectors, segmenters, depth models, at most one tracker.
        device: as in `pe_spatial.load`.
        dtype: as in `pe_spatial.load`.
        score: lowest score of a detection.
        size: resize each frame to a square of so many pixels first, so that models which resize it in different ways
            get one image; results are in pixels of the frame. None leaves frames as they are.

    Attributes:
        predictors: task -> its predictor; a second model for a task is 'detection_2'.
        shared: the encoder.

    Raises ConfigError for models of different encoders; as `pe_spatial.load` does for each of them.
    """

    def __init__(
        self, sources: Sequence[str | Path], *, device: str = "cpu", dtype: torch.dtype | None = None,
        score: float = 0.0, size: int | None = None,
    ) -> None:  # fmt: skip
        from pe_spatial.loading import load
        from pe_spatial.predict.models import config_and_weights, task_of

        if len(sources) < 2:
            raise ConfigError(f"there is {len(sources)} model to share an encoder; give at least two checkpoints")
        if size is not None and size < 1:
            raise ConfigError(f"the size is {size}; give a number of pixels, or None for frames as they are")
        self.sources = tuple(str(source) for source in sources)
        self.device, self.dtype, self.size = device, dtype, size
        self.predictors: dict[str, Any] = {}
        self.shared = SharedEncoder()
        counts: Counter[str] = Counter()
        for source in sources:
            task = task_of(config_and_weights(source)[0])
            counts[task] += 1
            options = dict(score=score) if task == "detection" else {}
            predictor = load(source, device=device, dtype=dtype, **options)  # type: ignore[arg-type]
            self.shared.attach(str(source), predictor.model)
            self.predictors[task if counts[task] == 1 else f"{task}_{counts[task]}"] = predictor
        if counts["tracking"] > 1:
            raise ConfigError("there are two trackers, and prompts belong to one; give one of them")
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
        from pe_spatial.multitask.resizing import squeezed, to_size

        self.shared.begin()
        seen = rgb if self.size is None else squeezed(rgb, self.size)
        times: dict[str, float] = {}
        results: dict[str, Any] = {}
        for name in sorted(self.predictors, key="tracking".__eq__):  # its objects may start from boxes
            before, begin = self.shared.seconds, now(self.device)
            if name == "tracking":
                if start and not tracker.objects:
                    prompts = _boxes(results["detection"])
                elif self.size is not None and prompts:
                    prompts = {i: _scaled(prompt, rgb.shape, self.size) for i, prompt in prompts.items()}
                results[name] = self._track(tracker, seen, prompts)
            else:
                results[name] = self.predictors[name](seen)
            times[name] = now(self.device) - begin - (self.shared.seconds - before)
        self._check(seen.shape[:2])
        costs = {"encoder": self.shared.seconds, "alone": self.shared.alone, "encodes": self.shared.encodes}
        self._frames.append({**times, **costs})
        named = {name: results[name] for name in self.predictors}
        return named if self.size is None else {k: to_size(x, rgb.shape[:2]) for k, x in named.items()}

    @torch.inference_mode()
    def _track(self, tracker: Any, rgb: np.ndarray, prompts: Mapping[int, Any] | None) -> Any:
        from pe_spatial.predict.masks import MaskCrop
        from pe_spatial.predict.results import TrackedFrame

        with torch.autocast(torch.device(self.device).type, self.dtype) if self.dtype else nullcontext():
            masks = tracker.step(rgb, prompts)
        arrays = {i: mask.cpu().numpy() for i, mask in masks.items()}
        objects = {i: MaskCrop.cut(mask) for i, mask in arrays.items() if mask.any()}
        return TrackedFrame(objects=objects, image_size=(rgb.shape[0], rgb.shape[1]))

    def _check(self, size: tuple[int, ...]) -> None:
        """Raise ConfigError if no image was read twice: the models have no common size."""
        inputs = self.shared.inputs
        if len(inputs) < 2 or any(len({*one.readers}) > 1 for one in inputs):
            return
        sizes = ", ".join(f"{x.images.shape[-1]}x{x.images.shape[-2]} ({Path(x.readers[0]).name})" for x in inputs)
        remedy = "predict with each model alone" if self.size else "give one size for all (--size PIXELS)"
        raise ConfigError(
            f"an image of {size[1]}x{size[0]} pixels reaches the encoder as {sizes}: the models have no common image "
            f"size or resize it differently, so nothing would be shared; {remedy}"
        )

    def groups(self) -> list[str]:
        """Say for each geometry which models share it, and the layers that they read."""
        return [
            f"{', '.join(Path(name).name for name in group.members)}: layers {sorted(group.layers)} of one encode"
            for group in self.shared.groups
        ]

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


def _boxes(found: Any) -> dict[int, Any] | None:
    """Return the boxes of detections as prompts, with ids from 1."""
    from pe_spatial.tracking.sam2.prompts import Prompt

    height, width = found.image_size
    boxes = found.boxes[:MAX_OBJECTS].clip(0, (width, height, width, height))
    kept = [box for box in boxes if (box[2:] - box[:2] >= 1).all()]
    return {i: Prompt(box=box) for i, box in enumerate(kept, 1)} or None


def _scaled(prompt: Any, shape: Sequence[int], side: int) -> Any:
    """Bring a prompt from a frame of `shape` to a square."""
    import cv2
    import numpy as np

    from pe_spatial.tracking.sam2.prompts import Prompt

    scale = np.array([side / shape[1], side / shape[0]], np.float32)
    points = None if prompt.points is None else np.asarray(prompt.points, np.float32) * scale
    box = None if prompt.box is None else np.asarray(prompt.box, np.float32) * np.tile(scale, 2)
    mask = prompt.mask
    if mask is not None:
        mask = cv2.resize(np.asarray(mask, np.uint8), (side, side), interpolation=cv2.INTER_NEAREST)
    return Prompt(points=points, labels=prompt.labels, box=box, mask=mask)
