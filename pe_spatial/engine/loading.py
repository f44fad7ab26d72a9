"""Checked reading of images as one of OpenMMLab's transforms, for every task."""

from collections.abc import Mapping, Sequence
from typing import Any

import mmcv
from mmcv.transforms import BaseTransform
from mmengine import fileio
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.registry import TRANSFORMS, Registry
from mmengine.structures import PixelData

from pe_spatial.errors import DatasetError
from pe_spatial.images import decode_rgb, not_opened


class RefetchBrokenMixin(BaseDataset):
    """For mmengine's datasets: in training, draw another sample where the pipeline returns None for a broken one."""

    def __getitem__(self, idx: int) -> Any:
        """Return a sample; DatasetError after `max_refetch` more draws."""
        if self.test_mode:
            return super().__getitem__(idx)
        self.full_init()
        for _ in range(self.max_refetch + 1):
            sample = self.prepare_data(idx)
            if sample is not None:
                return sample
            idx = self._rand_another()
        place = self.ann_file or self.data_prefix.get("img") or self.data_root
        raise DatasetError(
            f"{self.max_refetch + 1} draws from {place} gave no usable image (the log names the broken ones). "
            "Check data_root (--data-root), or restore the files."
        )


def log_skipped(skipped: set[str], kind: str, path: str, problem: Exception) -> None:
    """Log once why a training sample is skipped, and how many of this kind this process has skipped."""
    if path not in skipped:
        skipped.add(path)
        MMLogger.get_current_instance().warning(f"skipped ({len(skipped)} {kind} so far in this process): {problem}")


SCOPED_TRANSFORMS = Registry("transform", parent=TRANSFORMS, scope="pe_spatial", locations=[__name__])
"""Transforms with the name of one of OpenMMLab's; configs write `pe_spatial.` before it."""


@SCOPED_TRANSFORMS.register_module("LoadImageFromFile")  # MMDetection's DetInferencer looks for this name, in any scope
class LoadCheckedImage(BaseTransform):
    """Read an image of any mode as 8-bit BGR, rotated by its EXIF, and compare its size with the annotations.

    In configs it is `pe_spatial.LoadImageFromFile`.

    Gray, palette, transparent (transparency is dropped), CMYK and 16-bit images become three channels of 8 bits. PIL
    decodes, as in the released recipe.

    Args:
        skip_broken: for training: log an unusable image and let the dataset draw another one, instead of raising.
        backend_args: options of mmengine's file backend.
    """

    def __init__(self, *, skip_broken: bool = False, backend_args: Mapping[str, Any] | None = None) -> None:
        self.skip_broken = skip_broken
        self.backend_args = backend_args
        self.broken: set[str] = set()  # seen by this process

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Add img (H, W, 3) uint8 BGR, img_shape and ori_shape; None for an image to skip."""
        path = results["img_path"]
        try:
            data = fileio.get(path, backend_args=self.backend_args)
            size = (results["height"], results["width"]) if "height" in results else None
            image = decode_rgb(data, path, size=size, writable=False)
            expected = size or image.shape[:2]
            if image.shape[:2] != expected:
                raise DatasetError(
                    f"{path} is {image.shape[0]}x{image.shape[1]} (height x width, after EXIF rotation) but its "
                    f"annotations say {expected[0]}x{expected[1]}; fix the annotation file or restore the image"
                )
        except (DatasetError, OSError) as error:
            problem = error if isinstance(error, DatasetError) else not_opened(path, error)
            if not self.skip_broken:
                raise problem from error
            log_skipped(self.broken, "images", path, problem)
            return None
        results["img"] = mmcv.rgb2bgr(image)  # far faster than a view, which the next step would have to copy
        results["img_shape"] = results["ori_shape"] = image.shape[:2]
        return results


@TRANSFORMS.register_module()
class CropPackedCenter(BaseTransform):
    """Crop packed images and their maps of labels (`PixelData`) to at most `size` (h, w) in pixels, at the center."""

    def __init__(self, size: Sequence[int]) -> None:
        self.size = tuple(size)

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Crop inputs (3, H, W) and data_samples; img_shape follows."""
        h, w = results["inputs"].shape[-2:]
        top, left = max(h - self.size[0], 0) // 2, max(w - self.size[1], 0) // 2
        window = (..., slice(top, top + self.size[0]), slice(left, left + self.size[1]))
        results["inputs"], sample = results["inputs"][window], results["data_samples"]
        for name, value in list(sample.items()):
            if isinstance(value, PixelData):
                setattr(sample, name, PixelData(data=value.data[window]))
        sample.set_metainfo(dict(img_shape=tuple(results["inputs"].shape[-2:])))
        return results
