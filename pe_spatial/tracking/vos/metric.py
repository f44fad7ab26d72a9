"""Metrics for mmengine's Runner on predicted videos: J&F, or mask files for an evaluation server."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.evaluation import PROTOCOLS, Track, find_tracks, score_frame, summarize
from pe_spatial.tracking.vos.masks import object_id, read_mask, write_mask


@METRICS.register_module()
class JandFMetric(BaseMetric):
    """J&F over complete videos; the metric reads the annotations itself, so data loaders need not.

    Each data sample is one video: `video` is its name, `frames` the names of its frames, and `pred_masks` has for each
    frame an index mask (H, W) uint8 (arrays, tensors, or one (T, H, W) tensor) or, for annotations with a folder per
    object as in SA-V, object number -> (H, W) bool. Objects that are not in the frame may be omitted, and so may frames
    without annotation. Results are the `global_results` of `Evaluation` over the predicted videos.

    Args:
        ann_dir: `gt_dir` of `evaluate`.
        protocol: 'davis' or 'vos-benchmark', see `evaluation`.
        save_dir: folder for the masks, <save_dir>/<video>/<frame>.png for all frames or, for the annotated frames,
            <save_dir>/<video>/<object>/<frame>.png. pe-spatial eval_vos gives them the same scores.
        options: options of mmengine's `BaseMetric`.
    """

    default_prefix = "vos"

    def __init__(self, *, ann_dir: str, protocol: str = "davis", save_dir: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        if protocol not in PROTOCOLS:
            raise ConfigError(f"protocol is {protocol!r}; choose {' or '.join(PROTOCOLS)}")
        self.ann_dir, self.protocol, self.save_dir = ann_dir, protocol, save_dir

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002
        for sample in data_samples:
            video = sample["video"]
            predicted = dict(zip(sample["frames"], sample["pred_masks"], strict=True))
            tracks = find_tracks(self.ann_dir, sequences=[video], protocol=self.protocol)
            scores = {}
            for track, masks in self._divide(video, tracks, predicted):
                folder = Path(video, track.part or "")
                if self.save_dir is not None:
                    for frame, mask in masks.items():
                        write_mask(Path(self.save_dir) / folder / f"{frame}.png", mask)
                missing = [frame for frame in track.scored if frame not in masks]
                if missing:
                    raise DatasetError(
                        f"{len(missing)} of {len(track.scored)} annotated frames of {folder} are not predicted, the "
                        f"first is {missing[0]}; load every frame, under the annotation's name"
                    )
                scores[track] = [score_frame(track, name, masks[name], source=folder / name) for name in track.scored]
            # one entry per video, because mmengine truncates the collected results to the number of videos
            self.results.append(scores)

    def _divide(
        self, video: str, tracks: Sequence[Track], predicted: Mapping[str, Any]
    ) -> Iterator[tuple[Track, dict[str, np.ndarray]]]:
        """Yield the tracks of a video, each with its masks (H, W) uint8 by frame."""
        by_object = tracks[0].part is not None
        if any(isinstance(masks, Mapping) != by_object for masks in predicted.values()):
            raise DatasetError(
                f"{self.ann_dir} has {'a folder of masks for each object' if by_object else 'index masks'} of {video}; "
                f"predict {'the mask of each object by its number' if by_object else 'index masks'} there"
            )
        if not by_object:
            yield tracks[0], {frame: _array(mask) for frame, mask in predicted.items()}
            return
        numbers = {object_id(track.folder): track for track in tracks}
        unknown = sorted({i for masks in predicted.values() for i in masks if i not in numbers})
        if unknown:
            raise DatasetError(f"object {unknown[0]} is predicted in {video}, but its objects are {sorted(numbers)}")
        for i, track in numbers.items():
            masks = {}
            for frame in track.frames:
                if i in predicted.get(frame, ()):
                    mask = _array(predicted[frame][i])
                    if mask.dtype != bool:
                        raise TypeError(f"the mask of object {i} in {video}/{frame} is {mask.dtype}; expected bool")
                    masks[frame] = mask.view(np.uint8)
                elif frame in predicted:
                    masks[frame] = np.zeros_like(read_mask(track.folder / f"{frame}.png"))
            yield track, masks

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        evaluation = summarize({track: scores for video in results for track, scores in video.items()})
        for rule in evaluation.rules():
            print_log(rule, logger="current")
        means = [f"{name} {100 * evaluation.global_results[f'{name}-Mean']:.1f}" for name in ("J&F", "J", "F")]
        print_log(f"{', '.join(means)} (percent)", logger="current")
        return evaluation.global_results


@METRICS.register_module()
class MaskWriter(BaseMetric):
    """Write masks without scoring, for datasets with annotations on a server (MOSE, YouTube-VOS, DAVIS' test-dev).

    Data samples and options are those of `JandFMetric`. `save_dir` gets <video>/<frame>.png or, for masks by object,
    <video>/<object>/<frame>.png (three digits).
    """

    default_prefix = "vos"

    def __init__(self, *, save_dir: str, **options: Any) -> None:
        super().__init__(**options)
        self.save_dir = save_dir

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002
        for sample in data_samples:
            folder = Path(self.save_dir, sample["video"])
            for frame, masks in zip(sample["frames"], sample["pred_masks"], strict=True):
                if not isinstance(masks, Mapping):
                    write_mask(folder / f"{frame}.png", _array(masks))
                    continue
                for i, mask in masks.items():
                    write_mask(folder / f"{i:03d}" / f"{frame}.png", _array(mask).astype(np.uint8))
            self.results.append(sample["video"])

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return {"videos": len(results)}


def _array(mask: Any) -> np.ndarray:
    return mask.cpu().numpy() if isinstance(mask, torch.Tensor) else np.asarray(mask)
