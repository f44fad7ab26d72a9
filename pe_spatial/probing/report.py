"""What a layer sweep found: the score to compare layers by, the table, scores.json and scores.png."""

from collections.abc import Mapping
from typing import Any

from pe_spatial.atomic import write_json
from pe_spatial.engine.report import best_layer, draw_scores
from pe_spatial.errors import ConfigError
from pe_spatial.probing.sweep import LayerSweep

SCORES = {
    "detection": dict.fromkeys(("bbox_mAP", "segm_mAP", "bbox_mAP_50", "segm_mAP_50"), True),
    "segmentation": dict.fromkeys(("mIoU", "mDice", "mAcc", "aAcc"), True),
    "depth": dict.fromkeys(("rmse", "abs_rel", "sq_rel", "rmse_log", "log10", "silog", "mae"), False)
    | dict.fromkeys(("d1", "d2", "d3"), True),
}
"""Task -> scores that layers can be compared by, and whether higher is better.

The default is the first one that the config's metrics contain.
"""
HIGHER_IS_BETTER = {name: higher for scores in SCORES.values() for name, higher in scores.items()}


def check_score(name: str | None, task: str) -> None:
    """Raise ConfigError unless layers can be compared by this score, so that nobody waits for an evaluation first."""
    if name is not None and name not in SCORES[task]:
        raise ConfigError(f"--score is {name}; layers are compared for {task} by {', '.join(SCORES[task])}")


def choose_score(metrics: Mapping[str, float], name: str | None = None) -> tuple[str, bool]:
    """Return the key of the score to compare layers by, and whether higher is better.

    The keys of `metrics` may have a prefix that ends in a slash. `name` is one of `HIGHER_IS_BETTER`; None takes the
    first that `metrics` contains.
    """
    keys = {key.rpartition("/")[2]: key for key in metrics}
    allowed = [score for score in HIGHER_IS_BETTER if score in keys]
    chosen = name or next(iter(allowed), None)
    if chosen not in allowed:
        raise ConfigError(f"score is {chosen}; the config's metrics allow {', '.join(allowed) or 'none'}")
    return keys[chosen], HIGHER_IS_BETTER[chosen]


def write_report(
    sweep: LayerSweep, metrics: Mapping[int, Mapping[str, float]], *, score: str | None, config: str
) -> dict[str, Any]:
    """Write scores.json and scores.png into the folder of the sweep; return the content of scores.json.

    `metrics` are those of each layer, `score` is that of `choose_score`, and `config` is recorded.
    """
    score, higher_is_better = choose_score(next(iter(metrics.values())), score)
    scores = {layer: values[score] for layer, values in metrics.items()}
    backbone = sweep.cfg.model.backbone
    report: dict[str, Any] = dict(config=config, encoder=str(backbone.get("variant")))
    report |= dict(checkpoint=str(sweep.checkpoint), depth=sweep.depth)
    report |= dict(training_images=len(sweep.features.images), cache=sweep.features.describe())
    report |= dict(schedule=dict(sweep.cfg.train_cfg), score=score, higher_is_better=higher_is_better)
    best = best_layer(scores, higher_is_better=higher_is_better)
    report |= dict(best=best, last=max(metrics), metrics=metrics)
    write_json(sweep.folder / "scores.json", report)
    draw_scores(sweep.folder / "scores.png", scores, name=score, best=best)
    return report


def format_table(report: Mapping[str, Any]) -> str:
    """Return the metrics of all layers as a Markdown table; the best and the deepest layer are marked."""
    names = [
        name
        for name in next(iter(report["metrics"].values()))
        if not name.startswith("coco/") or name.rpartition("/")[2] in HIGHER_IS_BETTER
    ]
    shown = ["images without depth" if name.rpartition("/")[2] == "empty" else name for name in names]
    lines = [f"| layer (from 0) | of {report['depth']} (from 1) | {' | '.join(shown)} | note |"]
    lines.append("|---" * (len(names) + 3) + "|")
    for layer, values in report["metrics"].items():
        marks = ", ".join(word for key, word in (("best", "best"), ("last", "deepest")) if layer == report[key])
        lines.append(f"| {layer} | {layer + 1} | {' | '.join(f'{values[name]:.4g}' for name in names)} | {marks} |")
    return "\n".join(lines)


def format_best(rows: Mapping[str, tuple[int, int, str, float, float]]) -> str:
    """Return the best layer of each task as a Markdown table.

    `rows` maps the task to best layer and number of blocks, the score's name, its value there and at the deepest layer.
    """
    lines = ["| task | best layer (from 0) | of (from 1) | score | best | deepest |", "|---" * 6 + "|"]
    for task, (layer, depth, score, best, deepest) in rows.items():
        lines.append(f"| {task} | {layer} | {layer + 1} of {depth} | {score} | {best:.4g} | {deepest:.4g} |")
    return "\n".join(lines)
