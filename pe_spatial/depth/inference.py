"""A trained depth estimator on images of any size."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner.checkpoint import load_state_dict

from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.encoder.lora_files import add_base
from pe_spatial.errors import ConfigError
from pe_spatial.images import tile_starts


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
        steps = cfg.test_dataloader.dataset.pipeline
        self.steps = [step for step in steps if not str(step["type"]).rpartition(".")[2].startswith("Load")]
        with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmseg")):
            self.model = MODELS.build({**cfg.model, "losses": []}).eval().to(device)
            self._prepare = Compose(self.steps)
        state = {name: x for name, x in file.state.items() if not name.startswith("losses.")}
        add_base(self.model, file.rest.get("meta"), {"": state}, path)
        try:
            load_state_dict(self.model, state, strict=True)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:400]
            raise CheckpointError(f"{path} does not fit this config: {reason} ...") from error

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
        corners = list(product(*(tile_starts(side, tile, overlap) for side in image.shape[:2])))
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
