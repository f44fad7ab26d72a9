"""DETA's test-time augmentation: an image at several sizes on one canvas, plain and mirrored, merged by soft-NMS.

As in perception_models@3e352cc:apps/detection/DETA_pe/{engine_tta,datasets/coco}.py. Views are made from the normalized
image, on its device, all sizes from the largest one. Each mirrored view follows the plain one.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from mmengine.model import BaseTTAModel
from mmengine.registry import MODELS
from mmengine.structures import InstanceData
from torch import Tensor

from pe_spatial.atomic import atomic_write, write_file
from pe_spatial.detection.deta.postprocess import postprocess
from pe_spatial.detection.soft_nms import soft_nms
from pe_spatial.errors import ConfigError

RECIPES: dict[int, dict[str, Sequence[Any]]] = {
    1824: dict(long_sides=(1728, 1536, 1344), size_ranges=((0, 10000), (0, 10000), (64, 10000), (64, 10000))),
    1728: dict(long_sides=(1536, 1152), size_ranges=((0, 10000), (32, 10000), (32, 10000))),
}
"""Side of the canvas -> long sides of the resized copies, and for every scale the sizes that it may detect."""


def make_views(image: Tensor, *, long_sides: Sequence[int], antialias: bool = True) -> list[Tensor]:
    """Return the image and its resized copies, each followed by its mirror image.

    Args:
        image: (3, h, w), normalized, without padding.
        long_sides: long sides of the copies, in pixels; both sides are truncated, but to at least one pixel.
        antialias: the default of torchvision since 0.17; with older versions the released code does not antialias.
    """
    height, width = image.shape[-2:]
    scales = [image]
    for side in long_sides:
        scale = side / max(height, width)
        size = max(1, int(scale * height)), max(1, int(scale * width))
        scales.append(F.interpolate(image[None], size, mode="bilinear", antialias=antialias)[0])
    return [view for plain in scales for view in (plain, plain.flip(-1))]


def detect_in_view(
    logits: Tensor,
    boxes: Tensor,
    *,
    size: tuple[int, int],
    mirrored: bool,
    size_range: tuple[float, float],
    **options: Any,
) -> InstanceData:
    """Return the detections of one view with a size that its scale may detect.

    Args:
        logits, boxes: (Q, C), before the sigmoid, and (Q, 4) as cx, cy, w, h, relative to the view.
        size: height and width of the original image.
        mirrored: whether the view is mirrored.
        size_range: limits of the square root of a box's area, in pixels of the original image.
        options: options of `postprocess`.
    """
    if mirrored:
        boxes = torch.cat([1 - boxes[:, :1], boxes[:, 1:]], dim=1)
    detected = postprocess(logits, boxes, size=size, **options)
    x1, y1, x2, y2 = detected.bboxes.unbind(1)
    area = (x2 - x1) * (y2 - y1)
    smallest, largest = size_range
    return detected[(area > smallest**2) & (area < largest**2)]


def merge_views(
    views: Sequence[InstanceData],
    *,
    max_per_class: int | None = None,
    class_ids: Sequence[int] | None = None,
    **options: Any,
) -> InstanceData:
    """Return the detections of all views after another soft-NMS on their decayed scores.

    Args:
        views: detections in pixels of the original image.
        max_per_class: largest number of detections of a class; COCO's metrics read the best 100.
        class_ids: as in `postprocess`.
        options: options of `soft_nms`.
    """
    together = InstanceData.cat(list(views))
    groups = together.labels if class_ids is None else together.labels.new_tensor(class_ids)[together.labels]
    index, scores = soft_nms(together.bboxes, together.scores, groups, **options)
    merged = InstanceData(bboxes=together.bboxes[index], scores=scores, labels=together.labels[index])
    return merged if max_per_class is None else merged[_rank_in_class(merged.labels) < max_per_class]


def _rank_in_class(labels: Tensor) -> Tensor:
    order = labels.argsort(stable=True)
    ordered = labels[order]
    ranks = torch.arange(len(labels), device=labels.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter_(0, order, ranks)


@MODELS.register_module()
class DETATTA(BaseTTAModel):
    """Detect in all views of an image and merge them. It makes the views itself: `tta_pipeline` is the test pipeline.

    Ranks share the images as in any test. As released, the number of merged detections per image is not limited.

    Args:
        module: the detector or its config; its mode 'tensor' gives logits (L, B, Q, C) and boxes (L, B, Q, 4).
        canvas: side in pixels of the square to which the detector's preprocessor pads.
        num_queries: proposals that reach the decoder, 2000 in the released evaluation; None for the detector's.
        long_sides: as in `make_views`; None for those of the canvas in `RECIPES`.
        size_ranges: as in `detect_in_view`, one for the image itself and one for each of `long_sides`; None as above.
        antialias: as in `make_views`.
        suppression: options of `soft_nms` across views.
        view_suppression: options of `postprocess` within each view; None for those across views, without a limit.
        class_ids: as in `postprocess`.
        max_per_class: as in `merge_views`.
        views_at_once: number of views in one forward pass; memory grows with it.
        resume_dir: folder for the detections of each image; a repeated test, on any number of ranks, reads them.
            ConfigError if they belong to another model, other options or other images.
    """

    def __init__(
        self,
        module: Any,
        *,
        canvas: int = 1824,
        num_queries: int | None = None,
        long_sides: Sequence[int] | None = None,
        size_ranges: Sequence[tuple[float, float]] | None = None,
        antialias: bool = True,
        suppression: Mapping[str, Any] | None = None,
        view_suppression: Mapping[str, Any] | None = None,
        class_ids: Sequence[int] | None = None,
        max_per_class: int | None = None,
        views_at_once: int = 1,
        resume_dir: str | None = None,
    ) -> None:
        super().__init__(module)
        if canvas not in RECIPES and (long_sides is None or size_ranges is None):
            raise ConfigError(
                f"canvas {canvas} has no released recipe (only {', '.join(map(str, RECIPES))} px have one); "
                "give long_sides and size_ranges"
            )
        self.long_sides = RECIPES[canvas]["long_sides"] if long_sides is None else long_sides
        self.size_ranges = RECIPES[canvas]["size_ranges"] if size_ranges is None else size_ranges
        if len(self.size_ranges) != 1 + len(self.long_sides) or max(self.long_sides, default=0) > canvas:
            raise ConfigError(
                f"size_ranges has {len(self.size_ranges)} entries and long_sides is {list(self.long_sides)}: give one "
                f"range for the image itself and one for each of long_sides, which must not exceed the canvas, {canvas}"
            )
        if num_queries is not None:
            self.module.num_queries = num_queries
        self.canvas = canvas
        self.antialias = antialias
        self.suppression = dict(suppression or {})
        uncut = {"method": "quad", **self.suppression, "max_per_img": None}
        self.view_suppression = uncut if view_suppression is None else dict(view_suppression)
        self.class_ids = class_ids
        self.max_per_class = max_per_class
        self.views_at_once = views_at_once
        self.resume_dir = None if resume_dir is None else Path(resume_dir)

    def test_step(self, data: Mapping[str, Any]) -> list[DetDataSample]:
        """Return the samples with the merged `pred_instances`, in pixels of the original images."""
        images, samples = data["inputs"], list(data["data_samples"])
        if isinstance(samples[0], list | tuple):
            raise ConfigError("DETATTA makes the views of an image itself: set tta_pipeline to the test pipeline")
        results = [self._load(sample) for sample in samples]
        missing = [i for i, instances in enumerate(results) if instances is None]
        if missing:
            batch = dict(inputs=[images[i] for i in missing], data_samples=[samples[i] for i in missing])
            batch = self.module.data_preprocessor(batch, False)
            for i, image, sample in zip(missing, batch["inputs"], batch["data_samples"], strict=True):
                results[i] = self.detect(image, sample)
                self._save(sample, results[i])
        for sample, instances in zip(samples, results, strict=True):
            sample.pred_instances = instances
        return samples

    def detect(self, image: Tensor, sample: DetDataSample) -> InstanceData:
        """Return the merged detections in one image (3, canvas, canvas), normalized and padded with zeros."""
        if image.shape[-2:] != (self.canvas, self.canvas):
            raise ConfigError(
                f"the preprocessor gives {tuple(image.shape[-2:])} pixels but the canvas has {self.canvas}: "
                "set pad_size_divisor of the preprocessor and canvas of DETATTA to the same number"
            )
        height, width = sample.img_shape[:2]
        views = make_views(image[:, :height, :width], long_sides=self.long_sides, antialias=self.antialias)
        detected = []
        for start in range(0, len(views), self.views_at_once):
            logits, boxes = self._outputs(views[start : start + self.views_at_once], sample)
            for i, (logit, box) in enumerate(zip(logits, boxes, strict=True), start):
                view: dict[str, Any] = dict(mirrored=i % 2 == 1, size_range=self.size_ranges[i // 2])
                view.update(size=sample.ori_shape[:2], class_ids=self.class_ids)
                detected.append(detect_in_view(logit, box, **view, **self.view_suppression))
        return merge_views(detected, max_per_class=self.max_per_class, class_ids=self.class_ids, **self.suppression)

    def merge_preds(self, data_samples_list: Any) -> Any:
        raise NotImplementedError("call test_step: it merges the detector's raw outputs")

    def _outputs(self, views: Sequence[Tensor], sample: DetDataSample) -> tuple[Tensor, Tensor]:
        """Return logits (V, Q, C) and boxes (V, Q, 4) of the last decoder layer."""
        batch = torch.stack([F.pad(v, (0, self.canvas - v.shape[2], 0, self.canvas - v.shape[1])) for v in views])
        canvas = (self.canvas, self.canvas)
        samples = [
            DetDataSample(metainfo={**sample.metainfo, "img_shape": tuple(v.shape[1:]), "batch_input_shape": canvas})
            for v in views
        ]
        logits, boxes = self.module(batch, samples, mode="tensor")
        return logits[-1], boxes[-1]

    def _load(self, sample: DetDataSample) -> InstanceData | None:
        """Return the detections that an earlier run saved for this image."""
        if self._results is None or not (path := self._results / f"{sample.img_id}.pt").is_file():
            return None
        kept = torch.load(path, map_location="cpu", weights_only=True)
        if kept.pop("image") != _image(sample):
            raise ConfigError(
                f"{path} belongs to another image, or to another size of this one; give resume_dir another folder"
            )
        return InstanceData(**kept)

    def _save(self, sample: DetDataSample, instances: InstanceData) -> None:
        if self._results is not None:
            values = {name: value.cpu() for name, value in instances.items()}
            with atomic_write(self._results / f"{sample.img_id}.pt") as unfinished:
                torch.save({**values, "image": _image(sample)}, unfinished)

    @cached_property
    def _results(self) -> Path | None:
        """Return resume_dir; ConfigError if it has results of other settings."""
        if self.resume_dir is None:
            return None
        settings = json.dumps(self._describe(), indent=1)
        path = self.resume_dir / "settings.json"
        if not path.is_file():
            write_file(path, settings)
        if path.read_text() != settings:
            raise ConfigError(
                f"{self.resume_dir} contains detections of another checkpoint or of other options (see its "
                f"{path.name}); give resume_dir another folder, or remove this one"
            )
        return self.resume_dir

    def _describe(self) -> dict[str, Any]:
        """Return what detections depend on: options, and a digest of some values of each weight."""
        digest = hashlib.sha256()
        for name, value in self.module.state_dict().items():
            sample = value.detach().flatten()[:: max(1, value.numel() // 16)]
            digest.update(f"{name} {tuple(value.shape)} {sample.double().tolist()}".encode())
        names = ("canvas", "long_sides", "size_ranges", "antialias", "suppression", "view_suppression", "class_ids")
        own = {name: getattr(self, name) for name in (*names, "max_per_class")}
        detector = {k: v for k, v in vars(self.module).items() if k[0] != "_" and isinstance(v, int | float | str)}
        return {**own, "detector": detector, "weights": digest.hexdigest()}


def _image(sample: DetDataSample) -> str:
    return f"{sample.img_id} {tuple(sample.ori_shape[:2])} {tuple(sample.img_shape[:2])}"
