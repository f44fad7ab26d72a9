"""Tracking without training: label propagation by the features of any encoder and layer, as an mmengine model."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from PIL import Image
from torch import Tensor

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
from pe_spatial.errors import ConfigError
from pe_spatial.tracking.propagation import LabelPropagation, first_soft, hard_mask
from pe_spatial.tracking.vos.clip import Clip

PROTOCOLS = ("dino", "aligned")
NORMALIZATIONS = ("encoder", "dino")
_DINO = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))  # the script has .228; ImageNet has .229


@MODELS.register_module()
class ZeroShotTracker(BaseModel):
    """Track the objects of a first mask by the features of a frozen encoder.

    Args:
        backbone: config of an encoder, such as `dict(type='PerceptionEncoder', variant=..., out_indices=[-1])`. Each
            layer gives masks of its own; all layers come from one forward pass.
        protocol: how a frame becomes patches and the result pixels.
            'dino' is the script with which PE's authors scored DAVIS, facebookresearch/dino@7c446df:
            eval_video_segmentation.py: the short side becomes `size`, the long side is rounded down to a multiple of
            64. Pixels beyond the last complete patch are cropped, yet the result is stretched over the complete frame
            (480 x 832 px and patches of 14: 34 x 59 patches, 1 % off at the far edge).
            'aligned' keeps pixels and patches in place for every patch size: both sides are rounded up to multiples of
            the patch size, with PE's antialiased resizing, and labels are resized directly to the frame.
        size: short side in pixels, or (height, width), which 'dino' does not round.
        normalization: mean and standard deviation of the pixels: 'encoder' (0.5 for PE, timm's own for its encoders)
            or 'dino' (the script's). PE's authors do not document theirs; 'encoder' is what the weights were trained
            with.
        propagation: options of `LabelPropagation`; the default is the script's setting for both protocols.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        *,
        protocol: str = "dino",
        size: int | Sequence[int] = 480,
        normalization: str = "encoder",
        propagation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        choices = dict(protocol=(protocol, PROTOCOLS), normalization=(normalization, NORMALIZATIONS))
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
        self.backbone = MODELS.build(backbone)
        self.protocol = protocol
        self.size = size if isinstance(size, int) else tuple(size)
        self.propagation = dict(propagation or {})
        try:
            LabelPropagation(**self.propagation)  # fail now for wrong options
        except (TypeError, ValueError) as error:
            raise ConfigError(f"propagation={self.propagation} cannot be used: {error}") from error
        config = self.backbone.config
        encoder = tuple([x / 255 for x in values] for values in (config.mean, config.std))
        mean, std = _DINO if normalization == "dino" else encoder
        self.register_buffer("_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(std)[:, None, None], persistent=False)

    def load_encoder(self, source: str) -> None:
        """Load the encoder's weights, from any `source` that the backbone's `init_cfg` takes."""
        self.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(source))
        self.backbone.is_init = False
        self.backbone.init_weights()

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) in pixels to which frames of `size` (height, width) are resized."""
        h, w = (self.size * side / min(size) for side in size) if isinstance(self.size, int) else self.size
        if self.protocol == "aligned":
            p = self.backbone.patch_size
            return -int(-h // p) * p, -int(-w // p) * p
        if isinstance(self.size, int):  # squares too: 480 x 448
            h, w = (h // 64 * 64, w) if size[0] > size[1] else (h, w // 64 * 64)
        return int(h), int(w)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (rows, columns) of patches of frames of `size` (height, width)."""
        h, w = (side // self.backbone.patch_size for side in self.input_size(size))
        if not (h and w):
            raise ConfigError(
                f"frames of {size[0]}x{size[1]} (height x width) would become {self.input_size(size)}, less than one "
                f"patch of {self.backbone.patch_size} px; raise size, which is {self.size}"
            )
        return h, w

    def lost_objects(self, first_mask: np.ndarray) -> list[int]:
        """Return the ids that cover the center of no patch and therefore cannot be tracked at this size."""
        ids = first_soft(torch.from_numpy(first_mask), self.grid(first_mask.shape))[1]
        return np.setdiff1d(first_mask, ids.numpy()).tolist()

    def features(self, rgb: np.ndarray) -> tuple[Tensor, ...]:
        """Encode one frame (H, W, 3) uint8 RGB: a map (C, rows, columns) for each layer of the backbone."""
        h, w = self.input_size(rgb.shape[:2])
        if self.protocol == "dino":
            image = cv2.resize(np.ascontiguousarray(rgb), (w, h))
        else:
            image = np.array(Image.fromarray(rgb).resize((w, h), Image.Resampling.BILINEAR))
        rows, columns = (side * self.backbone.patch_size for side in self.grid(rgb.shape[:2]))
        pixels = torch.from_numpy(image[:rows, :columns]).to(self._mean.device).permute(2, 0, 1) / 255
        return tuple(one[0] for one in self.backbone(((pixels - self._mean) / self._std)[None]))

    @torch.inference_mode()
    def track(
        self, frames: Iterable[tuple[str, np.ndarray]], first_mask: np.ndarray
    ) -> Iterator[tuple[str, tuple[np.ndarray, ...]]]:
        """Yield the name and the masks (H, W) uint8 of every frame, one mask for each layer of the backbone.

        Frames are names and images (H, W, 3) uint8 RGB, as `Clip.read` yields them, processed one at a time. The masks
        of the first frame are `first_mask` itself: object ids (H, W) uint8, 0 for background, which may skip numbers.
        """
        self.eval()
        self.backbone.init_weights()
        size = first_mask.shape
        soft, ids = first_soft(torch.from_numpy(first_mask), self.grid(size))
        patch_size = self.backbone.patch_size if self.protocol == "dino" else None
        layers = [LabelPropagation(**self.propagation) for _ in self.backbone.out_indices]
        for i, (name, rgb) in enumerate(frames):
            maps = self.features(rgb)
            if i == 0:
                for layer, one in zip(layers, maps, strict=True):
                    layer.start(one, soft)
                yield name, (first_mask,) * len(layers)
                continue
            softs = [layer.step(one) for layer, one in zip(layers, maps, strict=True)]
            yield name, tuple(hard_mask(one, ids, size, patch_size=patch_size).cpu().numpy() for one in softs)

    def forward(self, clip: Sequence[Clip], mode: str = "tensor") -> list[dict[str, Any]]:
        """Return for each clip `video` (its name), `frames` (their names) and `pred_masks` (frames, H, W) uint8."""
        if mode != "predict":
            raise ConfigError(f"a ZeroShotTracker cannot be trained (mode {mode!r}); run pe-spatial test")
        if len(self.backbone.out_indices) != 1:
            raise ConfigError(f"out_indices is {self.backbone.out_indices}; one layer is evaluated at a time")
        results = []
        for one in clip:
            first_mask, frames = one.load()
            names, masks = zip(*self.track(frames, first_mask), strict=True)
            results.append(dict(video=one.name, frames=list(names), pred_masks=np.stack([m for (m,) in masks])))
        return results
