"""Tracking without training: any encoder, any layer, and label propagation, as a model of mmengine."""

from __future__ import annotations

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

PRESETS = ("dino", "aligned")
NORMALIZATIONS = ("encoder", "dino")
_DINO = ((0.485, 0.456, 0.406), (0.228, 0.224, 0.225))  # .228 is the script's; ImageNet has .229
_PE = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@MODELS.register_module()
class ZeroShotTracker(BaseModel):
    """Follow the objects of a first mask by the features of an encoder, which stays as it is.

    Args:
        backbone: config of an encoder, such as `dict(type='PerceptionEncoder', variant=..., out_indices=[-1])`. Each of
            its layers is tracked with on its own, all from one forward pass.
        preset: how a frame becomes patches and a result pixels.
            'dino' is the script that PE's authors scored DAVIS by, facebookresearch/dino@7c446df:
            eval_video_segmentation.py: the short side becomes `size`, the long one is rounded down to a multiple of 64.
            What is left of a frame beyond whole patches is cut off, and the result nevertheless stretched over the
            whole frame (480 x 832 px and patches of 14: 34 x 59 patches, 1 % off at the far edge).
            'aligned' keeps pixels and patches in place for every patch size: both sides are rounded up to multiples of
            the patch, with PE's own antialiased resizing, and labels are resized to the frame at once.
        size: short side in pixels, or (height, width), which 'dino' takes as they are.
        normalization: of the pixels: 'encoder', which for PE is a mean and a deviation of 0.5 and for timm's encoders
            their own, or 'dino', the script's. Which one PE's authors used is not documented; 'encoder' is what the
            weights were trained with.
        propagation: options of `LabelPropagation`; the default is the script's setting for both presets.
    """

    def __init__(
        self,
        backbone: Mapping[str, Any],
        *,
        preset: str = "dino",
        size: int | Sequence[int] = 480,
        normalization: str = "encoder",
        propagation: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        for name, value, allowed in (("preset", preset, PRESETS), ("normalization", normalization, NORMALIZATIONS)):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
        self.backbone = MODELS.build(backbone)
        self.preset = preset
        self.size = size if isinstance(size, int) else tuple(size)
        self.propagation = dict(propagation or {})
        try:
            LabelPropagation(**self.propagation)  # wrong options should fail now
        except (TypeError, ValueError) as error:
            raise ConfigError(f"propagation cannot be {self.propagation}: {error}") from error
        encoder = (getattr(self.backbone, "mean", _PE[0]), getattr(self.backbone, "std", _PE[1]))
        mean, std = _DINO if normalization == "dino" else encoder
        self.register_buffer("_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("_std", torch.tensor(std)[:, None, None], persistent=False)

    def load_encoder(self, source: str) -> None:
        """Load weights of the encoder alone, of any layout and from anywhere that `init_cfg` of the backbone takes."""
        self.backbone.init_cfg = dict(type="Pretrained", checkpoint=str(source))
        self.backbone.is_init = False
        self.backbone.init_weights()

    def input_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (height, width) in pixels to which frames of `size` are resized."""
        h, w = size
        if not isinstance(self.size, int):
            h, w = self.size
        elif self.preset == "dino" and h > w:
            h, w = self.size * h / w // 64 * 64, self.size
        elif self.preset == "dino":  # squares too: 480 x 448
            h, w = self.size, self.size * w / h // 64 * 64
        else:
            h, w = (self.size * side / min(size) for side in size)
        if self.preset == "aligned":
            p = self.backbone.patch_size
            h, w = (-int(-side // p) * p for side in (h, w))
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
        """Return the ids that hold the middle of no patch and so cannot be followed at this size."""
        ids = first_soft(torch.from_numpy(first_mask), self.grid(first_mask.shape))[1]
        return np.setdiff1d(first_mask, ids.numpy()).tolist()

    def features(self, rgb: np.ndarray) -> tuple[Tensor, ...]:
        """Encode one frame (H, W, 3) uint8 RGB: a map (C, rows, columns) for each layer of the backbone."""
        h, w = self.input_size(rgb.shape[:2])
        if self.preset == "dino":
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

        Frames are taken and given one at a time. Those of the first are `first_mask` itself.

        Args:
            frames: names and images, (H, W, 3) uint8 RGB, as `Clip.read` gives them.
            first_mask: object ids (H, W) uint8, 0 for background; ids may skip numbers.
        """
        self.eval()
        self.backbone.init_weights()
        size = first_mask.shape
        soft, ids = first_soft(torch.from_numpy(first_mask), self.grid(size))
        patch_size = self.backbone.patch_size if self.preset == "dino" else None
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
        """Track in clips, as mmengine's test loop gives them.

        Returns for each `video` (its name), `frames` (their names) and `pred_masks` (frames, H, W) uint8.
        """
        if mode != "predict":
            raise ConfigError(f"a ZeroShotTracker is not trained (mode {mode!r}); run tools/test.py")
        if len(self.backbone.out_indices) != 1:
            raise ConfigError(f"out_indices is {self.backbone.out_indices}; one layer is evaluated at a time")
        results = []
        for one in clip:
            first_mask, frames = one.load()
            names, masks = zip(*self.track(frames, first_mask), strict=True)
            results.append(dict(video=one.name, frames=list(names), pred_masks=np.stack([m for (m,) in masks])))
        return results
