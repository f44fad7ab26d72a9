"""Frozen teachers: a layer of an encoder, true object masks as a stand-in for SAM's, and their cache on disk.

A teacher gets images (B, 3, H, W), RGB in [0, 255], which the student sees too, the student's grid (h, w) of patches
and the data samples, and returns a map (B, M, h, w).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.geometry import block_indices
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.integrations.openmmlab import build_encoder

Grid = tuple[int, int]


class Teacher(nn.Module):
    """What all teachers share: they are never trained, copied or saved."""

    def load(self) -> None:
        """Load the weights; called before the first step."""

    def __deepcopy__(self, _: dict[int, Any]) -> Teacher:
        """Return itself: an average of the student's weights needs no second teacher."""
        return self

    def train(self, mode: bool = True) -> Teacher:  # noqa: ARG002
        """Stay in evaluation mode."""
        return super().train(False)

    @property
    def channels(self) -> int | None:
        """Channels of its maps; None if they depend on the data."""
        return None


@MODELS.register_module()
class EncoderTeacher(Teacher):
    """One layer of a frozen encoder: PE of any size and layer, or 'timm:NAME'.

    Args:
        layer: block, 0-based or from the end. The paper's, layer 41 of PE-Core-G counted from 1, is 40.
        variant, init_cfg: as for the backbone.
        image_size: side of the images that it gets, in pixels; its grid must then be a multiple or a fraction of the
            student's. None resizes them so that both have the same grid.
        dtype: 'bfloat16' halves the memory of its weights.
        options: of the encoder, such as `geometry`.

    Raises ConfigError for a layer that the encoder does not have, for images that are no whole patches, and without
    weights.
    """

    def __init__(
        self,
        *,
        layer: int,
        variant: Any,
        init_cfg: Mapping[str, Any] | None,
        image_size: int | None = None,
        dtype: str = "float32",
        **options: Any,
    ) -> None:
        super().__init__()
        if init_cfg is None:
            raise ConfigError(
                "a teacher has no weights, and features of random weights teach nothing; give "
                "init_cfg=dict(type='Pretrained', checkpoint=...) of the backbone or of the teacher"
            )
        if dtype not in ("float32", "bfloat16"):
            raise ConfigError(f"dtype of a teacher is {dtype!r}; allowed are 'float32' and 'bfloat16'")
        with torch.device("meta"):
            depth = build_encoder(variant).config.depth
        try:
            block_indices("layer", [layer], depth, allow_none=False)
        except ValueError as error:
            raise ConfigError(f"layer {layer} is outside of the teacher, which has blocks 0 to {depth - 1}") from error
        self.encoder = build_encoder(variant, out_indices=[layer], init_cfg=init_cfg, **options)
        patch = self.encoder.patch_size
        if image_size is not None and (image_size < patch or image_size % patch):
            raise ConfigError(f"image_size of a teacher is {image_size}; take a multiple of its patch size, {patch}")
        self.requires_grad_(False).eval()
        self.image_size = image_size
        self.dtype = getattr(torch, dtype)

    @property
    def channels(self) -> int:
        """Width of the encoder."""
        return self.encoder.embed_dim

    def load(self) -> None:
        """Load the weights of `init_cfg`."""
        self.encoder.init_weights()
        self.to(self.dtype)

    def forward(self, images: Tensor, grid: Grid, samples: Sequence[Any]) -> Tensor:  # noqa: ARG002
        """Return the layer's map (B, M, h, w)."""
        patch, config = self.encoder.patch_size, self.encoder.config
        size = (self.image_size,) * 2 if self.image_size else (grid[0] * patch, grid[1] * patch)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        mean, std = (images.new_tensor(values)[:, None, None] for values in (config.mean, config.std))
        maps = self.encoder(((images - mean) / std).to(self.dtype))[0]
        return _fit(maps.float(), grid)


def _fit(maps: Tensor, grid: Grid) -> Tensor:
    """Bring maps to the student's grid, by means of cells or interpolation; one grid must be a multiple of the other"""
    own = (maps.shape[-2], maps.shape[-1])
    if own == grid:
        return maps
    if all(a % b == 0 for a, b in zip(own, grid, strict=True)):
        return F.adaptive_avg_pool2d(maps, grid)
    if all(b % a == 0 for a, b in zip(own, grid, strict=True)):
        return F.interpolate(maps, grid, mode="bilinear", align_corners=False)
    raise ConfigError(
        f"the teacher has {own[0]}x{own[1]} patches and the student {grid[0]}x{grid[1]}, and neither is a multiple of "
        "the other; change the teacher's image_size, or omit it for the student's grid"
    )


@MODELS.register_module()
class ObjectMaskTeacher(Teacher):
    """The true masks of objects, one channel for each: a stand-in for SAM's masks where they are known.

    The data samples need `instances` (H, W), 0 for what is no object, as `PackViews` gives them. A patch's value is the
    part of it that the object covers.

    Args:
        objects: the largest number of an object.
    """

    def __init__(self, objects: int = 31) -> None:
        super().__init__()
        self.objects = objects

    def forward(self, images: Tensor, grid: Grid, samples: Sequence[Any]) -> Tensor:
        """Return the covered parts (B, objects + 1, h, w)."""
        if not all("instances" in sample for sample in samples):
            raise ConfigError("ObjectMaskTeacher needs instance maps; give the dataset's data_prefix.instances")
        ids = torch.stack([sample.instances.data.squeeze(0) for sample in samples]).to(images.device).long()
        if ids.max() > self.objects:
            raise ConfigError(f"an instance map has object {int(ids.max())}; raise ObjectMaskTeacher's objects")
        masks = F.one_hot(ids, self.objects + 1).movedim(-1, 1).float()
        return F.interpolate(masks, grid, mode="bilinear", align_corners=False, antialias=True)


@MODELS.register_module()
class CachedTeacher(Teacher):
    """Keeps the maps of another teacher on disk, in float16, for views that are the same in every epoch.

    A map of 1024 prompts on a grid of 32 x 32 takes 2 MiB. The first time, too, a map is what the file holds.

    Args:
        teacher: config of a teacher.
        folder: where the maps are kept; it may be deleted.
    """

    def __init__(self, teacher: Mapping[str, Any], folder: str) -> None:
        super().__init__()
        self.teacher = MODELS.build(copy.deepcopy(dict(teacher)))
        about = repr(sorted((key, str(value)) for key, value in teacher.items()))
        self.folder = Path(folder, hashlib.sha256(about.encode()).hexdigest()[:12])

    @property
    def channels(self) -> int | None:
        """Channels of the inner teacher."""
        return self.teacher.channels

    def load(self) -> None:
        """Load the inner teacher."""
        self.teacher.load()

    def forward(self, images: Tensor, grid: Grid, samples: Sequence[Any]) -> Tensor:
        """Return the kept maps (B, M, h, w); those that are missing are computed together."""
        augmented = next((sample.metainfo["augmented"] for sample in samples if sample.metainfo.get("augmented")), None)
        if augmented:
            raise ConfigError(
                f"a cached teacher needs views that never change, but {augmented} changes them at random; remove it "
                "from the pipeline, or take the teacher without CachedTeacher"
            )
        paths = [self._path(image, grid) for image in images]
        missing = [i for i, path in enumerate(paths) if not path.is_file()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            maps = self.teacher(images[missing], grid, [samples[i] for i in missing])
            for i, one in zip(missing, maps.half().cpu().numpy(), strict=True):
                with atomic_write(paths[i]) as unfinished, unfinished.open("wb") as file:
                    np.save(file, one)
        return torch.stack([torch.from_numpy(_read(path)) for path in paths]).to(images.device).float()

    def _path(self, image: Tensor, grid: Grid) -> Path:
        content = hashlib.sha256(image.to(torch.uint8).cpu().numpy().tobytes()).hexdigest()[:32]
        return self.folder / f"{content}_{grid[0]}x{grid[1]}.npy"


def _read(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}, a teacher's cached map, is damaged ({error}); delete it") from error
