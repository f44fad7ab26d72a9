"""J&F of videos that are predicted under mmengine's Runner."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS

from pe_spatial.errors import ConfigError, DatasetError

from .evaluation import COUNTS, PROTOCOLS, find_tracks, score_frame, summarise
from .masks import write_mask


@METRICS.register_module()
class JandFMetric(BaseMetric):
    """J&F over whole videos; the annotations are read here, so that no loader carries them.

    Each data sample is one video: `video`, its name; `frames`, the names of its T frames; `pred_masks`, T masks (H, W)
    uint8 of object ids (an array or tensor (T, H, W), or a list), in the size of the annotations. Results are the
    `global_results` of `Evaluation`, over the videos that were predicted.

    Args:
        ann_dir: what `evaluate` takes as gt_dir, in layouts with one index mask for a frame.
        protocol: 'davis' or 'vos-benchmark', see `evaluation`.
        save_dir: folder for the masks, <save_dir>/<video>/<frame>.png; tools/eval_vos.py scores them the same.
        options: those of mmengine's `BaseMetric`.
    """

    default_prefix = "vos"

    def __init__(
        self, *, ann_dir: str, protocol: str = "davis", save_dir: str | None = None, **options: Any
    ) -> None:
        super().__init__(**options)
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol is {protocol!r}; choose {' or '.join(PROTOCOLS)}")
        self.ann_dir = ann_dir
        self.protocol = protocol
        self.save_dir = None if save_dir is None else Path(save_dir)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002
        """Score, and write, the masks of each video."""
        for sample in data_samples:
            video = sample["video"]
            masks = {
                frame: mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
                for frame, mask in zip(sample["frames"], sample["pred_masks"], strict=True)
            }
            if self.save_dir is not None:
                for frame, mask in masks.items():
                    write_mask(self.save_dir / video / f"{frame}.png", mask)
            track, *others = find_tracks(self.ann_dir, sequences=[video], protocol=self.protocol)
            if others or track.part is not None:
                raise DatasetError(
                    f"{self.ann_dir} has a folder of masks for each object of {video}; JandFMetric compares index "
                    "masks, so write per-object masks and score them with tools/eval_vos.py"
                )
            missing = [frame for frame in track.scored if frame not in masks]
            if missing:
                raise DatasetError(
                    f"{len(missing)} of {len(track.scored)} annotated frames of {video} are not predicted, the first "
                    f"is {missing[0]}; give the loader every frame, under the annotation's name"
                )
            scores = [score_frame(track, name, masks[name], source=f"{video}/{name}") for name in track.scored]
            self.results.append((track, scores))

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Return the global results; the log tells which rules were applied."""
        evaluation = summarise(dict(results))
        for name, count in evaluation.counts.items():
            if count:
                print_log(f"{count} {COUNTS[name]}", logger="current")
        return evaluation.global_results
