"""Images without labels: folders, the images of a COCO file, and tar shards in WebDataset's form; their views."""

import io
import json
import math
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, TRANSFORMS
from mmengine.structures import BaseDataElement, PixelData
from PIL import Image

from pe_spatial.engine.loading import RefetchBrokenMixin, log_skipped
from pe_spatial.errors import ConfigError, DatasetError, listed
from pe_spatial.images import decode_rgb, image_suffixes, is_hidden, not_opened, read_bytes


@DATASETS.register_module()
class UnlabeledImages(RefetchBrokenMixin, BaseDataset):
    """Images of a folder, searched recursively, or those that a COCO file lists; broken ones are logged and replaced.

    Args:
        ann_file: COCO file whose images are taken, relative to `data_root`; '' takes every image below `img`.
        data_prefix: `img`, the folder of the images, and optionally `instances`, that of PNG files of the same names
            with the numbers of objects, both relative to `data_root`.
        options: of mmengine's `BaseDataset`, such as `data_root`, `pipeline` and `indices`.
    """

    def __init__(self, *, ann_file: str = "", data_prefix: Mapping[str, str] | None = None, **options: Any) -> None:
        super().__init__(ann_file=ann_file, data_prefix={"img": "", **(data_prefix or {})}, **options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return img_path and, with the prefix, instances_path."""
        folder = Path(self.data_prefix["img"])
        names = self._listed() if self.ann_file else self._found(folder)
        instances = self.data_prefix.get("instances")
        samples = [dict(img_path=str(folder / name)) for name in names]
        for sample, name in zip(samples, names, strict=True):
            if instances:
                sample["instances_path"] = str(Path(instances, name).with_suffix(".png"))
        return samples

    def _listed(self) -> list[str]:
        try:
            names = [image["file_name"] for image in json.loads(Path(self.ann_file).read_bytes())["images"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{self.ann_file} is no COCO file with images ({error}); give another ann_file"
            ) from error
        if not names:
            raise DatasetError(f"{self.ann_file} lists no images; give another ann_file")
        return names

    def _found(self, folder: Path) -> list[str]:
        if not folder.is_dir():
            raise DatasetError(f"there is no folder {folder}; check data_root (--data-root) and data_prefix.img")
        files = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in image_suffixes())
        names = [str(path.relative_to(folder)) for path in files if not is_hidden(path, folder)]
        if not names:
            raise DatasetError(f"{folder} has no images; give another data_root (--data-root) or data_prefix.img")
        return names


@DATASETS.register_module()
class TarShards(RefetchBrokenMixin, BaseDataset):
    """Images in tar shards of WebDataset's form; other members, such as captions and labels, are not read.

    The headers are read once, at the start of a run, and images then at any place, so that a run is repeatable and
    resumes exactly. Of a shard that is cut off, the complete images are used, and the log says how many.

    Args:
        shards: pattern of the files, such as 'part-*.tar', relative to `data_root`.
        options: of mmengine's `BaseDataset`, such as `data_root`, `pipeline` and `indices`.
    """

    def __init__(self, *, shards: str = "*.tar", **options: Any) -> None:
        self.shards = shards
        super().__init__(**options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return img_path (shard and member, for messages), shard, offset and size in bytes."""
        root = Path(self.data_root or ".")
        files = sorted(root.glob(self.shards))
        if not files:
            raise DatasetError(f"no file matches {root / self.shards}; check data_root (--data-root) and shards")
        samples, damaged = [], []
        for file in files:
            members, problem = read_headers(file)
            samples += members
            if problem:
                damaged.append(problem)
        if damaged:
            MMLogger.get_current_instance().warning(f"{len(damaged)} of {len(files)} shards: {listed(damaged, 3)}")
        if not samples:
            raise DatasetError(f"the {len(files)} shards of {root / self.shards} hold no image; {listed(damaged, 1)}")
        return samples


def read_headers(file: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the complete images of a tar file, and what is wrong with it, '' if nothing is."""
    images: list[dict[str, Any]] = []
    length = file.stat().st_size
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if member.isfile() and Path(member.name).suffix.lower() in image_suffixes():
                    about = dict(img_path=f"{file}/{member.name}", shard=str(file))
                    images.append(dict(about, offset=member.offset_data, size=member.size))
    except (tarfile.TarError, OSError, EOFError) as error:
        return images, f"{file} is damaged after {len(images)} images, which are used ({error}); restore it"
    return images, ""


@TRANSFORMS.register_module()
class LoadUnlabeled(BaseTransform):
    """Read an image of `UnlabeledImages` or `TarShards`, and its instance map, if there is one.

    Adds img (H, W, 3) uint8 BGR and instances (H, W) uint8. A broken image is logged, and another one is drawn.
    """

    def __init__(self) -> None:
        self.broken: set[str] = set()

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Return None for an image to skip."""
        try:
            results["img"] = decode_rgb(_bytes(results), results["img_path"])[..., ::-1]
            if "instances_path" in results:
                results["instances"] = _instances(results)
        except DatasetError as error:
            log_skipped(self.broken, "images", results["img_path"], error)
            return None
        return results


def _bytes(results: Mapping[str, Any]) -> bytes:
    if "shard" not in results:
        return read_bytes(results["img_path"])
    try:
        with open(results["shard"], "rb") as file:
            file.seek(results["offset"])
            return file.read(results["size"])
    except OSError as error:
        raise not_opened(results["shard"], error) from error


def _instances(results: Mapping[str, Any]) -> np.ndarray:
    path = results["instances_path"]
    try:
        values = np.asarray(Image.open(io.BytesIO(read_bytes(path))))  # OpenCV would turn a palette into colors
    except (OSError, SyntaxError) as error:
        raise DatasetError(f"{path} is no image of object numbers ({error}); restore it") from error
    if values.shape != results["img"].shape[:2]:
        raise DatasetError(f"{path} is {values.shape}, and its image {results['img'].shape[:2]}; restore the files")
    return values


def _crop_resize(results: dict[str, Any], box: Sequence[int], size: int) -> None:
    """Crop (top, left, height, width) and resize to a square; labels to the nearest value."""
    top, left, height, width = box
    for key in ("img", "instances"):
        if key in results:
            crop = results[key][top : top + height, left : left + width]
            shrinks = min(height, width) > size
            smooth = cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC
            way = smooth if key == "img" else cv2.INTER_NEAREST
            results[key] = cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=way)


def _check_size(size: int) -> int:
    if size < 1:
        raise ConfigError(f"size is {size}; give the side of the views in pixels")
    return size


@TRANSFORMS.register_module()
class FixedView(BaseTransform):
    """The complete image, resized to a square: the same view every time, as a cached teacher needs it."""

    def __init__(self, size: int) -> None:
        self.size = _check_size(size)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Resize."""
        _crop_resize(results, (0, 0, *results["img"].shape[:2]), self.size)
        return results


@TRANSFORMS.register_module()
class AspectJitter(BaseTransform):
    """The largest crop of a random aspect ratio, at a random place, resized to a square.

    The paper states an aspect jitter of 0.75 to 1.33 and no random crop of another size.

    Args:
        size: side of the square in pixels.
        ratio: smallest and largest width over height; its logarithm is uniform.
    """

    def __init__(self, size: int, ratio: Sequence[float] = (0.75, 1.33)) -> None:
        self.size = _check_size(size)
        self.ratio = tuple(ratio)
        if not (len(self.ratio) == 2 and 0 < self.ratio[0] <= self.ratio[1]):
            raise ConfigError(f"ratio is {ratio}; give the smallest and the largest width over height")

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop and resize."""
        height, width = results["img"].shape[:2]
        low, high = map(math.log, self.ratio)
        aspect = math.exp(np.random.uniform(low, high))
        h, w = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
        top, left = np.random.randint(height - h + 1), np.random.randint(width - w + 1)
        _crop_resize(results, (top, left, h, w), self.size)
        results["augmented"] = "AspectJitter"
        return results


@TRANSFORMS.register_module()
class ColorJitter(BaseTransform):
    """Random brightness and saturation, in random order: factors of 1 - x to 1 + x.

    The paper's color jitter is (0.32, 0, 0.32, 0): brightness, contrast, saturation, hue.
    """

    def __init__(self, brightness: float = 0.32, saturation: float = 0.32) -> None:
        if not (0 <= brightness <= 1 and 0 <= saturation <= 1):
            raise ConfigError(f"brightness is {brightness} and saturation {saturation}; both are between 0 and 1")
        self.brightness, self.saturation = brightness, saturation

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Change the colors."""
        image = results["img"].astype(np.float32)
        light, color = (np.random.uniform(1 - x, 1 + x) for x in (self.brightness, self.saturation))
        for step in np.random.permutation(2):
            if step:
                image = image * light
            else:
                gray = image @ np.array([0.114, 0.587, 0.299], np.float32)  # of BGR
                image = gray[..., None] + (image - gray[..., None]) * color
            image = image.clip(0, 255)
        results["img"] = (image + 0.5).astype(np.uint8)
        results["augmented"] = "ColorJitter"
        return results


@TRANSFORMS.register_module()
class FlipView(BaseTransform):
    """Flip image and instance map horizontally, half of the time."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Flip."""
        if np.random.rand() < 0.5:
            for key in ("img", "instances"):
                if key in results:
                    results[key] = results[key][:, ::-1]
        results["augmented"] = "FlipView"
        return results


@TRANSFORMS.register_module()
class PackViews(BaseTransform):
    """Pack a view: inputs (3, H, W) uint8 BGR, and a sample with its path, and the instance map if there is one."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Pack."""
        about = dict(img_path=results["img_path"], augmented=results.get("augmented"))
        sample = BaseDataElement(metainfo=about)
        if "instances" in results:
            sample.instances = PixelData(data=torch.from_numpy(np.ascontiguousarray(results["instances"]))[None])
        image = np.ascontiguousarray(results["img"].transpose(2, 0, 1))
        return dict(inputs=torch.from_numpy(image), data_samples=sample)
