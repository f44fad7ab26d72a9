"""What lets a run survive days: files that are whole or absent, a stop that saves, losses that are numbers.

`make_safe` puts it into any config; tools/train.py calls it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, is_distributed, is_main_process
from mmengine.fileio.backends import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner

from pe_spatial.encoder.files import some
from pe_spatial.errors import TrainingError
from pe_spatial.writing import replacing

EXIT_AGAIN = 75
"""Exit code of a run that was told to stop and saved its state: sysexits.h's EX_TEMPFAIL, 'try again'."""


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their place and renamed: a kill leaves the old file or the new one."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; the folder is made if it is not there."""
        with replacing(filepath) as unfinished, open(unfinished, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text as `put` does."""
        self.put(obj.encode(encoding), filepath)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, in an order that never leaves a run without a whole checkpoint.

    mmengine removes the oldest file first, then writes the new one, then says which is the latest; a kill in between
    can leave nothing, or the name of half a file. Here the new file is complete before its name is written and before
    an old one goes. Files of writes that a kill cut short are removed at the next start.
    """

    def before_train(self, runner: Runner) -> None:
        """Find the folder as mmengine does, and clear it of unfinished files."""
        super().before_train(runner)
        if is_main_process() and isinstance(self.file_backend, LocalBackend) and os.path.isdir(self.out_dir):
            for leftover in Path(self.out_dir).glob(".*.pth.*"):
                leftover.unlink(missing_ok=True)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict[str, Any]) -> None:
        outdated = []
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                outdated.append(self.keep_ckpt_ids.popleft())
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info("keep_ckpt_ids", list(self.keep_ckpt_ids))
        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info("last_ckpt", self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(self.last_ckpt, os.path.join(runner.work_dir, "last_checkpoint"))
        for old in outdated:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    def save_now(self, runner: Runner) -> str:
        """Save after the step that runs, beside the regular checkpoints and not counted among them; return the path."""
        name = f"iter_{runner.iter + 1}.pth"
        meta = dict(epoch=runner.epoch, iter=runner.iter + 1)
        runner.save_checkpoint(self.out_dir, name, meta=meta, by_epoch=False, backend_args=self.backend_args)
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process():
            AtomicLocalBackend().put_text(path, os.path.join(runner.work_dir, "last_checkpoint"))
        return str(path)


@HOOKS.register_module()
class StopOnSignal(Hook):
    """On SIGTERM or SIGUSR1 finish the step, save, and exit with `EXIT_AGAIN`: `--resume` goes on from there.

    A signal to one process stops all of them in the same step.
    """

    priority = "LOWEST"
    signals = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self._received = 0
        self._before: dict[int, Any] = {}

    def before_train(self, _: Runner) -> None:
        """Listen."""
        self._before = {number: signal.signal(number, self._receive) for number in self.signals}

    def after_train(self, _: Runner) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Save and exit if any process was told to."""
        number = int(highest(self._received))
        if not number:
            return
        hooks = [hook for hook in runner.hooks if isinstance(hook, SafeCheckpointHook)]
        if hooks:
            runner.logger.info(f"{signal.Signals(number).name}: saved {hooks[0].save_now(runner)}; --resume goes on")
        raise SystemExit(EXIT_AGAIN)

    def _receive(self, number: int, _: Any) -> None:
        self._received = number


@HOOKS.register_module()
class WatchLoss(Hook):
    """Stop when the loss is no finite number, and name the pictures.

    Args:
        patience: such steps in a row before TrainingError stops the run; None for never. With more than one, these
            steps leave the weights as they are, and the log counts them.
    """

    def __init__(self, *, patience: int | None = 1) -> None:
        self.patience = patience
        self.skipped = self.in_a_row = 0

    def before_train(self, runner: Runner) -> None:
        """Guard the optimizer, if the run is to outlive such a step."""
        if self.patience != 1:
            runner.optim_wrapper.optimizer.register_step_pre_hook(_drop_gradients_that_are_not_finite)

    def after_train_iter(self, runner: Runner, *, outputs: dict[str, Any], data_batch: Any, **_: Any) -> None:
        """Look at the loss."""
        loss = torch.as_tensor(outputs["loss"]).detach()
        if not highest(float(not torch.isfinite(loss).all())):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.skipped += 1
        what = f"the loss of step {runner.iter + 1} is {loss.item()}; pictures: {_pictures(data_batch)}"
        if self.in_a_row == self.patience:
            raise TrainingError(
                f"{what}. {self.in_a_row} such steps in a row. Look at these pictures and their annotations, lower "
                "optim_wrapper.optimizer.lr, set optim_wrapper.clip_grad, or skip such steps: --non-finite-steps 0"
            )
        runner.logger.warning(f"skipped ({self.skipped} steps so far): {what}")


def _drop_gradients_that_are_not_finite(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Take all gradients away if one is not finite: an optimizer then leaves weights and moments as they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    finite = all(torch.isfinite(norm).item() for norm in torch._foreach_norm([p.grad for p in parameters]))
    if highest(float(not finite)):
        for parameter in parameters:
            parameter.grad = None


def _pictures(data_batch: Any) -> str:
    samples = data_batch.get("data_samples", ()) if isinstance(data_batch, dict) else ()
    names = [str(sample.get("img_path", sample.get("img_id"))) for sample in samples if hasattr(sample, "get")]
    return some(names) if names else "unknown"


def highest(value: float) -> float:
    """Return the largest of the processes' values; all of them must call this."""
    if not is_distributed():
        return value
    highest = torch.tensor(float(value))
    all_reduce(highest, op="max")
    return highest.item()


@LOOPS.register_module()
class ResumableEpochLoop(EpochBasedTrainLoop):
    """mmengine's EpochBasedTrainLoop, which goes on in the middle of an epoch instead of beginning it again."""

    def run_epoch(self) -> None:
        """Run what is left of an epoch."""
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        done = self._iter - self._epoch * len(self.dataloader)
        for index, batch in enumerate(_without_first(self.dataloader, done), done):
            self.run_iter(index, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Skipping:
    """A batch sampler without its first batches, which are drawn and not loaded."""

    def __init__(self, batches: Any, number: int) -> None:
        self.batches, self.number = batches, number

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        for _ in range(self.number):
            next(batches)
        return batches


def _without_first(dataloader: torch.utils.data.DataLoader[Any], number: int) -> Iterator[Any]:
    if not number:
        return iter(dataloader)
    batches = dataloader.batch_sampler
    # DataLoader forbids to set this, for its iterators read it once, when they are made; here that is the point.
    object.__setattr__(dataloader, "batch_sampler", _Skipping(batches, number))
    try:
        return iter(dataloader)
    finally:
        object.__setattr__(dataloader, "batch_sampler", batches)


WORKER_TIMEOUT = 600
"""Seconds after which a data worker that gives nothing counts as hanging."""


def make_safe(cfg: Config, *, non_finite_steps: int = 1) -> None:
    """Put the hooks and the loop of this module into `cfg` where it has mmengine's own or none.

    Args:
        non_finite_steps: of `WatchLoss`; 0 stands for None.
    """
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
    hooks = cfg.get("default_hooks") or {}
    if (hooks.get("checkpoint") or {}).get("type") == "CheckpointHook":
        hooks["checkpoint"]["type"] = "SafeCheckpointHook"
    present = [hook["type"] for hook in cfg.get("custom_hooks") or ()]
    ours = (dict(type="StopOnSignal"), dict(type="WatchLoss", patience=non_finite_steps or None))
    added = [hook for hook in ours if hook["type"] not in present]
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), *added]
    loop = cfg.get("train_cfg") or {}
    if loop.get("type") == "EpochBasedTrainLoop" or loop.get("by_epoch"):
        loop.pop("by_epoch", None)
        loop["type"] = "ResumableEpochLoop"
    loader = cfg.get("train_dataloader") or {}
    if loader.get("num_workers"):
        loader.setdefault("timeout", WORKER_TIMEOUT)
