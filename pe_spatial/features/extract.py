"""Feature maps of images of any size, from any encoder and any of its layers."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pe_spatial.encoder.checkpoint import from_pretrained
from pe_spatial.encoder.geometry import block_indices
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.features.patches import attention_map, recorded_attention, similarity
from pe_spatial.integrations.timm import PREFIX, TimmEncoder

Encoder = PerceptionEncoder | TimmEncoder


def load_encoder(
    variant: str | Mapping[str, Any] | None,
    checkpoint: str,
    *,
    layers: str | Sequence[int] = "all",
    geometry: str = "release",
) -> Encoder:
    """Build an encoder with weights, in evaluation mode, that returns the maps of `layers`.

    Args:
        variant: as in `PerceptionEncoder`, or 'timm:NAME'; None takes it from the file.
        checkpoint: 'released', 'none' for random weights, or what `load_checkpoint` takes, a detector's too.
        layers: blocks, 0-based or from the end, or 'all'.
        geometry: as in `PerceptionEncoder`; timm's encoders have their own.

    Raises CheckpointError as `load_checkpoint` does, ConfigError for options that are not allowed.
    """
    if variant is None and checkpoint in ("released", "none"):
        raise ConfigError(f"--checkpoint {checkpoint} does not tell the encoder; give --variant, or a file")
    encoder: Encoder
    try:
        if isinstance(variant, str) and variant.startswith(PREFIX):
            weights = None if checkpoint == "none" else dict(type="Pretrained", checkpoint=checkpoint)
            encoder = TimmEncoder(variant, init_cfg=weights)
            encoder.init_weights()
        elif checkpoint == "none":
            assert variant is not None
            encoder = PerceptionEncoder(variant, geometry=geometry)
        else:
            source = variant if checkpoint == "released" and isinstance(variant, str) else checkpoint
            encoder = from_pretrained(source, variant=variant, geometry=geometry)
        chosen = range(encoder.config.depth) if layers == "all" else layers
        encoder.out_indices = block_indices("--layers", chosen, encoder.config.depth, allow_none=False)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:  # the encoder raises few ConfigErrors
        if type(error) not in (TypeError, ValueError):
            raise
        raise ConfigError(" ".join(str(error).split())) from error
    return encoder.eval()


def fit_size(size: tuple[int, int], long_side: int, patch: int) -> tuple[int, int]:
    """Return (height, width) in whole patches, nearest to an image whose longer side is `long_side` pixels."""
    scale = long_side / max(size)
    height, width = (max(1, round(side * scale / patch)) * patch for side in size)
    return height, width


class FeatureExtractor:
    """Maps of the layers of an encoder for images of any size.

    Args:
        encoder: from `load_encoder`.
        long_side: longer side that images are resized to, in pixels; None: that of the encoder's pretraining.
        device: where to compute.
    """

    def __init__(self, encoder: Encoder, *, long_side: int | None = None, device: str = "cpu") -> None:
        self.encoder = encoder.to(device)
        self.device = device
        self.layers: tuple[int, ...] = tuple(encoder.out_indices)
        grid = encoder.config.grid_size
        self.long_side = long_side or (grid if isinstance(grid, int) else max(grid)) * encoder.patch_size
        if self.long_side < encoder.patch_size:
            raise ConfigError(f"--size is {self.long_side}, less than a patch of {encoder.patch_size} pixels")

    def input_size(self, size: tuple[int, ...], name: str) -> tuple[int, int]:
        """Return the size that the encoder gets for (height, width); DatasetError for less than a patch."""
        height, width = size
        patch = self.encoder.patch_size
        if min(height, width) < patch:
            raise DatasetError(
                f"{name} has {width}x{height} pixels, less than one patch of {patch}x{patch}; give a larger image"
            )
        return fit_size((height, width), self.long_side, patch)

    def patch_at(self, point: tuple[float, float], rgb: np.ndarray, name: str) -> tuple[int, int]:
        """Return (row, column) of the patch at the pixel (x, y) of an image; DatasetError if it is outside."""
        height, width = rgb.shape[:2]
        x, y = point
        if not (0 <= x < width and 0 <= y < height):
            raise DatasetError(
                f"--point {x:g},{y:g} is outside of {name}, which has {width}x{height} pixels; "
                f"give x of 0 to {width - 1} and y of 0 to {height - 1}"
            )
        rows, columns = (side // self.encoder.patch_size for side in self.input_size(rgb.shape[:2], name))
        return int(y / height * rows), int(x / width * columns)

    def prepare(self, rgb: np.ndarray, name: str) -> Tensor:
        """Resize and normalize (H, W, 3) uint8 RGB to (1, 3, h, w), whole patches."""
        height, width = self.input_size(rgb.shape[:2], name)
        resized = np.array(Image.fromarray(rgb).resize((width, height), Image.Resampling.BICUBIC))
        x = torch.from_numpy(resized).to(self.device).permute(2, 0, 1)[None].float()
        config = self.encoder.config
        mean, std = (x.new_tensor(value)[:, None, None] for value in (config.mean, config.std))
        return (x - mean) / std

    @torch.inference_mode()
    def maps(self, rgb: np.ndarray, name: str) -> tuple[Tensor, ...]:
        """Return one map (1, C, h, w) for each layer."""
        return tuple(self.encoder(self.prepare(rgb, name)))

    @torch.inference_mode()
    def looks(
        self, rgb: np.ndarray, name: str, *, point: tuple[float, float] | None, attention: bool
    ) -> tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]:
        """Return the maps, and for 'similarity' (with a point) and 'attention' one (h, w) for each layer.

        Attention is that of the patch at `point`, without one that of the class token. ConfigError for encoders that
        have no class token, and for timm's.
        """
        encoder = self.encoder
        if attention and not isinstance(encoder, PerceptionEncoder):
            raise ConfigError(f"attention of {encoder.variant} is not shown, only that of Perception Encoders; omit it")
        if attention and point is None and not encoder.num_prefix_tokens:
            raise ConfigError("this encoder has no class token whose attention could be shown; give --point x,y")
        patch = None if point is None else self.patch_at(point, rgb, name)
        ours = encoder if isinstance(encoder, PerceptionEncoder) else None
        with ExitStack() as stack:
            inputs = stack.enter_context(recorded_attention(ours, self.layers)) if attention and ours else {}
            maps = self.maps(rgb, name)
        found: dict[str, list[Tensor]] = {}
        if patch is not None:
            found["similarity"] = [similarity(m[0], patch) for m in maps]
        if attention and ours:
            grid = (maps[0].shape[-2], maps[0].shape[-1])
            found["attention"] = [attention_map(ours, i, inputs[i], grid, patch) for i in self.layers]
        return maps, found
