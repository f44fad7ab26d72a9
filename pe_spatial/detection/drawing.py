"""Images of a detector's predictions beside the ground truth."""

from pathlib import Path

import numpy as np
import torch
from mmengine.registry import VISUALIZERS
from mmengine.runner import Runner
from PIL import Image

from pe_spatial.images import decode_rgb, read_bytes


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
        rgb = decode_rgb(read_bytes(result.img_path), result.img_path, size=result.ori_shape)
        visualizer.add_datasample("demo", rgb, result.cpu(), draw_gt=True, draw_pred=True, pred_score_thr=0.4)
        pairs.append(visualizer.get_image())
    rows = [np.concatenate(pairs[i : i + 2], axis=1) for i in range(0, count, 2)]
    Image.fromarray(np.concatenate(rows)).save(path)
