"""Depth maps in a pipeline: loading, checks, crops, flips, rotations, packing, padding.

From the file to the loss, depth is float32 meters along the optical axis, and 0 where it is missing. In a pipeline it
is `results["gt_depth_map"]` (H, W), listed in `seg_fields`, so that MMSegmentation's own transforms handle it too
(Resize takes the nearest pixel and keeps the values). MMCV's transforms of the same names do not.
`results["intrinsics"]` (fx, fy, cx, cy), in pixels from the center of the first one, follows the crops and flips of
this module; after a rotation, or a flip or resize by another transform, it is dropped.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import mmcv
import numpy as np
import torch
import torch.nn.functional as F
from mmcv.transforms import BaseTransform
from mmengine.logging import print_log
from mmengine.model import ImgDataPreprocessor
from mmengine.registry import MODELS, TRANSFORMS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import exif_turn, open_image, turn_upright
from pe_spatial.planning.registry import register_step

DEPTH = "gt_depth_map"
FORMATS = (".png", ".pgm", ".tif", ".tiff", ".pfm", ".npy", ".npz", ".exr")
"""Files of depth maps."""

SCALES = {1000: "millimeters", 1: "meters", 256: "KITTI's 1/256 m", 5000: "TUM's 1/5000 m", 100: "centimeters"}
"""Units per meter of depth files, and what they are called."""


def read_depth(path: str, *, scale: float) -> np.ndarray:
    """Read a depth map as (H, W) float32 meters; values that are not finite and positive are missing (0).

    The file is one of `FORMATS`, with 16 bits or floats and `scale` units per meter: 1000 for millimeters, 256 for
    KITTI, 1 for meters. Axes of one and equal channels are dropped, EXIF's orientation is applied; EXR needs an OpenCV
    that was told to read it. Raises DatasetError if it cannot be read, or has 8 bits or several channels.
    """
    return _clean(_read(path, scale))[0]


def _read(path: str, scale: float) -> np.ndarray:
    try:
        values = _decode(path)
    except MemoryError:
        raise
    except Exception as error:  # PIL's plugins raise almost anything on broken data
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if Path(path).suffix.lower() not in FORMATS:
            reason = f"{reason}; the formats are {', '.join(FORMATS)}"
        raise DatasetError(f"{path} is not a readable depth map ({reason}). Replace it or remove the pair") from error
    shape = values.shape
    if values.ndim == 3 and values.dtype.itemsize > 1 and (values == values[..., :1]).all():
        values = values[..., 0]
    while values.ndim > 2 and 1 in (values.shape[0], values.shape[-1]):
        values = values.squeeze(0 if values.shape[0] == 1 else -1)
    if values.ndim != 2:
        raise DatasetError(f"{path} has the shape {shape}; give a depth map with one channel, (height, width)")
    if values.dtype.itemsize == 1:
        raise DatasetError(
            f"{path} contains {values.dtype} values, and 256 levels are too coarse for depth; "
            "give 16-bit depth, such as millimeters, or floats"
        )
    return values.astype(np.float32) / np.float32(scale)


def _decode(path: str) -> np.ndarray:
    suffix = Path(path).suffix.lower()
    if suffix in (".npy", ".npz"):
        values = np.load(path, allow_pickle=False)
        if suffix == ".npz":
            if len(values.files) != 1:
                raise ValueError(f"it contains {', '.join(values.files)}, not one array")
            values = values[values.files[0]]
        return values
    if suffix == ".exr":
        values = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)  # its error names what to set
        if values is None:
            raise ValueError("not an EXR file")
        return values
    with open_image(path) as image:
        image.load()
        return np.asarray(turn_upright(image))


def _clean(depth: np.ndarray) -> tuple[np.ndarray, int]:
    """Return the depth with invalid pixels set to 0, and the number of NaN, infinite or negative pixels."""
    valid = (depth > 0) & (depth < np.inf)  # False for NaN
    invalid = int(np.count_nonzero(~valid) - np.count_nonzero(depth == 0))
    return np.where(valid, depth, np.float32(0)), invalid


def check_scale(
    depth: np.ndarray, *, scale: float, max_depth: float | None, path: str, option: str = "scale="
) -> None:
    """Raise DatasetError, naming likely scales, if the median of `depth` (meters, 0 = missing) is implausible.

    `option` is what sets the scale.

    Plausible are 1/200 of `max_depth` to ten times `max_depth` (0.05 m to 100 m for 10 m), and without a `max_depth`
    0.05 m to 1000 m: confusing meters and millimeters is far outside.
    """
    values = depth[depth > 0]
    if not len(values):
        return
    median = float(np.median(values[:: -(-len(values) // 4096)]))  # a few thousand pixels are enough
    low, high = (max_depth / 200, max_depth * 10) if max_depth else (0.05, 1000)
    if low <= median <= high:
        return
    likely = [s for s in SCALES if low <= median * scale / s <= (max_depth or 100)]
    advice = " or ".join(f"{option}{s} ({SCALES[s]})" for s in likely) or "the scale of the file"
    raise DatasetError(
        f"{path} has a median depth of {median:.4g} m at scale={scale:g} (units per meter), "
        f"which is implausible{f' for a max_depth of {max_depth:g} m' if max_depth else ''}; set {advice}"
    )


def fit_to_image(depth: np.ndarray, path: str, size: tuple[int, int], image_path: str | Path) -> np.ndarray:
    """Return a depth map (H, W) of an upright image of `size` (H, W); DatasetError if it has another size.

    Depth of the image's stored pixels is turned as EXIF turns the image.
    """
    if depth.shape == size[::-1]:
        with suppress(OSError), open_image(image_path) as image:
            turn = exif_turn(image)
            if turn is not None:
                depth = np.array(Image.fromarray(depth).transpose(turn))
    if depth.shape == size:
        return depth
    raise DatasetError(
        f"{path} is {depth.shape[0]}x{depth.shape[1]} (height x width) but {image_path} is {size[0]}x{size[1]}; give "
        "maps of the same size and view, and place LoadDepth before transforms that crop the image"
    )


@TRANSFORMS.register_module()
class LoadDepth(BaseTransform):
    """Read the depth map of a pair with `read_depth`, after its image and before any transform of the image.

    Depth outside the pair's range is missing. So are NaN, infinite and negative values, which are counted in the log.
    A map of another size than its image and an implausible scale (`check_scale`) raise DatasetError. `skip_empty`, for
    training, logs a map without any depth and draws another pair.
    """

    def __init__(self, *, skip_empty: bool = False) -> None:
        self.skip_empty = skip_empty
        self.logged: dict[str, set[str]] = {}  # kind of problem -> files, in this process

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Add gt_depth_map (H, W) from depth_path, depth_scale, min_depth and max_depth; None for a pair to skip."""
        path, max_depth = results["depth_path"], results.get("max_depth")
        depth, invalid = _clean(_read(path, results["depth_scale"]))
        if invalid:
            self._log("NaN, infinite or negative depth", path, f"{invalid} of {depth.size} pixels, set to missing")
        depth = fit_to_image(depth, path, tuple(results["ori_shape"]), results["img_path"])
        check_scale(depth, scale=results["depth_scale"], max_depth=max_depth, path=path)
        depth[depth < results.get("min_depth", 0.0)] = 0
        if max_depth is not None:
            depth[depth > max_depth] = 0
        if not depth.any():
            self._log("no depth", path, "skipped" if self.skip_empty else "kept")
            if self.skip_empty:
                return None
        results[DEPTH] = depth
        results.setdefault("seg_fields", []).append(DEPTH)
        return results

    def _log(self, kind: str, path: str, what: str) -> None:
        files = self.logged.setdefault(kind, set())
        before = len(files)
        files.add(path)
        if len(files) > before and len(files) in (1, 10, 100, 1000, 10000):
            message = f"{kind} in {path}: {what} ({len(files)} such files so far in this process)"
            print_log(message, logger="current", level=logging.WARNING)


@TRANSFORMS.register_module()
class DepthCrop(BaseTransform):
    """Crop image and depth to a fixed box; predictions have the size of the box.

    Args:
        box: (left, top, right, bottom) in pixels, right and bottom exclusive: (43, 45, 608, 472) for training on NYUv2
            (AdaBins, BinsFormer, DINOv2), which leaves 427 x 565.
        bottom_center: instead of `box`, (height, width) of a window at the center of the lower edge: (352, 1216) for
            KITTI (cleinc/bts@5e3406b: left = int((width - 1216) / 2)).
        image_only: keep the complete depth, as BTS does in evaluation; then the metric needs `pasted=True`.
    """

    def __init__(
        self, *, box: Sequence[int] | None = None, bottom_center: Sequence[int] | None = None, image_only: bool = False
    ) -> None:
        if (box is None) == (bottom_center is None):
            raise ConfigError(f"box is {box} and bottom_center is {bottom_center}; give exactly one of them")
        if box is not None and not (len(box) == 4 and 0 <= box[0] < box[2] and 0 <= box[1] < box[3]):
            raise ConfigError(f"box is {tuple(box)}; give (left, top, right, bottom) in pixels, not empty")
        self.box, self.bottom_center = box, bottom_center or ()
        self.image_only = image_only

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        left, top, right, bottom = self.box or bottom_center_box(height, width, size=self.bottom_center)
        if left < 0 or top < 0 or right > width or bottom > height:
            raise DatasetError(
                f"{results['img_path']} is {height}x{width} (height x width) and does not contain the box "
                f"(left, top, right, bottom) = ({left}, {top}, {right}, {bottom}); set box of DepthCrop in the "
                "dataset's pipeline, or remove it"
            )
        _crop(results, (left, top, right, bottom), {"img"} if self.image_only else {"img", DEPTH})
        results["ori_shape"] = results["img_shape"]
        return results


def bottom_center_box(height: int, width: int, *, size: Sequence[int]) -> tuple[int, int, int, int]:
    """Return (left, top, right, bottom) of a window of `size` (height, width) at the center of the lower edge."""
    left, top = int((width - size[1]) / 2), height - size[0]
    return left, top, left + size[1], top + size[0]


@TRANSFORMS.register_module()
class DepthRandomCrop(BaseTransform):
    """Crop image and depth to a window of `size` (height, width) at a random position.

    In pixels, (416, 544) for NYUv2 and (352, 704) for KITTI. Smaller images are padded at the right and bottom with
    `pad_val`, and their depth as missing; None raises DatasetError for them.
    """

    def __init__(self, size: Sequence[int], *, pad_val: int | None = None) -> None:
        self.size, self.pad_val = tuple(size), pad_val

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        height, width = results["img"].shape[:2]
        if self.size[0] > height or self.size[1] > width:
            if self.pad_val is None:
                raise DatasetError(
                    f"{results['img_path']} is {height}x{width} (height x width), smaller than the crop of "
                    f"{self.size[0]}x{self.size[1]}; make the crop smaller, or set pad_val=0 of DepthRandomCrop"
                )
            camera = _camera(results)
            height, width = shape = max(height, self.size[0]), max(width, self.size[1])
            results["img"] = mmcv.impad(results["img"], shape=shape, pad_val=(self.pad_val,) * 3)
            if DEPTH in results:
                results[DEPTH] = mmcv.impad(results[DEPTH], shape=shape, pad_val=0)
            results["intrinsics"], results["intrinsics_shape"] = camera, shape
        top = np.random.randint(height - self.size[0] + 1)
        left = np.random.randint(width - self.size[1] + 1)
        _crop(results, (left, top, left + self.size[1], top + self.size[0]), {"img", DEPTH})
        return results


def _crop(results: dict[str, Any], box: Sequence[int], keys: set[str]) -> None:
    left, top, right, bottom = box
    camera = _camera(results)
    for key in keys & results.keys():
        results[key] = results[key][top:bottom, left:right]
    results["img_shape"] = results["intrinsics_shape"] = results["img"].shape[:2]
    results["intrinsics"] = camera and (camera[0], camera[1], camera[2] - left, camera[3] - top)


def _camera(results: Mapping[str, Any]) -> tuple[float, ...] | None:
    """Return the intrinsics if there are any and they are valid for the present image."""
    if results.get("intrinsics") is None or results.get("flip", False) != results.get("intrinsics_flip", False):
        return None
    shape = results.get("intrinsics_shape", results["ori_shape"])
    return tuple(results["intrinsics"]) if tuple(shape) == results["img"].shape[:2] else None


@TRANSFORMS.register_module()
class DepthRandomFlip(BaseTransform):
    """Flip image, depth and camera left to right with probability `prob`.

    MMSegmentation's RandomFlip flips the depth too, MMCV's does not.
    """

    def __init__(self, *, prob: float = 0.5) -> None:
        self.prob = prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        results["flip"] = bool(np.random.rand() < self.prob)
        results["flip_direction"] = "horizontal" if results["flip"] else None
        if results["flip"]:
            camera = _camera({**results, "flip": False})
            for key in {"img", DEPTH} & results.keys():
                results[key] = results[key][:, ::-1]
            width = results["img"].shape[1]
            results["intrinsics"] = camera and (*camera[:2], width - 1 - camera[2], camera[3])
        results["intrinsics_flip"] = results["flip"]
        return results


@TRANSFORMS.register_module()
class DepthRandomRotate(BaseTransform):
    """Rotate image (bilinear) and depth (nearest) by -degrees to degrees around the center, with probability `prob`.

    Pixels from outside the image get `pad_val` (0 in BTS and in the recipe of DINOv2) and no depth.
    """

    def __init__(self, *, degrees: float = 2.5, prob: float = 0.5, pad_val: int = 0) -> None:
        self.degrees, self.prob, self.pad_val = degrees, prob, pad_val

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        angle = np.random.uniform(-self.degrees, self.degrees)
        image = np.ascontiguousarray(results["img"])
        results["img"] = mmcv.imrotate(image, angle, border_value=(self.pad_val,) * 3)
        if DEPTH in results:
            results[DEPTH] = mmcv.imrotate(results[DEPTH], angle, border_value=0, interpolation="nearest")
        results["intrinsics"] = None
        return results


@TRANSFORMS.register_module()
class DepthColorAug(BaseTransform):
    """Random gamma, brightness and channel balance (cleinc/bts@5e3406b), on 8-bit images, RGB or BGR.

    As in BTS, gamma applies to pixels scaled to [0, 1]. The toolbox of DINOv2's training applies it to [0, 255], where
    a gamma of 0.9 to 1.1 also changes the brightness by a factor of 0.57 to 1.74.

    Args:
        gamma, brightness, color: ranges of factors; `color` is drawn per channel. BTS has brightness (0.75, 1.25) for
            NYUv2 and (0.9, 1.1) for KITTI.
        prob: probability of a change.
    """

    def __init__(
        self, *, gamma: tuple[float, float] = (0.9, 1.1), brightness: tuple[float, float] = (0.75, 1.25),
        color: tuple[float, float] = (0.9, 1.1), prob: float = 0.5,
    ) -> None:  # fmt: skip
        self.gamma, self.brightness, self.color, self.prob = gamma, brightness, color, prob

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        if np.random.rand() >= self.prob:
            return results
        gamma, brightness = np.random.uniform(*self.gamma), np.random.uniform(*self.brightness)
        factor = brightness * np.random.uniform(*self.color, size=3)
        table = ((np.arange(256) / 255) ** gamma)[:, None] * factor  # (256, 3)
        levels = np.round(255 * table.clip(0, 1)).astype(np.uint8)[None]
        results["img"] = cv2.LUT(np.ascontiguousarray(results["img"]), levels)
        return results


@TRANSFORMS.register_module()
class PackDepthInputs(BaseTransform):
    """Pack an image and, if it has one, its depth map for the model.

    inputs is (3, H, W) uint8, BGR; data_samples has gt_depth_map (1, H, W) float32 and, as far as available, img_path,
    depth_path, ori_shape, img_shape, scale_factor, flip, flip_direction, max_depth and intrinsics.
    """

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        keys = {"img_path", "depth_path", "ori_shape", "img_shape", "scale_factor"}
        keys = (keys | {"flip", "flip_direction", "max_depth"}) & results.keys()
        sample = SegDataSample(metainfo={"flip": False, **{key: results[key] for key in keys}})
        if (camera := _camera(results)) is not None:
            sample.set_metainfo({"intrinsics": camera})
        if DEPTH in results:
            depth = np.ascontiguousarray(results[DEPTH], dtype=np.float32)
            sample.gt_depth_map = PixelData(data=torch.from_numpy(depth)[None])
        image = np.ascontiguousarray(results["img"].transpose(2, 0, 1))
        return {"inputs": torch.from_numpy(image), "data_samples": sample}


@MODELS.register_module()
class DepthPreprocessor(ImgDataPreprocessor):
    """Normalize images and pad a batch to one size at the right and bottom: images with `pad_val`, depth with 0.

    In evaluation depth maps keep their size, and `padding_size` (left, right, top, bottom) tells what to crop from the
    prediction.

    Args:
        mean, std: statistics of the channels (RGB if `bgr_to_rgb`), for pixels in [0, 255].
        bgr_to_rgb: convert BGR to RGB.
        pad_size_divisor: pad both sides to a multiple of this.
        pad_val: value after normalization, so that 0 is the mean color.
    """

    def __init__(
        self, *, mean: Sequence[float], std: Sequence[float], bgr_to_rgb: bool = True, pad_size_divisor: int = 1,
        pad_val: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__(mean, std, pad_size_divisor, pad_val, bgr_to_rgb)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:
        """Lists of images (3, H, W) and samples -> inputs (B, 3, H', W') and samples."""
        sizes = [tuple(image.shape[-2:]) for image in data["inputs"]]
        data = super().forward(data, training)
        if data["data_samples"] is None:
            return data
        height, width = data["inputs"].shape[-2:]
        for sample, (h, w) in zip(data["data_samples"], sizes, strict=True):
            padding = (0, width - w, 0, height - h)
            sample.set_metainfo({"img_shape": (h, w), "pad_shape": (height, width), "padding_size": padding})
            if not training:
                continue
            if DEPTH not in sample:
                raise ConfigError("a sample has no gt_depth_map; the pipeline needs LoadDepth and PackDepthInputs")
            depth = sample.gt_depth_map.data
            if depth.shape[-2:] != (h, w):
                raise ConfigError(
                    f"{sample.get('img_path')} reaches the model as {h}x{w} and its depth map as "
                    f"{depth.shape[-2]}x{depth.shape[-1]}; a transform of the pipeline changes one without the other"
                )
            sample.gt_depth_map = PixelData(data=F.pad(depth, padding))
        return data


register_step("DepthRandomCrop", lambda step: dict(size=tuple(step["size"])))
