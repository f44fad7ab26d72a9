"""COCO's average precision on the annotations that `CheckedCocoDataset` trains on."""

import shutil
from collections.abc import Mapping, Sequence
from typing import Any

from mmdet.datasets.api_wrappers import COCO
from mmdet.evaluation import CocoMetric
from mmengine.logging import MMLogger
from mmengine.registry import METRICS
from pycocotools import mask as rle

from pe_spatial.atomic import atomic_write
from pe_spatial.detection.annotations import as_nfc, read_coco
from pe_spatial.errors import ConfigError, DatasetError


@METRICS.register_module()
class CheckedCocoMetric(CocoMetric):
    """MMDetection's CocoMetric on annotations that are read and cleaned as `CheckedCocoDataset` reads them.

    It evaluates the images that were tested, all of the file or a part. Masks that cover no pixel are ignored, because
    no prediction can match them.

    Args:
        ann_file: COCO json.
        out_file: write the detections there too, as a COCO results json.
        options: options of mmdet's `CocoMetric`.
    """

    def __init__(self, *, ann_file: str, out_file: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.ann_file, self.out_file = ann_file, out_file
        content, _ = read_coco(
            ann_file, annotated=False, masks="segm" in self.metrics, backend_args=options.get("backend_args")
        )
        self._coco_api = COCO()
        self._coco_api.dataset = content
        self._coco_api.createIndex()
        if "segm" in self.metrics:
            for annotation in content["annotations"]:
                annotation["segmentation"] = self._coco_api.annToRLE(annotation)
                annotation["iscrowd"] |= int(rle.area(annotation["segmentation"]) == 0)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """Keep the detections of a batch; an error names the first that cannot be evaluated."""
        check_samples(data_samples, self._coco_api.imgs, self.dataset_meta["classes"], self.ann_file)
        super().process(data_batch, data_samples)

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Evaluate the tested images."""
        coco, logger = self._coco_api, MMLogger.get_current_instance()
        names = as_nfc(self.dataset_meta["classes"])
        self.cat_ids = coco.get_cat_ids(cat_names=names)
        self.img_ids = [truth["img_id"] for truth, _ in results]
        log_tested(logger, self.img_ids, coco.imgs, self.ann_file)
        if not any(coco.imgToAnns.get(i) for i in self.img_ids):
            logger.warning(f"{self.ann_file} has no annotated object in the tested images, so there is no AP (-1)")
        metrics = super().compute_metrics(results)
        absent = [name for name, value in metrics.items() if value == -1]
        if absent:
            logger.info(f"-1 in {', '.join(absent)}: the tested images have no objects of this size or class")
        return metrics

    def results2json(self, results: Sequence[dict[str, Any]], outfile_prefix: str) -> dict[str, str]:
        """Write the detections as mmdet does, and into `out_file`."""
        files = super().results2json(results, outfile_prefix)
        if self.out_file:
            with atomic_write(self.out_file) as unfinished:
                shutil.copyfile(files.get("segm", files["bbox"]), unfinished)
        return files


def check_samples(
    samples: Sequence[Mapping[str, Any]], images: Mapping[Any, Any], classes: Sequence[str], ann_file: str
) -> None:
    """Raise an error for an image that the evaluator's file lacks, or a label that the dataset has no class for."""
    for sample in samples:
        if sample["img_id"] not in images:
            raise DatasetError(
                f"image {sample['img_id']} is not in {ann_file}; give the evaluator the ann_file of the dataset"
            )
        labels = sample["pred_instances"]["labels"]
        if len(labels) and labels.max() >= len(classes):
            raise ConfigError(
                f"the model predicts label {labels.max()} but the dataset has {len(classes)} "
                f"class{'es' * (len(classes) > 1)}; set num_classes={len(classes)} in all heads"
            )


def log_tested(logger: MMLogger, tested: Sequence[Any], images: Mapping[Any, Any], ann_file: str) -> None:
    if len(tested) < len(images):
        logger.info(f"evaluates the {len(tested)} of the {len(images)} images of {ann_file} that were tested")
