"""What a resumed run continues with: the samples that were not seen yet, and the options of its checkpoint."""

from collections.abc import Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any

from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner

from pe_spatial.errors import TrainingError


@HOOKS.register_module()
class ResumeBySamplesHook(Hook):
    """Let a run resume with another batch size, number of processes or size of the dataset.

    Steps of other sizes cannot be counted together, so a checkpoint has the number of samples that were seen: of the
    epoch, or of the run if it has no epochs. The rest of the epoch follows. A warning names the options that a resumed
    run takes from its checkpoint although the config now differs.
    """

    def __init__(self) -> None:
        self._start = (0, 0)  # step and samples at which this process began, of a run without epochs

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Add the samples that were seen."""
        meta, per_step = checkpoint["meta"], samples_per_step(runner)
        start, samples = self._start
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            start, samples = meta["epoch"] * len(runner.train_dataloader), 0
        meta.update(samples_per_step=per_step, samples_seen=samples + (meta["iter"] - start) * per_step)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Let mmengine, which reads the number of the step next, continue after the samples that were seen."""
        if not runner.cfg.get("resume"):
            return
        for text in _ignored(runner, checkpoint):
            runner.logger.warning(f"{text}. Where it should hold, start a new run with load_from={runner._load_from}.")
        meta, per_step = checkpoint["meta"], samples_per_step(runner)
        before, step = meta.get("samples_per_step", per_step), meta["iter"]
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            length = len(runner.train_dataloader)
            if "samples_seen" not in meta and not 0 <= step - meta["epoch"] * length <= length:
                raise TrainingError(
                    f"{runner._load_from} was saved in step {step} of epoch {meta['epoch'] + 1}, but an epoch has "
                    f"{length} steps now: resume with the batch size and the number of processes that it had"
                )
            seen = meta.get("samples_seen", (step - meta["epoch"] * length) * per_step)
            complete = seen >= len(runner.train_dataloader.sampler) * get_world_size()
            meta["iter"] = meta["epoch"] * length + (length if complete else seen // per_step)
            if meta["iter"] != step:
                _check_schedule(runner, before, per_step)
        else:
            seen = meta.get("samples_seen", step * per_step)
            self._start = (step, seen)
            _skip(runner.train_loop, step, seen // per_step)
        if before != per_step:
            runner.logger.warning(
                f"resumes after the {seen} samples that were seen, with {per_step} in a step instead of {before}; "
                "the learning rate stays as it was"
            )


def _skip(loop: Any, step: int, batches: int) -> None:
    """Let a loop that starts at `step` skip so many `batches`."""
    iterator = loop.dataloader_iterator
    if hasattr(iterator, "skip_iter"):
        skip = iterator.skip_iter
        iterator.skip_iter = lambda _: skip(batches)
    else:  # MMEngine 0.10.7 draws `step` batches
        loop.dataloader_iterator = chain(
            repeat(None, max(step - batches, 0)), islice(iterator, max(batches - step, 0), None)
        )


def samples_per_step(runner: Runner) -> int:
    """Return the number of samples that all processes draw for a step."""
    loader = runner.train_dataloader
    return (loader.batch_size or loader.batch_sampler.batch_size) * get_world_size()


def _check_schedule(runner: Runner, before: int, now: int) -> None:
    """Refuse a schedule that was converted from epochs to steps: the checkpoint has it in steps of the old size."""
    schedulers = runner.cfg.get("param_scheduler") or []
    for scheduler in [schedulers] if isinstance(schedulers, Mapping) else schedulers:
        if scheduler.get("convert_to_iter_based"):
            raise TrainingError(
                f"{runner._load_from} counts its learning rate in steps (param_scheduler's convert_to_iter_based), and "
                f"an epoch had another number of them: {before} samples in a step, now {now}. Resume with the same "
                f"dataset and train_dataloader.batch_size times processes = {before}"
            )


def _ignored(runner: Runner, checkpoint: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each option that is not that of the checkpoint, and is about to be replaced by it."""
    ours, theirs = runner.optim_wrapper.state_dict(), checkpoint.get("optimizer", {})
    for new, old in zip(ours.get("param_groups", ())[:1], theirs.get("param_groups", ())[:1], strict=True):
        rate = "initial_lr" if "initial_lr" in new and "initial_lr" in old else "lr"
        for key in ({*new} & {*old}) - {"params", "param_names", "lr", "initial_lr"} | {rate}:
            if new[key] != old[key]:
                name = f"optim_wrapper.optimizer.{'lr' if key == rate else key}"
                yield f"{name}={new[key]} is ignored: the run resumes with {old[key]} of its checkpoint"
    built = runner.param_schedulers if isinstance(runner.param_schedulers, list) else []
    for new, old in zip(built, checkpoint.get("param_schedulers") or [], strict=False):
        state = new.state_dict()
        for key in ("milestones", "gamma", "T_max", "eta_min", "power"):
            if state.get(key) != old.get(key):
                yield f"param_scheduler's {key}={state.get(key)} is ignored: the run resumes with {old.get(key)}"
