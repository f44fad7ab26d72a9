"""Let a run last for days: signals that save, finite losses, resuming within an epoch, workers that end cleanly.

`add_fault_tolerance` puts it into any config; `checkpoints.py` keeps checkpoints complete.
"""

import atexit
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, get_rank, is_distributed
from mmengine.fileio.backends import register_backend
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapperDict
from mmengine.registry import FUNCTIONS, HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from pe_spatial.encoder.files import join_names
from pe_spatial.engine.checkpoints import AtomicCheckpointHook, AtomicLocalBackend
from pe_spatial.engine.determinism import seed_everything
from pe_spatial.engine.resuming import ResumeBySamplesHook  # noqa: F401  (registers)
from pe_spatial.errors import TrainingError

EXIT_RETRY = 75
"""Exit code of a run that was told to stop and saved its state: sysexits.h's EX_TEMPFAIL, 'try again'."""

WORKER_TIMEOUT = 600
"""Seconds without a batch after which a data worker counts as hanging."""


@HOOKS.register_module()
class StopOnSignalHook(Hook):
    """On SIGTERM, SIGUSR1 or Ctrl-C finish the step, save, and exit with `EXIT_RETRY`; `--resume` continues the run.

    A signal to one process stops all of them after the same step. In validation the run stops after the current batch,
    and `--resume` repeats the validation. A second Ctrl-C stops at once.
    """

    priority = "LOWEST"
    signals = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))

    def __init__(self) -> None:
        self._received = 0
        self._previous: dict[int, Any] = {}
        self._repeat_validation = False

    def before_train(self, runner: Runner) -> None:
        """Install the handlers, which Python allows in the main thread alone."""
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in self.signals}
        if self._repeat_validation:
            self._repeat_validation = False
            runner.val_loop.run()

    def after_train(self, _: Runner) -> None:
        """Restore the previous handlers."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Save and exit if any process received a signal."""
        number = int(max_across_ranks(self._received))
        if number:
            self._save_and_exit(runner, number, steps=runner.iter + 1)

    def before_val_epoch(self, runner: Runner) -> None:
        """Count the batches that every process has: in those they can agree to stop."""
        self._common_batches = -max_across_ranks(-len(runner.val_dataloader))

    def after_val_iter(self, runner: Runner, *, batch_idx: int, **_: Any) -> None:
        """Save and exit as after a training step."""
        number = int(max_across_ranks(self._received)) if batch_idx < self._common_batches else 0
        if not number or not self._previous:  # not in training
            return
        self._repeat_validation = True
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                hook.after_val_epoch(runner)  # puts the trained weights back in place of their averages
        self._save_and_exit(runner, number, steps=runner.iter)

    def before_save_checkpoint(self, _: Runner, checkpoint: dict[str, Any]) -> None:
        """Record whether a validation was stopped."""
        checkpoint["meta"]["repeat_validation"] = self._repeat_validation

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Read whether a validation was stopped."""
        meta = checkpoint.get("meta") or {}
        self._repeat_validation = bool(runner.cfg.get("resume") and meta.get("repeat_validation"))

    def _save_and_exit(self, runner: Runner, number: int, *, steps: int) -> None:
        hooks = [hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)]
        if hooks:
            path = hooks[0].save_now(runner, steps)
            runner.logger.warning(f"{signal.Signals(number).name} received: saved {path}. Continue with --resume.")
        raise SystemExit(EXIT_RETRY)

    def _receive(self, number: int, _: Any) -> None:
        if number == self._received == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = number
        name = signal.Signals(number).name
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        text = f"the run stops after the current batch, saves, and exits with code {EXIT_RETRY}{again}"
        notice = f"{name} received: {text}\n"
        os.write(2, notice.encode())  # unlike print, allowed in a handler at any time


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop when the loss is not finite, and list the images of that batch.

    Args:
        patience: number of such steps in a row after which TrainingError stops the run; None for never. With more than
            one, these steps leave the weights unchanged, and the log counts them.
    """

    def __init__(self, *, patience: int | None = 1) -> None:
        self.patience = patience
        self.skipped = self.in_a_row = 0

    def before_train(self, runner: Runner) -> None:
        """Guard the optimizer if the run continues after such a step."""
        if self.patience != 1:
            wrapper = runner.optim_wrapper
            for one in wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]:
                one.optimizer.register_step_pre_hook(_drop_non_finite_gradients)

    def after_train_iter(self, runner: Runner, *, outputs: dict[str, Any], data_batch: Any, **_: Any) -> None:
        """Check the loss."""
        loss = torch.as_tensor(outputs["loss"]).detach()
        if not max_across_ranks(float(not torch.isfinite(loss).all())):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        message = f"the loss of step {runner.iter + 1} is {loss.item()}; images: {_image_names(data_batch)}"
        if self.in_a_row == self.patience:
            raise TrainingError(
                f"{message}. {self.in_a_row} such steps in a row. Check these images and their annotations, lower "
                "optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad, or skip such steps: --non-finite-steps 0"
            )
        runner.logger.warning(f"skipped ({self.skipped} steps so far): {message}")


def _drop_non_finite_gradients(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Remove all gradients if one is not finite: an optimizer then leaves weights and moments unchanged."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = all(torch.isfinite(norm).item() for norm in torch._foreach_norm([p.grad for p in parameters]))
    if max_across_ranks(float(not finite)):
        for parameter in parameters:
            parameter.grad = None


def _image_names(data_batch: Any) -> str:
    samples = data_batch.get("data_samples", ()) if isinstance(data_batch, dict) else ()
    names = [str(sample.get("img_path", sample.get("img_id"))) for sample in samples if hasattr(sample, "get")]
    return join_names(names) if names else "unknown"


def max_across_ranks(value: float) -> float:
    """Return the largest of the processes' values; all of them must call this."""
    if not is_distributed():
        return value
    tensor = torch.tensor(float(value))
    all_reduce(tensor, op="max")
    return tensor.item()


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's EpochBasedTrainLoop that resumes in the middle of an epoch instead of restarting the epoch."""

    def run_epoch(self) -> None:
        """Run the rest of an epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        for index, batch in enumerate(_skip_batches(self.dataloader, done), done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Skipping:
    """A batch sampler without its first batches, which are drawn but not loaded."""

    def __init__(self, batches: Any, number: int) -> None:
        self.batches, self.number = batches, number

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        for _ in range(self.number):
            next(batches)
        return batches


def _skip_batches(dataloader: torch.utils.data.DataLoader[Any], number: int) -> Iterator[Any]:
    if not number:
        return iter(dataloader)
    batches = dataloader.batch_sampler
    # DataLoader forbids setting this because its iterators read it once, when they are created; here that is the point.
    object.__setattr__(dataloader, "batch_sampler", _Skipping(batches, number))
    try:
        return iter(dataloader)
    finally:
        object.__setattr__(dataloader, "batch_sampler", batches)


@FUNCTIONS.register_module()
def init_worker(_: int, *, rank: int) -> None:
    """Seed a data worker, and let it ignore the signals of `StopOnSignalHook`.

    A scheduler sends them to every process of a job, and without workers the run could not finish the step and save.
    """
    seed_everything(torch.initial_seed(), rank)
    for number in StopOnSignalHook.signals:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """Let data workers exit, and kill those that hang.

    At exit multiprocessing sends SIGTERM, which our workers ignore, and waits for them. Killing them first does not
    help: torch watches the workers of an iterator until it is shut down, and would report them as crashed.
    """
    for iterator in gc.get_objects():
        if type(iterator) is _MultiProcessingDataLoaderIter:
            iterator._shutdown_workers()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def add_fault_tolerance(cfg: Config, *, non_finite_steps: int = 1) -> None:
    """Put the hooks and loops of this package into `cfg` where it has mmengine's own or none.

    Args:
        non_finite_steps: `patience` of `NonFiniteLossHook`; 0 stands for None.
    """
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
    atexit.unregister(end_workers)
    atexit.register(end_workers)
    hooks = cfg.get("default_hooks") or {}
    if (hooks.get("checkpoint") or {}).get("type") == "CheckpointHook":
        hooks["checkpoint"]["type"] = "AtomicCheckpointHook"
    present = [hook["type"] for hook in cfg.get("custom_hooks") or ()]
    ours = (
        dict(type="ResumeWithoutPretrained"),
        dict(type="ResumeBySamplesHook"),
        dict(type="StopOnSignalHook"),
        dict(type="NonFiniteLossHook", patience=non_finite_steps or None),
    )
    added = [hook for hook in ours if hook["type"] not in present]
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), *added]
    loop = cfg.get("train_cfg") or {}
    if loop.get("type") == "EpochBasedTrainLoop" or loop.get("by_epoch"):
        loop.pop("by_epoch", None)
        loop["type"] = "ResumableEpochLoop"
    for name in ("train_dataloader", "val_dataloader"):
        loader = cfg.get(name) or {}
        if loader.get("num_workers"):
            loader.setdefault("worker_init_fn", dict(type="init_worker", rank=get_rank()))
    if (cfg.get("train_dataloader") or {}).get("num_workers"):
        cfg.train_dataloader.setdefault("timeout", WORKER_TIMEOUT)
