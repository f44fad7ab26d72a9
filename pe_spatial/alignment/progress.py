"""Whether an alignment works: scores of every layer on held-out images, every N steps, and a figure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from pe_spatial.alignment.material import open_material
from pe_spatial.alignment.measure import HIGHER_IS_BETTER, METRICS, Encoding, Scores, measure
from pe_spatial.atomic import atomic_write, write_json
from pe_spatial.engine.report import best_layer
from pe_spatial.engine.weights import plain_model
from pe_spatial.errors import ConfigError


@HOOKS.register_module()
class AlignmentProgressHook(Hook):
    """Measure the student before the first step and every `interval` steps: alignment works when last meets best.

    Writes progress.json and progress.png into the work dir, and logs best and last layer. The student's trained weights
    are measured, not their average.

    Args:
        data: folders or files of `open_material`; each task is measured on the first that has it.
        interval: steps between two measurements.
        size: longer side of the images in pixels, and the shorter one of videos; None for the student's pretraining.
        images, clips, frames: how many of each part are used at most.
    """

    priority = "LOW"

    def __init__(
        self,
        data: str | Sequence[str],
        *,
        interval: int = 1000,
        size: int | None = None,
        images: int = 100,
        clips: int = 10,
        frames: int = 30,
    ) -> None:
        if interval < 1:
            raise ConfigError(f"interval of AlignmentProgressHook is {interval}; it must be at least 1")
        self.sources = [data] if isinstance(data, str) else list(data)
        self.interval, self.size = interval, size
        self.limits = (images, clips, frames)
        self.history: list[dict[str, Any]] = []

    def before_train(self, runner: Runner) -> None:
        """Read what an earlier part of the run measured, and measure the start."""
        self.materials = [open_material(source).at_most(*self.limits) for source in self.sources]
        path = Path(runner.work_dir, "progress.json")
        earlier = json.loads(path.read_text())["measured"] if runner.iter and path.is_file() else []
        self.history = [entry for entry in earlier if entry["step"] <= runner.iter]
        if not any(entry["step"] == runner.iter for entry in self.history):
            self._measure(runner, runner.iter)

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Measure."""
        if self.every_n_train_iters(runner, self.interval) or runner.iter + 1 == runner.max_iters:
            self._measure(runner, runner.iter + 1)

    def _measure(self, runner: Runner, step: int) -> None:
        """Score all layers; every process computes the same, which sharded weights need, and the main one writes."""
        scores = self._scores(runner)
        metrics = list(next(iter(scores.values())))
        summary = {metric: summarize(scores, metric) for metric in metrics}
        entry = dict(step=step, layers={str(layer): values for layer, values in scores.items()}, summary=summary)
        self.history.append(entry)
        if is_main_process():
            write_json(Path(runner.work_dir, "progress.json"), dict(measured=self.history))
            draw_progress(Path(runner.work_dir, "progress.png"), self.history)
        for metric, values in summary.items():
            runner.message_hub.update_scalar(f"alignment/{metric}_last", values["last"])
            runner.message_hub.update_scalar(f"alignment/{metric}_best", values["best"])
            text = f"last {values['last']:.4g}, best {values['best']:.4g} (layer {values['layer']})"
            runner.logger.info(f"alignment after {step} steps: {metric} {text}")

    def _scores(self, runner: Runner) -> Scores:
        model: Any = plain_model(runner.model)
        backbone = model.backbone
        before, training = backbone.out_indices, runner.model.training
        backbone.out_indices = tuple(range(backbone.depth))
        runner.model.eval()
        device = next(runner.model.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            encoding = Encoding(
                lambda images: runner.model(images, mode="tensor"),
                backbone.out_indices,
                backbone.config,
                backbone.patch_size,
                device,
            )
            native = backbone.config.grid_size
            size = self.size or (native if isinstance(native, int) else max(native)) * backbone.patch_size
            scores: Scores = {layer: {} for layer in backbone.out_indices}
            try:
                for material in self.materials:
                    measured = next(iter(scores.values()))
                    tasks = [task for task in material.tasks if METRICS[task] not in measured]
                    for layer, values in measure(encoding, material, size=size, tasks=tasks).items():
                        scores[layer].update(values)
            finally:
                backbone.out_indices = before
                runner.model.train(training)
        return scores


def summarize(scores: Scores, metric: str) -> dict[str, float]:
    """Return the best and the last layer's score, the best layer, and how much the last is worse."""
    values = {layer: one[metric] for layer, one in scores.items()}
    higher = HIGHER_IS_BETTER[metric]
    best = best_layer(values, higher_is_better=higher)
    last = values[max(values)]
    gap = values[best] - last if higher else last - values[best]
    return dict(last=last, best=values[best], layer=best, gap=gap)


def draw_progress(path: Path, history: Sequence[Mapping[str, Any]]) -> None:
    """Draw, for each metric, the last and the best layer over the steps, and the gap between them."""
    metrics = list(history[0]["summary"])
    figure = Figure(figsize=(4.2 * len(metrics), 3.4), dpi=130, layout="constrained")
    steps = [entry["step"] for entry in history]
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(1, len(metrics), i + 1, xlabel="step", title=metric)
        last, best = ([entry["summary"][metric][key] for entry in history] for key in ("last", "best"))
        axes.plot(steps, best, "*-", color="0.5", label="best layer")
        axes.plot(steps, last, "s-", color="tab:blue", label="last layer")
        axes.fill_between(steps, last, best, color="tab:blue", alpha=0.15, label="gap")
        axes.annotate(f"layer {history[-1]['summary'][metric]['layer']}", (steps[-1], best[-1]))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    with atomic_write(path) as unfinished:
        FigureCanvasAgg(figure).print_png(unfinished)
