"""Images of a detector's predictions beside the ground truth."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import get_box_tensor
from mmengine import fileio
from mmengine.registry import HOOKS, VISUALIZERS
from mmengine.runner import Runner
from PIL import Image

from pe_spatial.images import decode_rgb

_FORMATS = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"}


@HOOKS.register_module()
class DrawDetectionsHook(DetVisualizationHook):
    """MMDetection's hook that draws predictions, made right for images that are turned, resized, or in several folders.

    It draws on the image as the model saw it, scales the ground truth to it where the pipeline resizes that, and keeps
    the folders of the dataset below `test_out_dir`.
    """

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any, outputs: Sequence[DetDataSample]  # noqa: ARG002
    ) -> None:
        if not self.draw:
            return
        dataset = runner.test_dataloader.dataset
        folder = getattr(dataset, "data_prefix", {}).get("img", "")
        for sample in outputs:
            self._test_index += 1
            if _resizes_truth(dataset):
                _scale_truth(sample)
            out_file = self.test_out_dir and self._out_file(sample.img_path, folder)
            self._visualizer.add_datasample(
                os.path.basename(sample.img_path) if self.show else "test_img",
                read_as_tested(sample, self.backend_args),
                data_sample=sample,
                show=self.show,
                wait_time=self.wait_time,
                pred_score_thr=self.score_thr,
                out_file=out_file or None,
                step=self._test_index,
            )

    def _out_file(self, path: str, folder: str) -> str:
        name = os.path.relpath(path, folder or os.curdir)
        if name.startswith(os.pardir):  # not below the folder of the images
            name = os.path.splitdrive(os.path.abspath(path))[1].lstrip(os.sep)
        if os.path.splitext(name)[1].lower() not in _FORMATS:
            name += ".png"
        return os.path.join(self.test_out_dir, name)


def read_as_tested(sample: DetDataSample, backend_args: Any = None) -> np.ndarray:
    """Return the image of a sample as (H, W, 3) uint8 RGB, turned as it was when the model saw it."""
    data = fileio.get(sample.img_path, backend_args=backend_args)
    return decode_rgb(data, sample.img_path, size=tuple(sample.ori_shape))


def _resizes_truth(dataset: Any) -> bool:
    """Return whether the pipeline loads annotations before it resizes: then they are in pixels of the resized image."""
    pipeline = getattr(dataset, "pipeline", None)  # a wrapper has none
    names = [type(step).__name__ for step in getattr(pipeline, "transforms", ())]
    loads = [i for i, name in enumerate(names) if name == "LoadAnnotations"]
    return bool(loads) and any("Resize" in name for name in names[loads[0] :])


def _scale_truth(sample: DetDataSample) -> None:
    """Bring ground truth from the pixels of the resized image to those of the original."""
    width, height = sample.scale_factor
    for instances in (sample.gt_instances, sample.ignored_instances):
        if "bboxes" in instances:
            boxes = get_box_tensor(instances.bboxes)
            instances.bboxes = boxes / boxes.new_tensor([width, height] * 2)
        if "masks" in instances:
            instances.masks = instances.masks.resize(sample.ori_shape)


def draw_sheet(runner: Runner, path: Path, count: int) -> None:
    """Draw ground truth beside predictions for `count` validation images, two images in a row, into one file."""
    dataset = runner.val_dataloader.dataset
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="demo"))
    visualizer.dataset_meta = dataset.metainfo
    runner.model.eval()
    pairs = []
    for i in np.linspace(0, len(dataset) - 1, count).astype(int):
        item = dataset[i]
        with torch.no_grad():
            (result,) = runner.model.test_step(dict(inputs=[item["inputs"]], data_samples=[item["data_samples"]]))
        rgb = read_as_tested(item["data_samples"])
        visualizer.add_datasample("demo", rgb, result.cpu(), draw_gt=True, draw_pred=True, pred_score_thr=0.4)
        pairs.append(visualizer.get_image())
    rows = [np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, count, 2)]
    Image.fromarray(np.concatenate(rows)).save(path)
