"""The length of a training, and what follows from it: warm-up, decay, validation, checkpoints, hooks."""

import math
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import LOOPS

from pe_spatial.errors import ConfigError

VALIDATIONS = 20
"""A training of a length given on the command line is validated about this often."""

_EPOCHS_OF_HOOKS = ("switch_epoch", "num_last_epochs", "stop_epoch")
_LENGTHS = ("T_max", "step_size", "total_steps", "total_iters")


def set_length(cfg: Config, *, epochs: int | None = None, iterations: int | None = None, steps: int | None) -> None:
    """Train for a number of epochs or iterations; warm-up and decay keep their places in the schedule.

    Warm-up takes at most a tenth of the training; of one step it is omitted. A config that counts iterations gets as
    many as the epochs have.

    Args:
        cfg: config of a training; it is changed in place.
        epochs, iterations: the new length; one of the two.
        steps: iterations of an epoch; None if unknown, then only configs that count epochs can take epochs.

    Raises:
        ConfigError: for a length below 1, or one that cannot be converted.
    """
    for name, length in (("epochs", epochs), ("iterations", iterations)):
        if length is not None and length < 1:
            raise ConfigError(f"--{name} is {length}; it must be at least 1")
    loop = cfg.get("train_cfg")
    if not loop:
        raise ConfigError(f"{cfg.filename} has no train_cfg, so there is no training to shorten")
    by_epoch = counts_epochs(cfg)
    old = loop["max_epochs" if by_epoch else "max_iters"]
    if not by_epoch and epochs is not None:
        if steps is None:
            raise ConfigError(f"{cfg.filename} counts iterations, and the images are not known; give --iterations N")
        iterations = epochs * steps
    switches = any(key in hook for hook in cfg.get("custom_hooks") or [] for key in _EPOCHS_OF_HOOKS)
    if by_epoch and iterations is not None and switches:
        if steps is None:
            raise ConfigError(f"{cfg.filename} has hooks that count epochs; give --epochs N")
        epochs, iterations = math.ceil(iterations / steps), None
    new = iterations if iterations is not None else epochs
    assert new is not None
    if by_epoch and iterations is not None:
        loop = cfg.train_cfg = ConfigDict(type="IterBasedTrainLoop", max_iters=new)
    else:
        loop["max_epochs" if by_epoch else "max_iters"] = new
    total = new if iterations is not None else new * (steps or math.inf)
    schedulers = cfg.get("param_scheduler") or []
    single = not isinstance(schedulers, list | tuple)
    scaled = _scale([schedulers] if single else schedulers, old, new, total, iterations is not None)
    cfg.param_scheduler = scaled[0] if single and scaled else scaled
    for hook in cfg.get("custom_hooks") or []:
        for key in _EPOCHS_OF_HOOKS:
            if key in hook and by_epoch:
                hook[key] = round(hook[key] / old * new)
    _set_intervals(cfg, new, steps if iterations is not None else None, in_iterations=iterations is not None)


def counts_epochs(cfg: Config) -> bool:
    """Return whether the training loop of a config counts epochs."""
    kind = cfg.train_cfg.get("type")
    if kind is None:
        return bool(cfg.train_cfg.get("by_epoch", True))
    loop = LOOPS.get(kind) if isinstance(kind, str) else kind
    return "max_iters" not in cfg.train_cfg and not getattr(loop, "__name__", "").startswith("Iter")


def _scale(schedulers: Any, old: int, new: int, total: float, in_iterations: bool) -> list[Any]:
    """Return the schedulers of a training of `new` epochs or iterations, `total` iterations; before, it was `old`."""
    ends = {}  # of warm-ups, by unit: they are followed by schedulers that begin there
    for one in schedulers:
        if _is_warm_up(one):
            by_epoch = one.get("by_epoch", True)
            length = one.get("end") or one.get("total_iters", 5)
            same_unit = by_epoch is not in_iterations
            limit = new if same_unit else total
            shortest = 1 if one.get("convert_to_iter_based") else 2  # mmengine leaves a shorter one at its start
            shortened = int(min(length, limit / 10))
            ends[by_epoch, length] = shortened if shortened >= shortest else 0
    result = []
    for one in schedulers:
        by_epoch = one.get("by_epoch", True)
        converts = by_epoch and in_iterations  # the epochs of the config become iterations

        def place(value: Any, by_epoch: bool = by_epoch) -> Any:
            if (by_epoch, value) in ends:
                return ends[by_epoch, value]
            if not isinstance(value, int | float) or value == math.inf:
                return value
            return max(min(round(value / old * new), new), 0) if by_epoch or in_iterations else min(value, total)

        changed = ConfigDict(one)
        span = one.get("end", 0) - one.get("begin", 0) if "end" in one else None
        for key in ("begin", "end"):
            if key in changed:
                changed[key] = place(one[key])
        for key in _LENGTHS:
            if key in changed:
                full = one[key] == span
                changed[key] = max(1, changed["end"] - changed.get("begin", 0) if full else place(one[key]))
        if "milestones" in changed:
            changed["milestones"] = [place(value) for value in one["milestones"]]
        if converts:
            changed["by_epoch"] = False
            changed.pop("convert_to_iter_based", None)
        if changed.get("begin", 0) < changed.get("end", math.inf):
            result.append(changed)
    return result


def _is_warm_up(scheduler: Mapping[str, Any]) -> bool:
    kind = str(scheduler.get("type"))
    factor = scheduler.get("start_factor", scheduler.get("factor", 1 / 3))
    rises = "Warmup" in kind or (kind.startswith(("Linear", "Constant")) and factor < 1)
    return not scheduler.get("begin", 0) and rises


def _set_intervals(cfg: Config, new: int, steps: int | None, *, in_iterations: bool) -> None:
    """Validate and save about `VALIDATIONS` times, at the end of epochs where these are known."""
    interval = max(1, round(new / VALIDATIONS))
    if in_iterations and steps:
        interval = min(new, steps * max(1, round(interval / steps)))
    cfg.train_cfg.pop("dynamic_intervals", None)
    cfg.train_cfg.pop("val_begin", None)
    if cfg.get("val_dataloader"):
        cfg.train_cfg.val_interval = interval
    hooks = cfg.setdefault("default_hooks", ConfigDict())
    hooks.checkpoint = ConfigDict(hooks.get("checkpoint") or dict(type="CheckpointHook"))
    hooks.checkpoint.update(interval=interval, by_epoch=not in_iterations)
    hooks.checkpoint.setdefault("max_keep_ckpts", 2)
    if in_iterations:
        cfg.log_processor = ConfigDict({**(cfg.get("log_processor") or {}), "by_epoch": False})
    logger = hooks.get("logger")
    if logger and in_iterations:
        logger["interval"] = min(logger.get("interval", 10), max(1, new // VALIDATIONS))

