"""Zero-shot tracking through many videos: masks in folders that appear complete, and the scores of each layer.

A run writes <out>/<sequence>/<frame>.png or, with several layers, <out>/layer_<n>/<sequence>/<frame>.png.
"""

import glob
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pe_spatial.atomic import atomic_folder, write_json
from pe_spatial.engine.report import best_layer, draw_scores
from pe_spatial.errors import ConfigError
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.evaluation import Evaluation, evaluate
from pe_spatial.tracking.vos.masks import write_mask
from pe_spatial.tracking.zero_shot import ZeroShotTracker


class ZeroShotRun:
    """The results of one tracker in one folder, which a later run with the same settings continues.

    Args:
        tracker: with its weights.
        out: folder of the results.
        settings: everything that the results depend on, as JSON values.
        by_layer: write a folder for each layer; otherwise the backbone has one layer.

    Raises ConfigError if `out` holds results of other settings.
    """

    def __init__(
        self, tracker: ZeroShotTracker, out: Path, settings: Mapping[str, Any], *, by_layer: bool = False
    ) -> None:
        self.tracker, self.out = tracker, out
        self.folders = {n: out / f"layer_{n:02d}" if by_layer else out for n in tracker.backbone.out_indices}
        file = out / "settings.json"
        previous = json.loads(file.read_text()) if file.is_file() else settings
        other = ", ".join(f"{key} ({previous.get(key)})" for key in settings if previous.get(key) != settings[key])
        if other:
            raise ConfigError(f"{out} holds results with another {other}; choose another folder or delete it")
        write_json(file, settings)

    def pending(self, clips: Sequence[Clip]) -> list[Clip]:
        """Return the clips whose results are not complete."""
        return [clip for clip in clips if not all((folder / clip.name).is_dir() for folder in self.folders.values())]

    def track(self, clip: Clip, after_frame: Callable[[], object] = lambda: None) -> None:
        """Write the masks of `clip`, of all layers; the folders appear when all of them are complete."""
        first_mask, frames = clip.load()
        targets = [folder / clip.name for folder in self.folders.values()]
        with ExitStack() as stack:
            for target in targets:  # remains of a run that was killed
                for leftover in target.parent.glob(f".{glob.escape(clip.name)}.*"):
                    shutil.rmtree(leftover)
            unfinished = [stack.enter_context(atomic_folder(target)) for target in targets]
            for name, masks in self.tracker.track(frames, first_mask):
                for folder, mask in zip(unfinished, masks, strict=True):
                    write_mask(folder / f"{name}.png", mask)
                after_frame()
            for target in targets:  # a run may have been killed between the folders of two layers
                shutil.rmtree(target, ignore_errors=True)

    def score(self, gt_dir: Path, clips: Sequence[Clip], *, workers: int = 1) -> dict[int, Evaluation]:
        """Evaluate each layer on the clips of which every frame is annotated; empty if there are none."""
        names = [clip.name for clip in clips if _annotated(clip)]
        if not names:
            return {}
        options: dict[str, Any] = dict(sequences=names, workers=workers)
        return {layer: evaluate(gt_dir, folder, **options) for layer, folder in self.folders.items()}

    def report(self, evaluations: Mapping[int, Evaluation]) -> tuple[int, int]:
        """Write layers.json and layers.png; return the best and the last layer by J&F."""
        scores = {layer: evaluation.global_results for layer, evaluation in evaluations.items()}
        means = {layer: 100 * values["J&F-Mean"] for layer, values in scores.items()}
        best, last = best_layer(means), max(means)
        write_json(self.out / "layers.json", dict(layers=scores, best=best, last=last))
        draw_scores(self.out / "layers.png", means, name="J&F", best=best)
        return best, last


def _annotated(clip: Clip) -> bool:
    """Return whether every frame has a mask and some frames are scored (the first and the last are not)."""
    assert isinstance(clip.frames, tuple)
    assert clip.mask is not None
    return len(clip.frames) > 2 and all(clip.mask.with_name(f"{path.stem}.png").is_file() for path in clip.frames)
