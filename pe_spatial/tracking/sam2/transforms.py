"""Changes of a clip in a pipeline: one draw for all of its frames, images and masks together, and the packing.

In `results`, `frames` is a list of T images (H, W, 3) uint8 RGB and `masks` (N, T, H, W) bool. The released values,
their order and what is drawn are those of SAM 2 (facebookresearch/sam2@2b90b9f: training/dataset/transforms.py,
configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml). All randomness is NumPy's global one, as
`SeedAugmentation` wants.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.registry import TRANSFORMS
from mmengine.structures import BaseDataElement
from PIL import Image, ImageEnhance

from pe_spatial.planning.registry import register_step

_FILL = (123, 116, 103)  # RGB, of pixels from outside the image


@TRANSFORMS.register_module()
class ClipFlip(BaseTransform):
    """Mirror the clip left to right, with a probability of `prob`."""

    def __init__(self, *, prob: float = 0.5) -> None:
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Mirror, or not."""
        if np.random.rand() < self.prob:
            results["frames"] = [np.ascontiguousarray(frame[:, ::-1]) for frame in results["frames"]]
            results["masks"] = np.ascontiguousarray(results["masks"][..., ::-1])
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(prob={self.prob})"


@TRANSFORMS.register_module()
class ClipAffine(BaseTransform):
    """Turn and shear the clip about the center of its frames, images bilinear, masks by the nearest pixel.

    If that would leave an object without a pixel in the first frame, the clip stays as it is. What comes from outside
    is SAM 2's mean color in images, and background in masks.

    Args:
        degrees: the angle is drawn from -degrees to degrees.
        shear: along x, in degrees too; torchvision's RandomAffine with one number does not shear along y either.
    """

    def __init__(self, *, degrees: float, shear: float = 0.0) -> None:
        self.degrees = degrees
        self.shear = shear

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Draw a matrix and apply it."""
        angle = np.random.uniform(-self.degrees, self.degrees)
        shear = np.random.uniform(-self.shear, self.shear)
        masks = results["masks"]
        matrix = affine_matrix(angle, shear, masks.shape[-2:])
        warped = np.empty_like(masks)
        for t in range(masks.shape[1]):
            for n in range(len(masks)):
                warped[n, t] = _warp(masks[n, t].view(np.uint8), matrix, cv2.INTER_NEAREST, 0)
            if t == 0 and not warped[:, 0].any((1, 2)).all():
                return results
        results["masks"] = warped
        results["frames"] = [_warp(frame, matrix, cv2.INTER_LINEAR, _FILL) for frame in results["frames"]]
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(degrees={self.degrees}, shear={self.shear})"


def affine_matrix(angle: float, shear: float, size: tuple[int, int]) -> np.ndarray:
    """Return the matrix (2, 3) from old to new pixels (x, y): sheared along x, then turned clockwise, both in degrees.

    Args:
        angle, shear: as torchvision's `affine` has them.
        size: (height, width); its center stays in place.
    """
    turn, slant = math.radians(angle), math.tan(math.radians(shear))
    cos, sin = math.cos(turn), math.sin(turn)
    linear = np.array([[cos, -cos * slant - sin], [sin, -sin * slant + cos]])
    center = (np.array(size[::-1]) - 1) / 2
    return np.column_stack([linear, center - linear @ center])


def _warp(image: np.ndarray, matrix: np.ndarray, interpolation: int, fill: Any) -> np.ndarray:
    height, width = image.shape[:2]
    return cv2.warpAffine(image, matrix, (width, height), flags=interpolation, borderValue=fill)


@TRANSFORMS.register_module()
class ClipResize(BaseTransform):
    """Bring images and masks to `size` x `size` pixels, whatever their aspect, bilinear with antialiasing.

    A pixel belongs to an object that covers more than half of it: SAM 2 resizes masks of 0 and 1 as it does images,
    and rounds.
    """

    def __init__(self, *, size: int) -> None:
        self.size = size

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize."""
        size = (self.size, self.size)
        results["frames"] = [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in results["frames"]
        ]
        masks = results["masks"]
        resized = np.empty((*masks.shape[:2], *size), bool)  # (N, T, S, S)
        for t in range(masks.shape[1]):  # one frame at a time: floats take four times the memory
            covered = torch.from_numpy(masks[:, t]).float()[None]  # (1, N, H, W)
            covered = F.interpolate(covered, size, mode="bilinear", antialias=True)[0]
            resized[:, t] = (covered > 0.5).numpy()
        results["masks"] = resized
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(size={self.size})"


@TRANSFORMS.register_module()
class ClipColorJitter(BaseTransform):
    """Change brightness, contrast and saturation in a random order, as torchvision's ColorJitter does to PIL images.

    Args:
        brightness, contrast, saturation: b draws a factor from 1 - b to 1 + b.
        per_frame: draw anew for every frame.
    """

    def __init__(
        self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, per_frame: bool = False
    ) -> None:
        self.brightness = brightness
        self.contrast = contrast
        self.saturation = saturation
        self.per_frame = per_frame

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Draw and change."""
        drawn = self._draw()
        frames = []
        for index, frame in enumerate(results["frames"]):
            if self.per_frame and index:
                drawn = self._draw()
            image = Image.fromarray(frame)
            for enhance, factor in drawn:
                image = enhance(image).enhance(factor)
            frames.append(np.asarray(image))
        results["frames"] = frames
        return results

    def _draw(self) -> list[tuple[Any, float]]:
        kinds = (
            (ImageEnhance.Brightness, self.brightness),
            (ImageEnhance.Contrast, self.contrast),
            (ImageEnhance.Color, self.saturation),
        )
        drawn = [(enhance, np.random.uniform(max(0.0, 1 - bound), 1 + bound)) for enhance, bound in kinds]
        return [drawn[i] for i in np.random.permutation(len(drawn))]

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(brightness={self.brightness}, contrast={self.contrast}, "
            f"saturation={self.saturation}, per_frame={self.per_frame})"
        )


@TRANSFORMS.register_module()
class ClipGrayscale(BaseTransform):
    """Take the colors out of the clip, with a probability of `prob`."""

    def __init__(self, *, prob: float = 0.05) -> None:
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Make it gray (three equal channels), or not."""
        if np.random.rand() < self.prob:
            results["frames"] = [
                np.asarray(Image.fromarray(frame).convert("L").convert("RGB")) for frame in results["frames"]
            ]
        return results

    def __repr__(self) -> str:
        return f"{type(self).__name__}(prob={self.prob})"


@TRANSFORMS.register_module()
class PackClip(BaseTransform):
    """Pack a clip for the model.

    inputs is (T, 3, H, W) uint8, RGB, and masks (N, T, H, W) bool; data_samples knows img_path ('<folder> <first
    frame>..<last frame>'), video, frames (names) and objects (ids). An object too small to survive the resizing of the
    first frame is left out; if none is left, another clip is drawn.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Return dict(inputs=, masks=, data_samples=)."""
        kept = np.flatnonzero(results["masks"][:, 0].any((1, 2)))
        if not len(kept):
            return None
        names = results["frame_names"]
        window = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        sample = BaseDataElement(
            metainfo=dict(
                img_path=f"{results['img_path']} {window}",
                video=results["video"],
                frames=names,
                objects=[results["objects"][i] for i in kept],
            )
        )
        frames = np.ascontiguousarray(np.stack(results["frames"]).transpose(0, 3, 1, 2))
        masks = results["masks"][kept]
        return dict(inputs=torch.from_numpy(frames), masks=torch.from_numpy(masks), data_samples=sample)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


register_step("ClipResize", lambda step: dict(size=(step["size"], step["size"])))
