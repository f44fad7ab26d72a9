"""Depth metrics as the literature on NYUv2 and KITTI computes them: per image, then averaged over the images.

Depth is in meters, maps are (H, W). The functions are pure; `CheckedDepthMetric` is their metric in OpenMMLab's runner,
named differently from MMSegmentation's DepthMetric, which a config in that scope would get instead.
"""

import csv
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from torch import Tensor

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import ConfigError, DatasetError, one_of

from .heads import check_depth_range, resize
from .transforms import bottom_center_box

NAMES = ("abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog", "d1", "d2", "d3", "mae")
CROPS = ("none", "eigen", "garg", "kitti_eigen")
_NO_FLOAT64 = ("mps",)  # devices without float64, in which sums are taken: their maps go to the CPU
ALIGNMENTS = ("none", "median", "depth", "disparity", "log")


def depth_metrics(pred: Tensor, target: Tensor, *, silog: str = "bts") -> dict[str, float]:
    """Return the metrics in `NAMES` of one image; all NaN if it has no pixels.

    With e = ln(pred) - ln(target): abs_rel mean |pred - target| / target, sq_rel mean (pred - target)^2 / target,
    rmse and mae in meters, rmse_log sqrt(mean e^2), log10 mean |log10(pred) - log10(target)|, d1, d2, d3 the share of
    max(pred / target, target / pred) < 1.25, 1.25^2, 1.25^3.

    Args:
        pred, target: valid pixels, of equal shape. They are not clamped: predictions <= 0 give infinity or NaN.
        silog: 'bts' for 100 sqrt(mean e^2 - (mean e)^2), as in BTS, DINOv2, DINOv3 and nearly all tables; 'mmseg' for
            sqrt(mean e^2 - 0.5 (mean e)^2), as in MMSegmentation, GLPDepth and VPD.
    """
    if not pred.numel():
        return dict.fromkeys(NAMES, math.nan)

    def mean(x: Tensor) -> float:
        return x.sum(dtype=torch.float64).item() / x.numel()

    pred, target = pred.float(), target.float()
    error = (pred - target).abs()
    e = pred.log() - target.log()
    ratio = torch.maximum(pred / target, target / pred)
    relative = error / target
    e_square, e_mean = mean(e.square()), mean(e)
    return {
        "abs_rel": mean(relative),
        "sq_rel": mean(relative * error),
        "rmse": _sqrt(mean(error.square())),
        "rmse_log": _sqrt(e_square),
        "log10": mean(e.abs()) / math.log(10),
        "silog": 100 * _sqrt(e_square - e_mean**2) if silog == "bts" else _sqrt(e_square - 0.5 * e_mean**2),
        **{f"d{k}": ratio.lt(1.25**k).count_nonzero().item() / ratio.numel() for k in (1, 2, 3)},
        "mae": mean(error),
    }


def _sqrt(x: float) -> float:
    return math.sqrt(x) if x > 0 else x * 0  # rounding may give -1e-17; NaN stays NaN


def evaluation_crop(name: str, height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, bottom, left, right), bottom and right exclusive, of the evaluated region.

    'eigen' is NYUv2's, rows 45 to 471 and columns 41 to 601 of 480 x 640, scaled to other sizes as in
    dinov3@6876159:dinov3/eval/depth/datasets; 'garg' and 'kitti_eigen' are KITTI's, fractions of the size
    (cleinc/bts@5e3406b:pytorch/bts_eval.py).
    """
    if name == "none":
        return 0, height, 0, width
    if name == "eigen":
        return int(45 / 480 * height), int(471 / 480 * height), int(41 / 640 * width), int(601 / 640 * width)
    garg = one_of("crop", name, CROPS) == "garg"
    top, bottom, left = (0.40810811, 0.99189189, 0.03594771) if garg else (0.3324324, 0.91351351, 0.0359477)
    return int(top * height), int(bottom * height), int(left * width), int(0.96405229 * width)


def paste_prediction(pred: Tensor, height: int, width: int) -> Tensor:
    """Paste a prediction (h, w) at the bottom center of zeros (height, width), where BTS crops the input of KITTI.

    Without an evaluation crop the zeros count as errors, as in BTS.
    """
    left, top, right, _ = bottom_center_box(height, width, size=pred.shape)
    if left < 0 or top < 0:
        raise DatasetError(
            f"a prediction of {pred.shape[0]}x{pred.shape[1]} does not fit into a depth map of {height}x{width}; "
            "set pasted=True with DepthCrop(bottom_center=..., image_only=True) only"
        )
    return F.pad(pred, (left, width - right, top, 0))


def align_prediction(pred: Tensor, target: Tensor, valid: Tensor, mode: str) -> tuple[Tensor, float, float]:
    """Align a relative prediction (H, W) with the truth in meters; return it with its scale and shift.

    Least squares over the valid pixels where the prediction is finite. A negative scale means that the prediction is
    inverted: disparity instead of depth, or the reverse.

    Args:
        mode: 'median': scale by median(target) / median(pred), as for networks trained on video. 'depth': fit scale and
            shift of the depth (Marigold, DINOv3). 'disparity': fit scale and shift to 1 / target, and clamp the result
            at 0.001, which is 1 km (MiDaS, Depth Anything). 'log': scale by the factor that is best for logarithms.
            'none': no change.
    """
    if one_of("align", mode, ALIGNMENTS) == "none":
        return pred, 1.0, 0.0
    use = valid & pred.isfinite()
    if mode in ("median", "log"):
        use &= pred > 0
    p, t = pred[use].double(), target[use].double()
    if not len(p):
        return pred, math.nan, math.nan
    if mode == "median":
        scale, shift = float(np.median(t.cpu().numpy()) / np.median(p.cpu().numpy())), 0.0
    elif mode == "log":
        scale, shift = (t.log() - p.log()).mean().exp().item(), 0.0
    else:
        t = t if mode == "depth" else 1 / t
        centered = p - p.mean()
        spread = centered.square().mean()
        scale = ((centered * t).mean() / spread).item() if spread > 0 else 0.0  # 0 for a flat prediction
        shift = (t.mean() - scale * p.mean()).item()
    aligned = pred * scale + shift
    return (1 / aligned.clamp(min=1e-3) if mode == "disparity" else aligned), scale, shift


def boundary_f1(pred: Tensor, target: Tensor, valid: Tensor) -> float:
    """Return how well the occlusion boundaries of (H, W) maps agree, from 0 to 1, independent of scale.

    There is a boundary between two neighbors if one is more than t times as deep as the other, for each of the four
    directions. Precision and recall are means over the directions; their F1 is averaged over 10 thresholds t from 1.05
    to 1.25, weighted by t (Depth Pro, arXiv 2410.02073, section 4;
    apple/ml-depth-pro@3b5cd1e:src/depth_pro/eval/boundary_metrics.py). Pairs with a pixel outside `valid` are ignored,
    an addition: the original has no missing depth.
    """
    thresholds = torch.linspace(1.05, 1.25, 10, dtype=torch.float64)
    hits, predicted, true = (torch.zeros(10, 4, dtype=torch.float64) for _ in range(3))
    for axis in (0, 1):
        n = pred.shape[axis] - 1
        both = valid.narrow(axis, 0, n) & valid.narrow(axis, 1, n)
        ratios = [(m.narrow(axis, 1, n) / m.narrow(axis, 0, n))[both] for m in (pred, target)]
        for direction in (0, 1):
            p, t = (ratio if direction == 0 else 1 / ratio for ratio in ratios)
            # the number of thresholds that each pair exceeds, so that one pass serves all of them
            p, t = (torch.bucketize(ratio.double(), thresholds.to(ratio.device)) for ratio in (p, t))
            for table, exceeded in ((hits, torch.minimum(p, t)), (predicted, p), (true, t)):
                counts = torch.bincount(exceeded.cpu(), minlength=11)
                table[:, 2 * axis + direction] = counts.flip(0).cumsum(0).flip(0)[1:]
    recall = (hits / true.clamp(min=1)).mean(1)
    precision = (hits / predicted.clamp(min=1)).mean(1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return ((f1 * thresholds).sum() / thresholds.sum()).item()


def range_metrics(pred: Tensor, target: Tensor, limits: Sequence[float]) -> list[float]:
    """Return pixels, abs_rel, rmse and d1 of valid pixels (N,) for each range of true depth; NaN without pixels.

    `limits` rise and are in meters: (2, 5) gives the ranges below 2, from 2 to below 5, and from 5.
    """
    error = (pred - target).abs()
    near = torch.maximum(pred / target, target / pred) < 1.25
    values = torch.stack([torch.ones_like(target), error / target, error.square(), near.to(target.dtype)])
    edges = (-math.inf, *limits, math.inf)
    inside = torch.stack([(low <= target) & (target < high) for low, high in itertools.pairwise(edges)])
    count, *sums = (inside.to(target.dtype) @ values.T).double().unbind(1)  # (ranges,) each
    abs_rel, square, d1 = (x / count for x in sums)  # 0 / 0 is NaN
    return torch.stack([count, abs_rel, square.sqrt(), d1], dim=1).flatten().tolist()


@METRICS.register_module()
class CheckedDepthMetric(BaseMetric):
    """The metrics of `depth_metrics`, averaged over the images.

    The prediction is resized to the size of the truth (bilinearly, align_corners off), aligned if `align` is set, and
    clamped to the range, NaN to its lower end. Valid pixels are strictly inside the range and inside the crop. Images
    without valid pixels are counted (`empty`) and omitted from the means; if all images are, DatasetError is raised.
    `save_best='rmse', rule='less'` works because there is no default prefix.

    Args:
        crop: see `evaluation_crop`: 'eigen' for NYUv2, 'garg' or 'kitti_eigen' for KITTI, 'none'.
        min_depth, max_depth: range in meters; without a max_depth that of each pair.
        align: for relative depth, see `align_prediction`.
        silog: 'bts' or 'mmseg', see `depth_metrics`.
        pasted: predictions cover the bottom center of the truth, see `paste_prediction`.
        boundary: add `boundary_f1`.
        limits: limits of the ranges in the second table, see `range_metrics`; empty for none.
        csv_path: file for one line per image.
        options: mmengine's `prefix` and `collect_device`.
    """

    default_prefix = ""

    def __init__(
        self, *, crop: str = "eigen", min_depth: float = 1e-3, max_depth: float | None = None, align: str = "none",
        silog: str = "bts", pasted: bool = False, boundary: bool = False, limits: Sequence[float] = (2.0, 5.0),
        csv_path: str | None = None, **options: str,
    ) -> None:  # fmt: skip
        check_depth_range(min_depth, max_depth or math.inf)
        if list(limits) != sorted(set(limits)):
            raise ConfigError(f"limits are {tuple(limits)}; they must rise")
        super().__init__(**options)
        self.crop = one_of("crop", crop, CROPS)
        self.min_depth, self.max_depth = min_depth, max_depth
        self.align = one_of("align", align, ALIGNMENTS)
        self.silog = one_of("silog", silog, ("bts", "mmseg"))
        self.pasted, self.boundary, self.limits, self.csv_path = pasted, boundary, tuple(limits), csv_path
        self.ranges = [f"{low:g}-{high:g}m" for low, high in itertools.pairwise((0, *limits))]
        self.ranges += [f"over{limits[-1]:g}m"] if limits else []
        self.columns = [
            "pixels",
            *NAMES,
            *(("boundary_f1",) if boundary else ()),
            *(("scale", "shift") if align != "none" else ()),
            *(f"{name}_{where}" for where in self.ranges for name in ("pixels", "abs_rel", "rmse", "d1")),
        ]

    def process(self, data_batch: Any, data_samples: Sequence[Mapping[str, Any]]) -> None:  # noqa: ARG002
        for sample in data_samples:
            remedies = {
                "pred_depth_map": "evaluate a depth model",
                "gt_depth_map": "the test pipeline needs LoadDepth and PackDepthInputs",
            }
            for key, remedy in remedies.items():
                if key not in sample:
                    raise ConfigError(f"the sample of {sample.get('img_path')} has no {key}; {remedy}")
            maps = (sample[key]["data"].squeeze(0) for key in remedies)
            max_depth = self.max_depth or sample.get("max_depth")
            if max_depth is None:
                raise ConfigError("neither CheckedDepthMetric nor the dataset has a max_depth; set one in meters")
            self.results.append((str(sample.get("img_path")), self.evaluate_image(*maps, max_depth=max_depth)))

    def evaluate_image(self, pred: Tensor, target: Tensor, *, max_depth: float) -> tuple[float, ...]:
        """Return the values of `columns` for a prediction (h, w) and its truth (H, W), both in meters."""
        pred = pred.detach().float()
        if pred.device.type in _NO_FLOAT64:
            pred = pred.cpu()
        target = target.to(pred.device, torch.float32)
        height, width = target.shape
        if self.pasted:
            pred = paste_prediction(pred, height, width)
        pred = resize(pred[None, None], (height, width))[0, 0]
        top, bottom, left, right = evaluation_crop(self.crop, height, width)
        pred, target = pred[top:bottom, left:right], target[top:bottom, left:right]
        valid = (target > self.min_depth) & (target < max_depth)
        pred, scale, shift = align_prediction(pred, target, valid, self.align)
        pred = pred.nan_to_num(self.min_depth, math.inf, -math.inf).clamp(self.min_depth, max_depth)
        where = valid.flatten().nonzero().squeeze(1)  # twice as fast as two boolean masks
        p, t = (x.flatten().index_select(0, where) for x in (pred, target))
        row = [len(t), *depth_metrics(p, t, silog=self.silog).values()]
        if self.boundary:
            row.append(boundary_f1(pred, target, valid) if len(t) else math.nan)
        if self.align != "none":
            row += [scale, shift]
        if self.limits:
            row += range_metrics(p, t, self.limits)
        return tuple(row)  # Python floats: small arrays would fragment the heap

    def compute_metrics(self, results: list[tuple[str, tuple[float, ...]]]) -> dict[str, float]:
        """Log the tables, write the CSV; return the means of the metrics, and the number of empty images."""
        table = np.array([row for _, row in results])  # (images, columns)
        if self.csv_path:
            with atomic_write(self.csv_path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
                lines = ([path, *(f"{value:.7g}" for value in row)] for path, row in results)
                csv.writer(file).writerows([["img_path", *self.columns], *lines])
        empty = [path for path, row in results if not row[0]]
        if len(empty) == len(results):
            raise DatasetError(
                f"none of the {len(results)} images has a valid pixel (such as {empty[0]}); check the scale of the "
                f"depth files, max_depth ({self.max_depth}) and crop ({self.crop}) of the metric"
            )
        kept = table[table[:, 0] > 0]
        means = dict(zip(self.columns, torch.from_numpy(kept).nanmean(0).tolist(), strict=True))
        metrics = {name: means[name] for name in self.columns if name in (*NAMES, "boundary_f1")}
        print_log("\n".join(self._report(means, kept, empty)), logger="current")
        return {**metrics, "empty": len(empty)}

    def _report(self, means: Mapping[str, float], kept: np.ndarray, empty: Sequence[str]) -> list[str]:
        limit = f"{self.max_depth:g} m" if self.max_depth else "each pair's limit"
        lines = [
            f"depth of {len(kept)} images, from {self.min_depth:g} m to {limit}, crop {self.crop}, align {self.align}, "
            f"silog of {self.silog}; means over images"
        ]
        names = [name for name in (*NAMES, "boundary_f1") if name in means]
        lines += ["  ".join(f"{name:>8}" for name in names), "  ".join(f"{means[name]:8.4f}" for name in names)]
        for where in self.ranges:
            pixels = kept[:, self.columns.index(f"pixels_{where}")]
            values = ", ".join(f"{name} {means[f'{name}_{where}']:.4f}" for name in ("abs_rel", "rmse", "d1"))
            share = pixels.sum() / kept[:, 0].sum()
            lines.append(f"{where:>8}: {values} ({share:.1%} of the pixels, {np.count_nonzero(pixels)} images)")
        if self.align != "none":
            against = np.count_nonzero(kept[:, self.columns.index("scale")] < 0)
            if against:
                lines.append(f"{against} images were aligned with a negative scale: their predictions are inverted")
        if empty:
            lines.append(f"{len(empty)} more images have no valid pixel and are omitted (such as {empty[0]})")
        return lines
