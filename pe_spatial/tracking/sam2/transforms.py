"""Pipeline transforms of a clip, which change all frames, images and masks in the same way, and its packing.

In `results`, `frames` is a list of T images (H, W, 3) uint8 RGB and `masks` (N, T, H, W) bool. The values,
their order and the random distributions are those of SAM 2 (facebookresearch/sam2@2b90b9f:
training/dataset/transforms.py, configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml). Random numbers come from
NumPy's global generator, as `SeedAugmentation` requires.
"""

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

_FILL = (123, 116, 103)  # RGB of pixels from outside the image


@TRANSFORMS.register_module()
class ClipFlip(BaseTransform):
    """Flip the clip horizontally with probability `prob`."""

    def __init__(self, *, prob: float = 0.5) -> None:
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() < self.prob:
            results["frames"] = [np.ascontiguousarray(frame[:, ::-1]) for frame in results["frames"]]
            results["masks"] = np.ascontiguousarray(results["masks"][..., ::-1])
        return results


@TRANSFORMS.register_module()
class ClipAffine(BaseTransform):
    """Rotate and shear the clip about the center of its frames: images bilinearly, masks by nearest neighbor.

    If an object would lose all pixels in the first frame, the clip stays unchanged. Pixels from outside get SAM 2's
    mean color in images and background in masks.

    Args:
        degrees: the angle is drawn from -degrees to degrees.
        shear: the shear along x is drawn from -shear to shear, in degrees; like torchvision's RandomAffine with one
            number, it does not shear along y.
    """

    def __init__(self, *, degrees: float, shear: float = 0.0) -> None:
        self.degrees, self.shear = degrees, shear

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        angle = np.random.uniform(-self.degrees, self.degrees)
        shear = np.random.uniform(-self.shear, self.shear)
        masks = results["masks"]
        height, width = masks.shape[-2:]
        matrix, size = affine_matrix(angle, shear, (height, width)), (width, height)
        warped = np.empty_like(masks)
        for t in range(masks.shape[1]):
            for n in range(len(masks)):
                warped[n, t] = cv2.warpAffine(masks[n, t].view(np.uint8), matrix, size, flags=cv2.INTER_NEAREST)
            if t == 0 and not warped[:, 0].any((1, 2)).all():
                return results
        results["masks"] = warped
        results["frames"] = [cv2.warpAffine(frame, matrix, size, borderValue=_FILL) for frame in results["frames"]]
        return results


def affine_matrix(angle: float, shear: float, size: tuple[int, int]) -> np.ndarray:
    """Return the matrix (2, 3) from old to new pixels (x, y): a shear along x, then a clockwise rotation, in degrees.

    Both are as in torchvision's `affine`. The center of `size` (height, width) stays in place.
    """
    turn, slant = math.radians(angle), math.tan(math.radians(shear))
    cos, sin = math.cos(turn), math.sin(turn)
    linear = np.array([[cos, -cos * slant - sin], [sin, -sin * slant + cos]])
    center = (np.array(size[::-1]) - 1) / 2
    return np.column_stack([linear, center - linear @ center])


@TRANSFORMS.register_module()
class ClipResize(BaseTransform):
    """Resize images and masks to `size` x `size` pixels, ignoring the aspect ratio, bilinearly with antialiasing.

    A pixel belongs to an object that covers more than half of it: SAM 2 resizes masks like images, then rounds.
    """

    def __init__(self, *, size: int) -> None:
        self.size = size

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        size = (self.size, self.size)
        results["frames"] = [
            np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR)) for frame in results["frames"]
        ]
        masks = results["masks"]
        resized = np.empty((*masks.shape[:2], *size), bool)  # (N, T, S, S)
        for t in range(masks.shape[1]):  # one frame at a time: floats take four times the memory
            covered = torch.from_numpy(masks[:, t]).float()[None]  # (1, N, H, W)
            resized[:, t] = (F.interpolate(covered, size, mode="bilinear", antialias=True)[0] > 0.5).numpy()
        results["masks"] = resized
        return results


@TRANSFORMS.register_module()
class ClipColorJitter(BaseTransform):
    """Change brightness, contrast and saturation in random order, as torchvision's ColorJitter does to PIL images.

    Args:
        brightness, contrast, saturation: b draws a factor from 1 - b to 1 + b.
        per_frame: draw new factors for every frame.
    """

    def __init__(
        self, *, brightness: float = 0.0, contrast: float = 0.0, saturation: float = 0.0, per_frame: bool = False
    ) -> None:
        self.bounds, self.per_frame = (brightness, contrast, saturation), per_frame

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        kinds = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        frames = []
        for t, frame in enumerate(results["frames"]):
            if self.per_frame or t == 0:
                factors = [np.random.uniform(max(0.0, 1 - bound), 1 + bound) for bound in self.bounds]
                order = np.random.permutation(len(kinds))
            image = Image.fromarray(frame)
            for i in order:
                image = kinds[i](image).enhance(factors[i])
            frames.append(np.asarray(image))
        results["frames"] = frames
        return results


@TRANSFORMS.register_module()
class ClipGrayscale(BaseTransform):
    """Convert the clip to gray with probability `prob`."""

    def __init__(self, *, prob: float = 0.05) -> None:
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() < self.prob:
            gray = (Image.fromarray(frame).convert("L") for frame in results["frames"])
            results["frames"] = [np.asarray(image.convert("RGB")) for image in gray]
        return results


@TRANSFORMS.register_module()
class PackClip(BaseTransform):
    """Pack a clip for the model.

    `inputs` is (T, 3, H, W) uint8 RGB, `masks` is (N, T, H, W) bool, and `data_samples` has img_path ('<folder> <first
    frame>..<last frame>'), video, frames (names) and objects (ids). Objects that vanished when the first frame was
    resized are omitted; if none remains, another clip is drawn.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        kept = np.flatnonzero(results["masks"][:, 0].any((1, 2)))
        if not len(kept):
            return None
        names = results["frame_names"]
        window = names[0] if len(names) == 1 else f"{names[0]}..{names[-1]}"
        objects = [results["objects"][i] for i in kept]
        info = dict(img_path=f"{results['img_path']} {window}", video=results["video"], frames=names, objects=objects)
        frames = np.ascontiguousarray(np.stack(results["frames"]).transpose(0, 3, 1, 2))
        masks = torch.from_numpy(results["masks"][kept])
        return dict(inputs=torch.from_numpy(frames), masks=masks, data_samples=BaseDataElement(metainfo=info))


register_step("ClipResize", lambda step: dict(size=(step["size"], step["size"])))
