"""LVIS v1: checked input, the federated loss and what it needs, repeated sampling, and the metric.

LVIS annotates each image for some classes only: those that have objects there, and those it lists as absent
(`neg_category_ids`). The metric leaves the others out; the loss trains a few classes at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval import COCO, COCOeval_faster
from mmdet.datasets import LVISV1Dataset
from mmdet.models.losses import accuracy
from mmdet.structures.mask import encode_mask_results
from mmengine.dataset import InfiniteSampler
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from pe_spatial.detection.coco import COCO_FIELDS, CheckedCocoDataset, is_size, read_coco
from pe_spatial.errors import ConfigError, DatasetError

FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: in 1 to 10, 11 to 100, more training images
# As the files spell them; mmdet corrects one.
CLASSES = tuple(name.replace("stereo_equipment", "stero_equipment") for name in LVISV1Dataset.METAINFO["classes"])
LVIS_FIELDS = {
    "images": {
        "id": lambda value: isinstance(value, int),
        "coco_url": lambda value: isinstance(value, str) and value.count("/") > 0,
        "height": is_size,
        "width": is_size,
        "neg_category_ids": lambda value: isinstance(value, list),
        "not_exhaustive_category_ids": lambda value: isinstance(value, list),
    },
    "categories": {**COCO_FIELDS["categories"], "frequency": FREQUENCIES.__contains__},
    "annotations": {
        **COCO_FIELDS["annotations"],
        "image_id": lambda value: isinstance(value, int),
        "area": lambda value: isinstance(value, int | float),
        "segmentation": lambda value: isinstance(value, list),
    },
}


def read_lvis(path: str, *, annotated: bool, backend_args: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read an LVIS v1 json and bring it into COCO's form.

    Images get the `file_name` that their address ends with ('train2017/000000000030.jpg'): those of LVIS's val are in
    both folders. Categories are ordered by id, as Detectron2 numbers them. Args and errors as in `read_coco`.
    """
    content = read_coco(path, annotated=annotated, backend_args=backend_args, fields=LVIS_FIELDS)
    for image in content["images"]:
        image["file_name"] = "/".join(image["coco_url"].split("/")[-2:])
    content["categories"].sort(key=lambda category: category["id"])
    return content


@DATASETS.register_module()
class CheckedLVISDataset(CheckedCocoDataset):
    """LVIS v1 instances, checked as COCO's are; args as there.

    `metainfo['image_count']` is the number of images of each class, in the order of the labels, if the file says it.
    """

    METAINFO: ClassVar[dict[str, Any]] = {**LVISV1Dataset.METAINFO, "classes": CLASSES}

    def read_annotations(self) -> dict[str, Any]:
        """Read the annotation file, and keep its counts of images."""
        content = read_lvis(self.ann_file, annotated=not self.test_mode, backend_args=self.backend_args)
        classes = set(self.metainfo["classes"])
        counts = tuple(c.get("image_count") for c in content["categories"] if c["name"] in classes)
        if all(isinstance(count, int) for count in counts):
            self._metainfo["image_count"] = counts
        return content


@MODELS.register_module()
class FederatedLoss(nn.Module):
    """Sigmoid cross-entropy over a few classes at each step: those present, and others drawn at random.

    For `loss_cls` of a box head, which gets C + 1 outputs; the last, the background's, is not trained. The loss is
    summed over RoIs and classes and divided by the number of RoIs (detectron2@02b5c4e:detectron2/modeling/roi_heads/
    fast_rcnn.py).

    A class is drawn with a probability proportional to its entry of the buffer `class_weights` (C,), which starts as
    zeros: `SetClassWeights` fills it before training, and checkpoints hold it.

    Args:
        num_classes: C.
        num_sample_classes: how many classes a step trains at least; the background counts as one if it is present.
        loss_weight: factor of the loss.
    """

    class_weights: Tensor
    custom_cls_channels = True  # mmdet's box heads ask for these
    custom_activation = True
    custom_accuracy = True

    def __init__(self, *, num_classes: int, num_sample_classes: int = 50, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_sample_classes = num_sample_classes
        self.loss_weight = loss_weight
        self.register_buffer("class_weights", torch.zeros(num_classes))

    def get_cls_channels(self, num_classes: int) -> int:
        """Return the number of outputs of a box head; ConfigError if it has other classes."""
        if num_classes != self.num_classes:
            raise ConfigError(
                f"the box head has num_classes={num_classes}, its FederatedLoss num_classes={self.num_classes}; set "
                "both to the number of classes"
            )
        return num_classes + 1

    def get_activation(self, cls_score: Tensor) -> Tensor:
        """Logits (N, C + 1) -> scores (N, C + 1) in [0, 1]; the last column means nothing."""
        return cls_score.sigmoid()

    def get_accuracy(self, cls_score: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Logits (N, C + 1) and labels (N,) -> the percentage of objects whose class scores highest."""
        objects = labels < self.num_classes
        return {"acc_classes": accuracy(cls_score[objects, :-1], labels[objects])}

    def draw(self, labels: Tensor) -> Tensor:
        """Labels (N,) in [0, C], C = background -> the classes to train, in [0, C], each once, those present first."""
        present = labels.unique()
        weights = F.pad(self.class_weights, (0, 1)).index_fill(0, present, 0)
        others = min(self.num_sample_classes - len(present), int(weights.count_nonzero()))
        return present if others <= 0 else torch.cat((present, weights.multinomial(others)))

    def forward(
        self,
        cls_score: Tensor,
        labels: Tensor,
        label_weights: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
    ) -> Tensor:
        """Logits (N, C + 1), labels (N,) and their weights (N,) -> the loss, in float32.

        `avg_factor` is the divisor, N if None. Raises ConfigError while the class weights are zero.
        """
        if reduction_override is not None:
            raise ConfigError(f"FederatedLoss is a mean over RoIs; it has no reduction_override={reduction_override!r}")
        if not self.class_weights.any():
            raise ConfigError(
                "the class weights of FederatedLoss are zero, so there is nothing to draw by; add "
                "dict(type='SetClassWeights') to custom_hooks, or load a checkpoint that holds them"
            )
        trained = self.class_weights.new_zeros(self.num_classes + 1).index_fill(0, self.draw(labels), 1)
        targets = F.one_hot(labels, self.num_classes + 1).float()
        losses = F.binary_cross_entropy_with_logits(cls_score.float(), targets, trained.float(), reduction="none")
        losses = losses[:, :-1].sum(1)
        if label_weights is not None:
            losses = losses * label_weights
        return self.loss_weight * losses.sum() / (len(labels) if avg_factor is None else avg_factor)


@HOOKS.register_module()
class SetClassWeights(Hook):
    """Fill the class weights of every `FederatedLoss` with the training set's counts of images, to a power.

    Args:
        power: 0.5 as released (detectron2@02b5c4e:detectron2/data/detection_utils.py).
    """

    def __init__(self, *, power: float = 0.5) -> None:
        self.power = power

    def before_train(self, runner: Runner) -> None:
        """Set the weights; ConfigError or DatasetError where there is nothing to set, or nothing to set it from."""
        losses = [module for module in runner.model.modules() if isinstance(module, FederatedLoss)]
        if not losses:
            raise ConfigError("SetClassWeights found no FederatedLoss in the model; remove it from custom_hooks")
        metainfo = runner.train_dataloader.dataset.metainfo
        counts = metainfo.get("image_count") if isinstance(metainfo, Mapping) else None
        if counts is None:
            raise DatasetError(
                "the training set does not say image_count, the number of images of each class, as FederatedLoss "
                "needs; use CheckedLVISDataset with a file whose categories have image_count (lvis_v1_train.json)"
            )
        for loss in losses:
            if len(counts) != loss.num_classes:
                raise ConfigError(
                    f"the training set has {len(counts)} classes, FederatedLoss num_classes={loss.num_classes}; set "
                    "num_classes of the loss and the heads to the former"
                )
            loss.class_weights.copy_(torch.tensor(counts, dtype=torch.float32) ** self.power)


def repeat_factors(labels: Sequence[Sequence[int]], repeat_thr: float) -> Tensor:
    """Return how often to show each image, (images,) >= 1, from the labels of its objects.

    For a class in a share f of the images it is max(1, sqrt(repeat_thr / f)), for an image the largest of its
    classes (detectron2@02b5c4e:detectron2/data/samplers/distributed_sampler.py).
    """
    classes = [np.unique(np.asarray(of_image, dtype=np.int64)) for of_image in labels]
    images = np.repeat(np.arange(len(classes)), [len(of_image) for of_image in classes])
    flat = np.concatenate(classes)
    share = np.bincount(flat)[flat] / len(classes)
    factors = np.ones(len(classes))
    np.maximum.at(factors, images, np.sqrt(repeat_thr / share))
    return torch.from_numpy(factors).float()


@DATA_SAMPLERS.register_module()
class RepeatFactorSampler(InfiniteSampler):
    """Infinite, shuffled sampler that shows images of rare classes more often.

    Fractions of the repeat factors are rounded at random, anew in every epoch, so that they hold on average (mmengine's
    ClassBalancedDataset rounds them up).

    Args:
        dataset: any whose `get_data_info` gives instances with a bbox_label, after its filter; wrappers too.
        repeat_thr: the share of images in (0, 1] below which the images of a class are repeated.
        seed: of the shuffle, the same in all processes; None agrees on one.
    """

    def __init__(self, dataset: Any, *, repeat_thr: float = 0.001, seed: int | None = None) -> None:
        if not 0 < repeat_thr <= 1:
            raise ConfigError(f"repeat_thr is {repeat_thr}; give a share of the images in (0, 1], 0.001 as released")
        super().__init__(dataset, shuffle=True, seed=seed)
        infos = map(dataset.get_data_info, range(len(dataset)))
        self.factors = repeat_factors([[i["bbox_label"] for i in info["instances"]] for info in infos], repeat_thr)

    def _infinite_indices(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed)
        fractions = self.factors.frac()
        while True:
            up = torch.rand(self.size, generator=generator) < fractions
            indices = torch.arange(self.size).repeat_interleave(self.factors.long() + up)
            yield from indices[torch.randperm(len(indices), generator=generator)].tolist()


@METRICS.register_module()
class FastLVISMetric(BaseMetric):
    """Average precision of LVIS v1, computed by faster-coco-eval.

    A detection of a class that its image is not annotated for does not count, nor does one that matches nothing where
    not all objects of its class are annotated. MMDetection's LVISMetric would need the package lvis, whose release
    (0.5.3) does not run with NumPy 1.24 or later.

    Results are in [0, 1], NaN where there is no object: `{metric}_AP`, AP50, AP75, by area APs, APm, APl, and by the
    number of training images of the class APr, APc, APf.

    Args:
        ann_file: LVIS v1 json; DatasetError if it is none.
        metric: 'bbox', 'segm' or both.
        max_dets: how many detections of an image count, the best of all classes together.
        backend_args: of mmengine's file backend.
        options: those of mmengine's `BaseMetric`.
    """

    default_prefix = "lvis"
    _AT_ONCE = 100  # classes; faster-coco-eval's memory grows with images x classes

    def __init__(
        self,
        *,
        ann_file: str,
        metric: str | Sequence[str] = ("bbox", "segm"),
        max_dets: int = 300,
        backend_args: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.metrics = [metric] if isinstance(metric, str) else list(metric)
        if not self.metrics or not set(self.metrics) <= {"bbox", "segm"}:
            raise ConfigError(f"metric is {metric!r}; give 'bbox', 'segm' or both")
        self.max_dets = max_dets
        self.ann_file = ann_file
        content = read_lvis(ann_file, annotated=True, backend_args=backend_args)
        self.categories = content["categories"]
        self.truth = COCO(content)
        self.annotated = {image["id"]: set(image["neg_category_ids"]) for image in content["images"]}
        for annotation in content["annotations"]:
            self.annotated.setdefault(annotation["image_id"], set()).add(annotation["category_id"])

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002
        """Keep the detections of a batch that count; DatasetError for an image that the annotations lack."""
        ids = np.array([category["id"] for category in self._evaluated])
        for sample in data_samples:
            detections, image_id = sample["pred_instances"], sample["img_id"]
            if image_id not in self.annotated:
                raise DatasetError(
                    f"image {image_id} is not in {self.ann_file}; give the metric the annotation file of the dataset"
                )
            best = detections["scores"].argsort(descending=True, stable=True)[: self.max_dets].cpu()
            categories = ids[detections["labels"].cpu()[best].numpy()]
            counts = np.isin(categories, list(self.annotated[image_id]))
            kept = best[torch.from_numpy(counts)].to(detections["scores"].device)
            boxes = detections["bboxes"][kept].cpu().double().numpy()
            boxes[:, 2:] -= boxes[:, :2]
            result = {
                "image": image_id,
                "categories": categories[counts].tolist(),
                "scores": detections["scores"][kept].tolist(),
                "bbox": boxes.tolist(),
            }
            if "segm" in self.metrics:
                result["segm"] = encode_mask_results(detections["masks"][kept].cpu().numpy())
            self.results.append(result)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Return the results of all metrics, from the detections of all images."""
        out = {}
        for metric in self.metrics:
            # Without a box, the area of a mask is its own.
            key = "bbox" if metric == "bbox" else "segmentation"
            detections = [
                {"image_id": r["image"], "category_id": category, "score": score, key: shape}
                for r in results
                for category, score, shape in zip(r["categories"], r["scores"], r[metric], strict=True)
            ]
            out.update({f"{metric}_{name}": value for name, value in self._evaluate(metric, detections).items()})
        return out

    @cached_property
    def _evaluated(self) -> list[dict[str, Any]]:
        """The categories of the labels, in their order."""
        classes = set(self.dataset_meta["classes"])
        return [category for category in self.categories if category["name"] in classes]

    def _evaluate(self, metric: str, detections: list[dict[str, Any]]) -> dict[str, float]:
        found = self.truth.loadRes(detections)
        categories = self._evaluated
        parts = []
        for start in range(0, len(categories), self._AT_ONCE):
            evaluation = COCOeval_faster(self.truth, found, metric, lvis_style=True)
            evaluation.params.catIds = [category["id"] for category in categories[start : start + self._AT_ONCE]]
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


def _mean(precision: np.ndarray) -> float:
    valid = precision[precision > -1]
    return float(valid.mean()) if valid.size else float("nan")
