"""A trained depth estimator on images of any size: arrays, files, folders, videos."""

from collections import Counter
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
from pe_spatial.images import image_suffixes, is_hidden, read_rgb
from pe_spatial.video import count_frames, decode_video

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")


@dataclass(frozen=True)
class InputImage:
    """An image or a frame of a video."""

    name: str  # of its results
    path: Path
    read: Callable[[], np.ndarray]  # returns (H, W, 3) uint8 RGB, or raises DatasetError


class Sources:
    """The images of files, folders (searched recursively) and videos; it can be iterated over repeatedly.

    The folder `exclude`, such as that of the results, and hidden files and folders are skipped. `omitted` counts the
    other files of the folders by suffix. Raises DatasetError for a path that does not exist, for folders without images
    and for two images of one name.
    """

    def __init__(self, paths: Sequence[str | Path], *, exclude: Path) -> None:
        exclude = exclude.resolve()
        self._files: dict[str, Path] = {}
        self.omitted: Counter[str] = Counter()
        for root in map(Path, paths):
            if not root.exists():
                raise DatasetError(f"there is no file or folder {root}; check the path")
            for path in [root] if root.is_file() else _files_below(root, exclude):
                if path != root and path.suffix.lower() not in (*image_suffixes(), *VIDEOS):
                    self.omitted[path.suffix.lower() or path.name] += 1
                    continue
                name = path.stem if root.is_file() else str(path.relative_to(root).with_suffix(""))
                other = self._files.setdefault(name, path)
                if other != path:
                    raise DatasetError(f"{other} and {path} would both be written as {name}; run them separately")
        if not self._files:
            raise DatasetError(
                f"{', '.join(map(str, paths))} contains no images ({', '.join((*image_suffixes(), *VIDEOS))})"
            )

    def __len__(self) -> int:
        """Return the number of images and frames; videos may announce a wrong number."""
        return sum(_count(path) for path in self._files.values())

    def __iter__(self) -> Iterator[InputImage]:
        for name, path in self._files.items():
            if _is_video(path):
                yield from _frames(name, path)
            else:
                yield InputImage(name, path, partial(read_rgb, path))


def _files_below(root: Path, exclude: Path) -> list[Path]:
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and not is_hidden(path, root))
    return [path for path in paths if exclude not in path.resolve().parents]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _count(path: Path) -> int:
    try:
        return count_frames(path) if _is_video(path) else 1
    except DatasetError:  # reported when it is read
        return 1


def _frames(name: str, path: Path) -> Iterator[InputImage]:
    number = 0
    try:
        for rgb in decode_video(path):
            yield InputImage(f"{name}/{number:06d}", path, partial(np.asarray, rgb))
            number += 1
    except DatasetError as error:
        yield InputImage(f"{name}/{number:06d}", path, partial(_fail, error))


def _fail(error: DatasetError) -> np.ndarray:
    raise error


class DepthPredictor:
    """A depth estimator with trained weights.

    Images pass the config's test pipeline, without its loading steps.

    `quantity` is 'meter', or for models trained up to scale and shift 'relative depth' or 'relative disparity' (large
    is near). `training_size` is the short side of the training images in pixels, None if the checkpoint does not say.

    Args:
        cfg: config that the model was trained with.
        checkpoint: file that pe-spatial train wrote, or weights alone.

    Raises ConfigError for other models, CheckpointError for weights that do not fit.
    """

    def __init__(self, cfg: Config, checkpoint: str | Path, *, device: str = "cpu") -> None:
        init_default_scope(cfg.get("default_scope", "mmseg"))
        kind = cfg.get("model", {}).get("type")
        if kind != "PEDepthEstimator":
            source = cfg.filename if cfg.filename and Path(cfg.filename).is_file() else f"the config in {checkpoint}"
            raise ConfigError(
                f"{source} is not a config of a PEDepthEstimator but of a {kind}; give a checkpoint that was trained "
                "with a config such as pe_spatial_dpt_nyu.py"
            )
        self.quantity = _quantity(cfg.model.losses)
        path = locate(checkpoint)
        file = read_checkpoint(path)
        self.training_size = _training_size(file.rest)
        self.model = MODELS.build({**cfg.model, "losses": []}).eval().to(device)
        state = {name: x for name, x in file.state.items() if not name.startswith("losses.")}
        try:
            load_state_dict(self.model, state, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise CheckpointError(f"{path} does not fit this config: {reason} ...") from error
        steps = cfg.test_dataloader.dataset.pipeline
        self._prepare = Compose([step for step in steps if not str(step["type"]).rpartition(".")[2].startswith("Load")])

    @torch.no_grad()
    def __call__(self, images: Sequence[np.ndarray], *, size: int | None = None) -> list[np.ndarray]:
        """Images (H, W, 3) uint8 RGB of one size -> depth (H, W) float32 of each, in meters.

        With a `size` the model gets them with a short side of so many pixels, and its depth is resized back.
        """
        items = []
        for image in images:
            image = np.ascontiguousarray(_resize(image, size)[..., ::-1])
            shape = image.shape[:2]
            items.append(self._prepare(dict(img=image, img_shape=shape, ori_shape=shape, seg_fields=[])))
        batch = {key: [item[key] for item in items] for key in ("inputs", "data_samples")}
        depths = [sample.pred_depth_map.data[0].float().cpu().numpy() for sample in self.model.test_step(batch)]
        return [
            depth if depth.shape == image.shape[:2] else cv2.resize(depth, image.shape[1::-1])
            for depth, image in zip(depths, images, strict=True)
        ]

    def tiled(self, image: np.ndarray, *, tile: int, overlap: int, batch_size: int) -> np.ndarray:
        """Predict a large image (H, W, 3) in square tiles and return its depth (H, W) float32.

        Where tiles overlap, the weight of each falls towards its border. Tiles are not rescaled to match their
        neighbors; if a model's scale varies, depth ramps from one to the other. Raises ConfigError for relative depth,
        because each tile has its own scale.

        Args:
            tile: side of a tile in pixels; a shorter side of the image is not divided.
            overlap: smallest overlap of neighboring tiles, in pixels.
            batch_size: number of tiles per forward pass.
        """
        if self.quantity != "meter":
            raise ConfigError(f"tiles of {self.quantity} have different scales; predict the complete image instead")
        if not 0 <= overlap < tile:
            raise ConfigError(f"the overlap is {overlap}; tiles of {tile} pixels allow 0 to {tile - 1}")
        sides = [min(tile, side) for side in image.shape[:2]]
        corners = list(product(*(_starts(side, tile, overlap) for side in image.shape[:2])))
        ramps = [np.minimum(np.arange(1, side + 1), np.arange(side, 0, -1)).clip(max=overlap + 1) for side in sides]
        weight = np.outer(*ramps).astype(np.float64)
        total, weights = np.zeros(image.shape[:2]), np.zeros(image.shape[:2])
        for first in range(0, len(corners), batch_size):
            windows = [(slice(y, y + sides[0]), slice(x, x + sides[1])) for y, x in corners[first : first + batch_size]]
            for window, depth in zip(windows, self([image[window] for window in windows]), strict=True):
                total[window] += weight * depth
                weights[window] += weight
        return (total / weights).astype(np.float32)


def _resize(image: np.ndarray, size: int | None) -> np.ndarray:
    """Resize (H, W, 3) to a short side of `size`; None leaves it."""
    short = min(image.shape[:2])
    if size in (None, short):
        return image
    width, height = (max(1, round(side * size / short)) for side in image.shape[1::-1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if size < short else cv2.INTER_LINEAR)


def _training_size(rest: Mapping[str, Any]) -> int | None:
    """Return the short side of the training images, which `DepthPairDataset` puts into the checkpoint, or None."""
    meta = rest.get("meta")
    about = meta.get("dataset_meta") if isinstance(meta, Mapping) else None
    size = about.get("image_size") if isinstance(about, Mapping) else None
    return min(size) if size else None


def _quantity(losses: Sequence[Mapping[str, Any]]) -> str:
    relative = next((loss for loss in losses if loss["type"] == "ScaleAndShiftInvariantLoss"), None)
    if relative is None or not {loss["type"] for loss in losses} <= {"ScaleAndShiftInvariantLoss", "GradientLoss"}:
        return "meter"
    return f"relative {relative.get('space', 'disparity')}"


def _starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start along a side: evenly spaced, from one end to the other."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return np.linspace(0, side - tile, count).round().astype(int).tolist()
