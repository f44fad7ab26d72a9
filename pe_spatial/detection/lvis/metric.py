"""Average precision of LVIS v1."""

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from mmdet.structures.mask import encode_mask_results
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS

from pe_spatial.atomic import write_file
from pe_spatial.detection.annotations import as_nfc
from pe_spatial.detection.coco_metric import check_samples, log_tested
from pe_spatial.detection.lvis.dataset import FREQUENCIES, read_lvis
from pe_spatial.errors import ConfigError


@METRICS.register_module()
class FastLVISMetric(BaseMetric):
    """Average precision of LVIS v1, computed by faster-coco-eval.

    A detection of a class that its image is not annotated for does not count, nor does one without match where not all
    objects of its class are annotated. MMDetection's LVISMetric needs the package lvis, whose release (0.5.3) does not
    run with NumPy 1.24 or later.

    Results are in [0, 1], NaN without objects: `{metric}_AP`, AP50, AP75, by area APs, APm, APl, and by the number of
    training images of the class APr, APc, APf.

    Args:
        ann_file: LVIS v1 json; DatasetError if it is another file.
        metric: 'bbox', 'segm' or both.
        max_dets: number of detections of an image that count, the best of all classes together.
        backend_args: options of mmengine's file backend.
        out_file: write the detections there too, as a results json.
        options: options of mmengine's `BaseMetric`.
    """

    default_prefix = "lvis"
    _CHUNK = 100  # classes at once, because faster-coco-eval's memory grows with images x classes

    def __init__(
        self,
        *,
        ann_file: str,
        metric: str | Sequence[str] = ("bbox", "segm"),
        max_dets: int = 300,
        backend_args: Mapping[str, Any] | None = None,
        out_file: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if not self.metrics or not set(self.metrics) <= {"bbox", "segm"}:
            raise ConfigError(f"metric is {metric!r}; give 'bbox', 'segm' or both")
        self.max_dets = max_dets
        self.ann_file, self.out_file = ann_file, out_file
        content, _ = read_lvis(ann_file, annotated=True, masks="segm" in self.metrics, backend_args=backend_args)
        self.categories = content["categories"]
        self.truth = COCO(content)
        self.annotated = {image["id"]: set(image["neg_category_ids"]) for image in content["images"]}
        for annotation in content["annotations"]:
            self.annotated.setdefault(annotation["image_id"], set()).add(annotation["category_id"])

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002
        """Keep the detections of a batch that count; DatasetError for an image that the annotations lack."""
        check_samples(data_samples, self.truth.imgs, self.dataset_meta["classes"], self.ann_file)
        ids = np.array([category["id"] for category in self._evaluated])
        for sample in data_samples:
            detections, image_id = sample["pred_instances"], sample["img_id"]
            best = detections["scores"].argsort(descending=True, stable=True)[: self.max_dets].cpu()
            categories = ids[detections["labels"].cpu()[best].numpy()]
            counts = np.isin(categories, list(self.annotated[image_id]))
            kept = best[torch.from_numpy(counts)].to(detections["scores"].device)
            boxes = detections["bboxes"][kept].cpu().double().numpy()
            boxes[:, 2:] -= boxes[:, :2]
            result = dict(image=image_id, categories=categories[counts].tolist(), bbox=boxes.tolist())
            result["scores"] = detections["scores"][kept].tolist()
            if "segm" in self.metrics:
                result["segm"] = encode_mask_results(detections["masks"][kept].cpu().numpy())
            self.results.append(result)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        out: dict[str, float] = {}
        tested = [r["image"] for r in results]
        log_tested(MMLogger.get_current_instance(), tested, self.truth.imgs, self.ann_file)
        if self.out_file:
            detections = [d for r in results for d in _as_json(r, *self.metrics)]
            write_file(self.out_file, json.dumps(detections, default=bytes.decode))  # counts of masks are bytes
        for metric in self.metrics:
            detections = [d for r in results for d in _as_json(r, metric)]
            out.update({f"{metric}_{k}": value for k, value in self._evaluate(metric, detections, tested).items()})
        return out

    @cached_property
    def _evaluated(self) -> list[dict[str, Any]]:
        """Return the categories of the labels, in their order."""
        classes = set(as_nfc(self.dataset_meta["classes"]))
        return [category for category in self.categories if category["name"] in classes]

    def _evaluate(self, metric: str, detections: list[dict[str, Any]], tested: list[int]) -> dict[str, float]:
        predicted = self.truth.loadRes(detections)
        categories = self._evaluated
        parts = []
        for start in range(0, len(categories), self._CHUNK):
            evaluation = COCOeval_faster(self.truth, predicted, metric, lvis_style=True)
            evaluation.params.catIds = [category["id"] for category in categories[start : start + self._CHUNK]]
            evaluation.params.imgIds = tested
            evaluation.params.maxDets = [self.max_dets]
            evaluation.evaluate()
            evaluation.accumulate()
            parts.append(evaluation.eval["precision"][..., 0])
        precision = np.concatenate(parts, 2)  # (thresholds 0.5, 0.55, ..., recalls, classes, areas), -1 without objects
        frequency = np.array([category["frequency"] for category in categories])
        everywhere = precision[..., 0]
        return {
            "AP": _mean(everywhere),
            "AP50": _mean(everywhere[0]),
            "AP75": _mean(everywhere[5]),
            **{f"AP{area}": _mean(precision[..., 1 + i]) for i, area in enumerate("sml")},
            **{f"AP{group}": _mean(everywhere[:, :, frequency == group]) for group in FREQUENCIES},
        }


def _as_json(result: dict[str, Any], *metrics: str) -> Iterator[dict[str, Any]]:
    """Yield the detections of an image; one without a box has the area of its mask."""
    keys = ["bbox" if metric == "bbox" else "segmentation" for metric in metrics]
    shapes = zip(*(result[metric] for metric in metrics), strict=True)
    for category, score, shape in zip(result["categories"], result["scores"], shapes, strict=True):
        yield dict(image_id=result["image"], category_id=category, score=score, **dict(zip(keys, shape, strict=True)))


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")
