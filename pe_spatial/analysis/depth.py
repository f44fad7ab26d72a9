"""The report on one or two results of depth estimation: errors by range, and the worst maps."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pe_spatial.analysis.figures import side_by_side
from pe_spatial.analysis.interval import bootstrap
from pe_spatial.analysis.page import Page
from pe_spatial.depth.batch import GroundTruth
from pe_spatial.depth.metrics import depth_metrics, range_metrics
from pe_spatial.depth.outputs import depth_range, draw_depth, draw_error, is_valid
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_rgb

METRICS = ("abs_rel", "rmse", "log10", "d1", "d2", "d3")
LIMITS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0)  # meters: bounds of the ranges
_SIDE = 260  # pixels of a drawn map


@dataclass(frozen=True)
class ImageErrors:
    """Errors of one image: the values of `METRICS`, and (ranges, 4) of pixels, abs_rel, rmse and d1."""

    name: str
    metrics: tuple[float, ...]
    ranges: np.ndarray


class DepthResult:
    """A folder that `infer_depth` wrote, beside ground truth.

    Args:
        folder: with metadata.json and NAME.npy.
        truth: ground truth of all or some of its images.

    Raises DatasetError for another folder, and where no image has ground truth.
    """

    def __init__(self, folder: str | Path, truth: GroundTruth) -> None:
        self.folder, self._truth = Path(folder), truth
        try:
            entries = json.loads((self.folder / "metadata.json").read_text())["images"]
            self._sources = {name: Path(entry["source"]) for name, entry in entries.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{folder} has no complete metadata.json; give a folder that infer_depth wrote"
            ) from error
        self.images = [errors for name in self._sources if (errors := self._errors(name))]
        if not self.images:
            raise DatasetError(f"{truth.source} has a depth map for none of the images in {folder}; check the names")

    def maps(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Return prediction and ground truth of an image, (H, W) in meters."""
        try:
            depth = np.load(self.folder / f"{name}.npy")
        except (OSError, ValueError) as error:
            raise DatasetError(f"{self.folder / name}.npy cannot be read ({error}); run infer_depth again") from error
        return depth, self._truth.read(name, self._sources[name], depth)

    def rgb(self, name: str) -> np.ndarray:
        """Return an image, (H, W, 3) uint8."""
        return read_rgb(self._sources[name])

    def _errors(self, name: str) -> ImageErrors | None:
        depth, target = self.maps(name)
        if target is None or not (valid := is_valid(depth) & is_valid(target)).any():
            return None
        pixels = [torch.from_numpy(np.ascontiguousarray(x[valid], np.float32)) for x in (depth, target)]
        values = depth_metrics(pixels[0], pixels[1])
        ranges = np.array(range_metrics(pixels[0], pixels[1], LIMITS)).reshape(-1, 4)
        return ImageErrors(name, tuple(values[key] for key in METRICS), ranges)

    def means(self) -> list[float]:
        """Return `METRICS`, means over the images."""
        return np.mean([one.metrics for one in self.images], axis=0).tolist()

    def ranges(self) -> np.ndarray:
        """Return (ranges, 4): pixels, abs_rel, rmse and d1 over the pixels of all images; nan without pixels."""
        every = np.stack([one.ranges for one in self.images])  # (images, ranges, 4)
        count = every[..., :1]
        sums = np.nansum(every[..., 1:] ** np.array([1, 2, 1]) * count, axis=0)
        with np.errstate(invalid="ignore"):
            means = sums / count.sum(0)
        return np.concatenate([count.sum(0), means ** np.array([1, 0.5, 1])], axis=1)


def write_page(results: Mapping[str, DepthResult], *, worst: int, samples: int) -> tuple[str, list[str]]:
    """Return the report on one or two results on the same images, as HTML, and lines that summarize it.

    Args:
        results: name -> result.
        worst: number of images to draw: those with the largest abs_rel of the last result.
        samples: of the bootstrap over images, for two results.
    """
    first, *others = results.values()
    names = [one.name for one in first.images]
    if others and [one.name for one in others[0].images] != names:
        raise DatasetError(f"{first.folder} and {others[0].folder} hold other images; give results on the same ones")
    title = f"Analysis of {' and '.join(results)}"
    page = Page(title, f"depth; {len(names)} images with ground truth, all valid pixels")
    page.section("Errors", "Means over the images. d1, d2, d3: share of pixels within factors of 1.25, 1.25^2, 1.25^3.")
    means = [result.means() for result in results.values()]
    rows = [[name, *(f"{x:.3f}" for x in values)] for name, values in zip(results, means, strict=True)]
    lines = [f"{name}: abs_rel {values[0]:.3f}, rmse {values[1]:.3f} m, d1 {values[3]:.3f}"
             for name, values in zip(results, means, strict=True)]  # fmt: skip
    if others:
        rows.append(["difference", *(f"{b - a:+.3f}" for a, b in zip(*means, strict=True))])
    page.table(["", *METRICS], rows)
    if others and samples:
        gains = np.array([b.metrics[0] - a.metrics[0] for a, b in zip(first.images, others[0].images, strict=True)])
        found = bootstrap(lambda weight: float(weight @ gains / weight.sum()), len(gains), samples=samples)
        lines.append(found.sentence("abs_rel", "images", digits=4))
        page.text(lines[-1])
    _add_ranges(page, results)
    if worst:
        _add_maps(page, results, worst)
    return page.html(), lines


def _add_ranges(page: Page, results: Mapping[str, DepthResult]) -> None:
    page.section("By range", "Over the pixels of all images, by their true depth in meters.")
    edges = (0.0, *LIMITS, np.inf)
    values = [result.ranges() for result in results.values()]
    rows: list[list[Any]] = []
    for i, (low, high) in enumerate(pairwise(edges)):
        if values[0][i, 0]:
            share = f"{100 * values[0][i, 0] / values[0][:, 0].sum():.1f} %"
            rows.append([f"{low:g} to {high:g}" if high < np.inf else f"from {low:g}", share])
            rows[-1] += [f"{x:.3f}" for one in values for x in one[i, 1:]]
    header = [f"{metric}, {name}" for name in results for metric in ("abs_rel", "rmse", "d1")]
    page.table(["meters", "pixels", *header], rows)


def _add_maps(page: Page, results: Mapping[str, DepthResult], worst: int) -> None:
    *_, last = results
    note = f"Those with the largest abs_rel of {last}: image, truth, then prediction and error of each result."
    page.section("Worst maps", f"{note} Errors: |depth - truth| / truth, red from 0.2.")
    for one in sorted(results[last].images, key=lambda one: -one.metrics[0])[:worst]:
        panels = [results[last].rgb(one.name)]
        for i, result in enumerate(results.values()):
            depth, truth = result.maps(one.name)
            assert truth is not None
            limits = depth_range(truth, (2, 98)) or (0.0, 1.0)
            if i == 0:
                panels.append(draw_depth(truth, limits, "Spectral"))
            panels += [draw_depth(depth, limits, "Spectral"), draw_error(depth, truth)]
        caption = f"{one.name}: abs_rel {one.metrics[0]:.3f}, rmse {one.metrics[1]:.3f} m"
        page.image(side_by_side([_small(panel) for panel in panels]), caption)


def _small(pixels: np.ndarray) -> Image.Image:
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    return image
