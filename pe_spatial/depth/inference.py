"""A trained depth estimator on images as they lie about: arrays, files, folders, videos, of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner.checkpoint import load_state_dict

from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import read_rgb

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class InputImage:
    """One image to come: what its results are called, where it is, and a function that reads it.

    `read` returns (H, W, 3) uint8 RGB or raises DatasetError; for a frame of a video only until the next one is taken.
    """

    name: str
    path: Path
    read: Callable[[], np.ndarray]


class Sources:
    """The images of files, folders (all below them) and videos, as often as they are iterated over.

    Args:
        paths: files and folders.
        without: a folder whose files are not taken: that of the results.

    Raises DatasetError for a path that is not there, for folders without images and for two of one name.
    """

    def __init__(self, paths: Sequence[str | Path], *, without: Path) -> None:
        self._files: dict[str, Path] = {}
        for given in map(Path, paths):
            if not given.exists():
                raise DatasetError(f"no file or folder {given}; check the path")
            found = [given] if given.is_file() else _below(given, without.resolve())
            for path in found:
                name = path.with_suffix("").name if given.is_file() else str(path.relative_to(given).with_suffix(""))
                other = self._files.setdefault(name, path)
                if other != path:
                    raise DatasetError(f"{other} and {path} would both be called {name}; run them apart")
        if not self._files:
            raise DatasetError(f"{', '.join(map(str, paths))} holds no images ({', '.join(IMAGES + VIDEOS)})")

    def __len__(self) -> int:
        """Images and frames; videos may be wrong about theirs."""
        return sum(_frames(path) if _is_video(path) else 1 for path in self._files.values())

    def __iter__(self) -> Iterator[InputImage]:
        for name, path in self._files.items():
            if _is_video(path):
                yield from _video(name, path)
            else:
                yield InputImage(name, path, partial(read_rgb, path))


def _below(folder: Path, without: Path) -> list[Path]:
    return [
        path
        for path in sorted(folder.rglob("*"))
        if path.suffix.lower() in IMAGES + VIDEOS and without not in path.resolve().parents
    ]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _frames(path: Path) -> int:
    return max(int(cv2.VideoCapture(str(path)).get(cv2.CAP_PROP_FRAME_COUNT)), 1)


def _video(name: str, path: Path) -> Iterator[InputImage]:
    capture, promised, number = cv2.VideoCapture(str(path)), _frames(path), 0

    def read() -> np.ndarray:
        fine, frame = capture.retrieve()
        if not fine:
            raise DatasetError(f"frame {number} of {path} cannot be decoded; restore the video")
        return np.ascontiguousarray(frame[..., ::-1])

    def broken() -> np.ndarray:
        raise DatasetError(f"{path} ends after {number} of {promised} frames; restore the video")

    try:
        while capture.grab():
            yield InputImage(f"{name}/{number:06d}", path, read)
            number += 1
        if number < promised - 1 or not number:  # containers are often wrong by one
            yield InputImage(f"{name}/{number:06d}", path, broken)
    finally:
        capture.release()


class DepthPredictor:
    """A depth estimator with trained weights.

    Images take the config's test pipeline, but for its loading steps.

    Args:
        cfg: the configuration that it was trained with.
        checkpoint: file that tools/train.py wrote, or weights alone.
        device: where it runs.

    Attributes:
        quantity: 'metre', or what a model that learned up to scale and shift predicts: 'relative depth' or 'relative
            disparity' (near is large).

    Raises ConfigError for models without depth, CheckpointError for weights that do not fit.
    """

    def __init__(self, cfg: Config, checkpoint: str | Path, *, device: str = "cpu") -> None:
        init_default_scope(cfg.get("default_scope", "mmseg"))
        if cfg.get("model", {}).get("type") != "PEDepthEstimator":
            raise ConfigError(f"{cfg.filename} describes no PEDepthEstimator; give one such as pe_spatial_dpt_nyu.py")
        self.quantity = _quantity(cfg.model.losses)
        self.model = MODELS.build({**cfg.model, "losses": []}).eval().to(device)
        path = locate(checkpoint)
        state = {name: x for name, x in read_checkpoint(path).state.items() if not name.startswith("losses.")}
        try:
            load_state_dict(self.model, state, strict=True)
        except RuntimeError as error:
            raise CheckpointError(
                f"{path} is no checkpoint of this config: {' '.join(str(error).split())[:400]} ..."
            ) from error
        steps = cfg.test_dataloader.dataset.pipeline
        self._prepare = Compose([step for step in steps if not str(step["type"]).rpartition(".")[2].startswith("Load")])

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
        """(H, W, 3) uint8 RGB of one size -> (H, W) float32 depth of each, in metres."""
        items = [self._prepare(_as_loaded(image)) for image in images]
        batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
        return [sample.pred_depth_map.data[0].float().cpu().numpy() for sample in self.model.test_step(batch)]

    def tiled(self, image: np.ndarray, *, tile: int, overlap: int, batch: int) -> np.ndarray:
        """Predict a large image (H, W, 3) in square tiles and return its depth (H, W) float32.

        Where tiles overlap, each counts the less the nearer its border is. Their depths are metric, so none is scaled
        to fit its neighbours; where a model is not sure of the scale, that leaves slopes between tiles. Raises
        ConfigError for relative depth, of which every tile has a scale of its own.

        Args:
            image: as in `__call__`.
            tile: side in pixels; a side of the image that is shorter stays whole.
            overlap: of neighbours at least, in pixels.
            batch: tiles at a time.
        """
        if self.quantity != "metre":
            raise ConfigError(f"tiles of {self.quantity} have a scale each and do not fit together; predict it whole")
        if not 0 <= overlap < tile:
            raise ConfigError(f"tiles of {tile} pixels cannot overlap by {overlap}; 0 to {tile - 1} is allowed")
        sides = [min(tile, side) for side in image.shape[:2]]
        corners = list(product(*(_starts(side, tile, overlap) for side in image.shape[:2])))
        ramps = [np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).clip(max=overlap + 1) for side in sides]
        weight = np.outer(*ramps).astype(np.float64)
        total, weights = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
        for first in range(0, len(corners), batch):
            windows = [(slice(y, y + sides[0]), slice(x, x + sides[1])) for y, x in corners[first : first + batch]]
            for window, depth in zip(windows, self([image[window] for window in windows]), strict=True):
                total[window] += weight * depth
                weights[window] += weight
        return (total / weights).astype(np.float32)


def _quantity(losses: Sequence[Mapping[str, Any]]) -> str:
    relative = next((loss for loss in losses if loss["type"] == "ScaleAndShiftInvariantLoss"), None)
    if relative is None or not {loss["type"] for loss in losses} <= {"ScaleAndShiftInvariantLoss", "GradientLoss"}:
        return "metre"
    return f"relative {relative.get('space', 'disparity')}"


def _as_loaded(image: np.ndarray) -> dict[str, Any]:
    size = image.shape[:2]
    return dict(img=image[..., ::-1], img_shape=size, ori_shape=size, seg_fields=[])


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles begin along a side: evenly spaced, the first and the last at its ends."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return np.linspace(0, side - tile, count).round().astype(int).tolist()
