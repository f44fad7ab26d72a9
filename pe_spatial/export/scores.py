"""What a model in torch and the exported one reach on given data: RMSE of depth, J&F of masks."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.depth.batch import GroundTruth
from pe_spatial.depth.outputs import is_valid
from pe_spatial.errors import DatasetError
from pe_spatial.tracking.sam2.prompts import Prompt
from pe_spatial.tracking.vos.evaluation import evaluate
from pe_spatial.tracking.vos.masks import read_mask, split_masks, write_mask

Scores = dict[str, dict[str, float]]
"""Name of a score -> 'torch' and 'exported' -> its value."""


def check_truth(task: str, images: Sequence[Path], truth: Path) -> None:
    """Raise DatasetError if no image has a depth map, or if a video of a tracker has no masks."""
    if task == "tracking":
        for video in images:
            _mask_files(video, truth)
        return
    ground_truth = GroundTruth(truth, scale=None)
    if not any(ground_truth.find(path.stem, path)[0] for path in images):
        raise DatasetError(f"{truth} has no depth map of the images; give maps of their names, or a table of pairs")


def depth_scores(predictors: Mapping[str, Any], images: Sequence[Path], truth: Path, *, scale: float | None) -> Scores:
    """Return the RMSE in meters, the mean over images.

    Args:
        predictors: 'torch' and 'exported'.
        images: files.
        truth: folder or table of depth maps, and their `scale`, see `GroundTruth`.

    Raises DatasetError if no depth map has a valid pixel.
    """
    ground_truth = GroundTruth(truth, scale=scale)
    errors: dict[str, list[float]] = {name: [] for name in predictors}
    for path in images:
        for name, predictor in predictors.items():
            depth = predictor(path).depth
            target = ground_truth.read(path.stem, path, depth)
            if target is not None and is_valid(target).any():
                difference = (depth - target)[is_valid(target)]
                errors[name].append(float(np.sqrt(np.mean(difference.astype(np.float64) ** 2))))
    if not errors["torch"]:
        raise DatasetError(f"the depth maps of {truth} have no valid pixel; give others")
    return {"RMSE [m]": {name: float(np.mean(values)) for name, values in errors.items()}}


def tracking_scores(predictors: Mapping[str, Any], videos: Sequence[Path], truth: Path) -> Scores:
    """Return J&F, J and F in percent, of objects that begin with their mask on the first frame.

    Args:
        predictors: 'torch' and 'exported'.
        videos: folders of frames.
        truth: folder of index masks, `truth`/VIDEO/FRAME.png.

    Raises DatasetError for a video without masks.
    """
    scores: Scores = {}
    names = [video.name for video in videos]
    for kind, predictor in predictors.items():
        with tempfile.TemporaryDirectory() as folder:
            for video in videos:
                objects = split_masks(read_mask(_mask_files(video, truth)[0]), binary=False)
                prompts = {0: {i: Prompt(mask=mask) for i, mask in objects.items()}}
                for name, _, index in predictor.track(video, prompts):
                    write_mask(Path(folder) / video.name / f"{name}.png", index)
            found = evaluate(truth, folder, sequences=names).global_results
        for name, key in (("J&F", "J&F-Mean"), ("J", "J-Mean"), ("F", "F-Mean")):
            scores.setdefault(name, {})[kind] = 100 * found[key]
    return scores


def _mask_files(video: Path, truth: Path) -> list[Path]:
    masks = sorted((truth / video.name).glob("*.png"))
    if not masks:
        raise DatasetError(f"{truth / video.name} has no masks of {video}; give --gt MASKS of its frames")
    return masks
