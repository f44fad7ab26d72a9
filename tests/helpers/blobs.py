"""A detector whose answer is known: it finds the red and the blue rectangles of an image, with their masks."""

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmdet.models.detectors import BaseDetector
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.structures import InstanceData

CLASSES = ("red", "blue")


@MODELS.register_module()
class Blobs(BaseDetector):
    """The score is 1 for a rectangle of 400 pixels or more, and less for a smaller one."""

    def __init__(self) -> None:
        super().__init__(data_preprocessor=dict(type="mmdet.DetDataPreprocessor", pad_size_divisor=64))
        self.backbone = torch.nn.Linear(1, 1)
        self.sizes: list[tuple[int, ...]] = []  # of the batches that it got

    def predict(self, batch_inputs: torch.Tensor, batch_data_samples: Any, rescale: bool = True) -> Any:
        assert rescale
        self.sizes.append(tuple(batch_inputs.shape))
        results = []
        for image, sample in zip(batch_inputs, batch_data_samples, strict=True):
            size = sample.img_shape
            results.append(_detect(image[:, : size[0], : size[1]].numpy(), sample.ori_shape))
        return self.add_pred_to_datasample(batch_data_samples, results)

    def loss(self, *_: Any) -> Any:
        raise NotImplementedError

    def _forward(self, *_: Any) -> Any:
        raise NotImplementedError

    def extract_feat(self, *_: Any) -> Any:
        raise NotImplementedError


def _detect(bgr: np.ndarray, size: tuple[int, int]) -> InstanceData:
    boxes, labels, masks = [], [], []
    for label, channel in enumerate((2, 0)):
        number, parts = cv2.connectedComponents((bgr[channel] > 200).astype(np.uint8))
        for i in range(1, number):
            rows, columns = np.nonzero(parts == i)
            boxes.append((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1))
            labels.append(label)
            masks.append(parts == i)
    boxes_array = np.array(boxes, np.float32).reshape(-1, 4)
    areas = (boxes_array[:, 2:] - boxes_array[:, :2]).prod(1)
    scores = np.minimum(1, areas / 400)
    order = np.argsort(-scores, kind="stable")
    return InstanceData(
        bboxes=torch.from_numpy(boxes_array[order]),
        scores=torch.from_numpy(scores[order]),
        labels=torch.tensor(labels, dtype=torch.long)[order.tolist()],
        masks=torch.from_numpy(np.array(masks, bool).reshape(-1, *size)[order]),
    )


def write_blobs(folder: Path, classes: tuple[str, ...] = CLASSES) -> Path:
    """Write a checkpoint of the detector, as training does."""
    dataset = dict(
        type="CocoDataset", pipeline=[dict(type="mmdet.LoadImageFromFile"), dict(type="mmdet.PackDetInputs")]
    )
    cfg = Config(dict(model=dict(type="Blobs"), default_scope="mmdet", test_dataloader=dict(dataset=dataset)))
    meta = dict(cfg=cfg.pretty_text, dataset_meta=dict(classes=classes))
    torch.save(dict(state_dict=Blobs().state_dict(), meta=meta), folder / "blobs.pth")
    return folder / "blobs.pth"


def draw_blobs(size: tuple[int, int], boxes: Any) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB with a rectangle for each (x0, y0, x1, y1, label)."""
    rgb = np.full((*size, 3), 90, np.uint8)
    for x0, y0, x1, y1, label in boxes:
        rgb[y0:y1, x0:x1] = ((230, 20, 20), (20, 20, 230))[label]
    return rgb
