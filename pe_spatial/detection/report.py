"""What a training on own data achieved: a table, its worst validation images, and its detections as COCO results."""

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import Runner, ValLoop
from PIL import Image, ImageDraw
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval

from pe_spatial.atomic import atomic_write
from pe_spatial.detection.coco_metric import CheckedCocoMetric
from pe_spatial.engine.weights import load_weights, plain_model
from pe_spatial.images import decode_rgb, read_bytes

SCORE = 0.4
"""Detections below it are neither drawn nor counted as errors."""

IOU = 0.5
"""A detection matches an object of its class from this overlap on."""


@HOOKS.register_module()
class ReportDetectionsHook(Hook):
    """After training, evaluate the best checkpoint on the validation set and say what came out.

    It writes `results.json` (COCO's form) and `predictions.png`: the validation images with the most errors, ground
    truth at the left and detections at the right.

    Args:
        images: number of images in predictions.png.
    """

    priority = "LOWEST"

    def __init__(self, images: int = 6) -> None:
        self.images = images

    def before_train(self, _: Runner) -> None:
        """Start the clock."""
        self._start = time.time()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def after_train(self, runner: Runner) -> None:
        """Evaluate, write and report."""
        seconds, memory = time.time() - self._start, peak_memory()
        metrics = runner.val_loop.evaluator.metrics if runner.val_loop else []
        metric = next((one for one in metrics if isinstance(one, CheckedCocoMetric)), None)
        if metric is None:
            return
        checkpoint = load_best(runner)
        folder = Path(runner.work_dir)
        metric.out_file, metric.classwise = str(folder / "results.json"), False  # the table has classes
        hooks, runner._hooks = runner._hooks, []  # which would save, swap averaged weights, or stop
        try:
            ValLoop.run(runner.val_loop)  # of teacher and student, the one that predicts
        finally:
            runner._hooks = hooks
        if not is_main_process():
            return
        truth, results = metric._coco_api, json.loads(Path(metric.out_file).read_text())
        dataset = runner.val_dataloader.dataset
        lines = [*format_table(truth, results, metric.metrics, dataset.metainfo["classes"])]
        figure = folder / "predictions.png"
        ranked = rank_by_errors(truth, results)[: self.images]
        draw_images(figure, truth, results, [i for i, _ in ranked], dataset)
        lines += [
            "",
            f"time         {_clock(seconds)}, peak memory {memory / 1e9:.2f} GB",
            f"checkpoint   {checkpoint}",
            f"detections   {metric.out_file}",
            f"images       {figure}: the {len(ranked)} of {len(truth.imgs)} validation images with the most errors",
        ]
        text = "\n".join(f"  {line}" for line in lines)
        MMLogger.get_current_instance().info(f"Result on the validation set\n{text}")


def load_best(runner: Runner) -> str:
    """Load the best checkpoint of a run into its model, or keep the last weights; return which it is."""
    hook = next((hook for hook in runner.hooks if isinstance(hook, CheckpointHook)), None)
    best = getattr(hook, "best_ckpt_path", None)
    if best and Path(best).is_file():
        load_weights(plain_model(runner.model), best)
        return f"{best} (the best)"
    return f"{getattr(hook, 'last_ckpt', None) or runner.work_dir} (the last)"


def peak_memory() -> int:
    """Return the peak memory of the GPU, or of the process without one, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def format_table(
    truth: Any, results: Sequence[Mapping[str, Any]], kinds: Sequence[str], classes: Sequence[str]
) -> list[str]:
    """Return the lines of a table: AP, AP50 and AP by size of all classes, and of each class.

    Args:
        truth: ground truth as a pycocotools COCO.
        results: detections in COCO's form.
        kinds: 'bbox' and 'segm', those that were evaluated.
        classes: names of the classes.
    """
    width = max(map(len, ("all classes", *classes)))
    header = "".join(f"{name:>8}" for name in ("AP", "AP50", "small", "medium", "large"))
    lines = []
    for kind in (kind for kind in kinds if kind in ("bbox", "segm")):
        what = {"bbox": "boxes", "segm": "masks"}[kind]
        lines += [f"{what:<{width}}{header}{'objects':>9}"]
        for name, row, objects in _rows(truth, results, kind, classes):
            values = "".join(f"{value:8.3f}" if value >= 0 else f"{'-':>8}" for value in row)
            lines.append(f"{name:<{width}}{values}{objects:9d}")
    return lines


def _rows(truth: Any, results: Sequence[Mapping[str, Any]], kind: str, classes: Sequence[str]) -> list[Any]:
    ids = {category["name"]: category["id"] for category in truth.dataset["categories"]}
    objects = [a["category_id"] for a in truth.dataset["annotations"] if not a["iscrowd"]]
    names = [name for name in classes if name in ids]
    if not results:
        rows = [(name, [0.0] * 5, objects.count(ids[name])) for name in names]
        return [("all classes", [0.0] * 5, len(objects)), *rows]
    evaluation = evaluate_coco(truth, results, kind, [ids[name] for name in names])
    precision = evaluation.eval["precision"][..., -1]  # IoU, recall, class, area

    def row(columns: Any) -> list[float]:
        of_all = precision[:, :, columns, 0]
        sizes = (mean_precision(precision[:, :, columns, area]) for area in (1, 2, 3))
        return [mean_precision(of_all), mean_precision(of_all[:1]), *sizes]

    rows = [("all classes", row(slice(None)), len(objects))]
    return rows + [(name, row(slice(i, i + 1)), objects.count(ids[name])) for i, name in enumerate(names)]


def evaluate_coco(truth: Any, results: Sequence[Mapping[str, Any]], kind: str, ids: Sequence[int]) -> COCOeval:
    """Return COCO's evaluation, accumulated, of 'bbox' or 'segm' on all images, for the categories `ids`."""
    other = "bbox" if kind == "segm" else "segmentation"  # the size of a detection is that of what is evaluated
    detected = truth.loadRes([{key: value for key, value in one.items() if key != other} for one in results])
    evaluation = COCOeval(truth, detected, kind)
    evaluation.params.catIds = list(ids)
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation


def mean_precision(values: np.ndarray) -> float:
    """Return the mean of precisions without those of classes that have no objects (-1); -1 if there are no others."""
    values = values[values > -1]
    return float(values.mean()) if values.size else -1.0


def rank_by_errors(truth: Any, results: Sequence[Mapping[str, Any]]) -> list[tuple[Any, int]]:
    """Return (image id, errors), most errors first: missed objects, and detections that match no object."""
    by_image: dict[Any, list[Mapping[str, Any]]] = {}
    for one in results:
        if one["score"] >= SCORE:
            by_image.setdefault(one["image_id"], []).append(one)
    counts = []
    for image in truth.imgs:
        objects = truth.imgToAnns.get(image, [])
        counts.append((image, _errors(objects, sorted(by_image.get(image, []), key=lambda one: -one["score"]))))
    return sorted(counts, key=lambda pair: -pair[1])


def _errors(objects: Sequence[Mapping[str, Any]], detections: Sequence[Mapping[str, Any]]) -> int:
    crowds = [int(one["iscrowd"]) for one in objects]
    wanted = len(objects) - sum(crowds)
    if not objects or not detections:
        return wanted + len(detections)
    ious = rle.iou([one["bbox"] for one in detections], [one["bbox"] for one in objects], crowds)
    free, wrong = set(range(len(objects))), 0
    for i, one in enumerate(detections):
        fits = [j for j in free if ious[i][j] >= IOU and objects[j]["category_id"] == one["category_id"]]
        if not fits:
            wrong += not any(ious[i][j] >= IOU for j in range(len(objects)) if crowds[j])
            continue
        best = max(fits, key=lambda j: ious[i][j])
        free -= set() if crowds[best] else {best}
    return wrong + sum(not crowds[j] for j in free)


def draw_images(path: Path, truth: Any, results: Sequence[Mapping[str, Any]], ids: Sequence[Any], dataset: Any) -> None:
    """Draw images as rows: ground truth at the left, detections at the right."""
    side, folder = 640, dataset.data_prefix["img"]
    colors = dict(zip(dataset.cat_ids, dataset.metainfo["palette"], strict=False))
    rows = [(truth.imgs[i], draw_pair(folder, truth, results, i, colors, side=side)) for i in ids]
    sheet = Image.new("RGB", (2 * side + 24, sum(max(p.height for p in pair) + 24 for _, pair in rows) + 8), "white")
    y = 8
    for record, pair in rows:
        title = f"{record['file_name']}: annotated (left), detected with a score from {SCORE} (right)"
        ImageDraw.Draw(sheet).text((8, y), title, "black")
        for i, panel in enumerate(pair):
            sheet.paste(panel, (8 + i * (side + 8), y + 14))
        y += max(panel.height for panel in pair) + 24
    with atomic_write(path) as unfinished:
        sheet.save(unfinished, format="PNG")


def draw_pair(
    folder: str, truth: Any, results: Sequence[Mapping[str, Any]], image: Any, colors: Mapping[int, Any], *, side: int
) -> list[Image.Image]:
    """Return an image with its annotated objects, and with its detections from `SCORE` on, at most `side` pixels.

    Args:
        folder: of the images.
        truth: ground truth as a pycocotools COCO.
        results: detections in COCO's form.
        image: its id.
        colors: (R, G, B), 0 to 255, of the categories.
        side: longer side of the drawn images.
    """
    record = truth.imgs[image]
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    file = Path(folder, record["file_name"])
    pixels = decode_rgb(read_bytes(file), str(file), size=(record["height"], record["width"]))
    detections = [one for one in results if one["image_id"] == image and one["score"] >= SCORE]
    return [_drawn(pixels, part, colors, names, side) for part in (truth.imgToAnns.get(image, []), detections)]


def _drawn(pixels: np.ndarray, objects: Sequence[Mapping[str, Any]], colors: Any, names: Any, side: int) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((side, side))
    scale = image.width / pixels.shape[1]
    draw = ImageDraw.Draw(image)
    for one in objects:
        x, y, w, h = (value * scale for value in one["bbox"])
        color = tuple(colors.get(one["category_id"], (255, 255, 255)))
        draw.rectangle((x, y, x + w, y + h), outline=color, width=2)
        score = f" {one['score']:.2f}" if "score" in one else ""
        text = f"{names.get(one['category_id'], '?')}{score}"
        box = draw.textbbox((x + 2, max(y - 12, 0)), text)
        draw.rectangle(box, fill=color)
        draw.text(box[:2], text, "black" if sum(color) > 380 else "white")
    return image


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
