"""What lets a run survive days: files that are whole or absent, a stop that saves, losses that are numbers.

`add_fault_tolerance` puts it into any config, `find_checkpoint` finds what to resume; tools/train.py calls both.
"""

from __future__ import annotations

import atexit
import logging
import multiprocessing
import os
import re
import signal
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import all_reduce, broadcast_object_list, get_rank, is_distributed, is_main_process
from mmengine.fileio.backends import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import FUNCTIONS, HOOKS, LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner, find_latest_checkpoint

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.files import CheckpointError, read_checkpoint, some
from pe_spatial.engine.determinism import seed_everything
from pe_spatial.errors import TrainingError

EXIT_RETRY = 75
"""Exit code of a run that was told to stop and saved its state: sysexits.h's EX_TEMPFAIL, 'try again'."""


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their place and renamed: a kill leaves the old file or the new one."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; the folder is made if it is not there."""
        with atomic_write(filepath) as unfinished, open(unfinished, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text as `put` does."""
        self.put(obj.encode(encoding), filepath)


def check_complete(path: str | Path) -> None:
    """Raise CheckpointError if a checkpoint is cut short or holds other bytes than were written.

    torch.save writes a zip file with the CRC-32 of every record, which torch.load does not look at: it takes weights
    with flipped bits as they are. Files of other formats hold no checksum and pass. Takes 0.3 s for a GB.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises half a dozen types for broken files
        damaged = error
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: not the bytes that were written ({damaged}); take an older checkpoint, or copy it anew"
        )


def find_checkpoint(source: str, work_dir: str) -> str | None:
    """Return a checkpoint that a run can go on from, the same on all processes; None for a run that has none yet.

    Its first process reads it whole, the others look whether it is there.

    Args:
        source: a file, or 'auto' for the latest one of `work_dir`. Where that is damaged, the next older one beside it
            is taken, with a warning, so that a run goes on after a crash without a person.
        work_dir: of the run.

    Raises CheckpointError, on all processes, if the file or all of them are damaged.
    """
    found: list[str | None] = [None, None]  # the checkpoint or the error
    if is_main_process():
        try:
            found[0] = _latest_whole(work_dir) if source == "auto" else _whole(source)
        except CheckpointError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    checkpoint, error = found
    if error is not None:
        raise CheckpointError(error)
    if checkpoint is not None and not is_main_process():
        _check_state(checkpoint)
    return checkpoint


def _latest_whole(work_dir: str) -> str | None:
    latest = find_latest_checkpoint(work_dir)
    if latest is None:
        return None
    others = [p for p in Path(latest).parent.glob("*.pth") if re.fullmatch(r"(iter|epoch)_\d+", p.stem)]
    others.sort(key=lambda p: p.stat().st_mtime, reverse=True)
    errors = []
    for path in (latest, *(str(p) for p in others if p != Path(latest))):
        try:
            found = _whole(path)
        except CheckpointError as error:
            errors.append(error)
        else:
            for error in errors:
                print_log(f"{error}: this run goes on from {path}", "current", logging.WARNING)
            return found
    raise CheckpointError(f"{errors[0]}; none of the {len(errors) - 1} beside it is whole either")


def _whole(path: str) -> str:
    _check_state(path)
    check_complete(path)
    return path


def _check_state(path: str) -> None:
    """Raise CheckpointError unless a run can be resumed from `path`, and without running code.

    mmengine falls back to unpickling without restriction, so this comes first.
    """
    meta = read_checkpoint(path).rest.get("meta")
    if not isinstance(meta, Mapping) or "iter" not in meta:
        raise CheckpointError(f"{path} holds no state of a run; give a checkpoint that tools/train.py wrote")


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
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
class StopOnSignalHook(Hook):
    """On SIGTERM or SIGUSR1 finish the step, save, and exit with `EXIT_RETRY`: `--resume` goes on from there.

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
        hooks = [hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook)]
        if hooks:
            runner.logger.info(f"{signal.Signals(number).name}: saved {hooks[0].save_now(runner)}; --resume goes on")
        raise SystemExit(EXIT_RETRY)

    def _receive(self, number: int, _: Any) -> None:
        self._received = number


@HOOKS.register_module()
class NonFiniteLossHook(Hook):
    """Stop when the loss is no finite number, and name the images.

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
        what = f"the loss of step {runner.iter + 1} is {loss.item()}; images: {_images(data_batch)}"
        if self.in_a_row == self.patience:
            raise TrainingError(
                f"{what}. {self.in_a_row} such steps in a row. Look at these images and their annotations, lower "
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


def _images(data_batch: Any) -> str:
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


@FUNCTIONS.register_module()
def start_worker(_: int, *, rank: int) -> None:
    """Seed a data worker, and have it ignore the signals of `StopOnSignalHook`.

    A scheduler sends them to every process of a job, and without workers the run could not finish the step and save.
    """
    seed_everything(torch.initial_seed(), rank)
    for number in StopOnSignalHook.signals:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """Kill what multiprocessing would end by the signal that data workers ignore, and then wait for."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


WORKER_TIMEOUT = 600
"""Seconds after which a data worker that gives nothing counts as hanging."""


def add_fault_tolerance(cfg: Config, *, non_finite_steps: int = 1) -> None:
    """Put the hooks and the loop of this module into `cfg` where it has mmengine's own or none.

    Args:
        non_finite_steps: of `NonFiniteLossHook`; 0 stands for None.
    """
    register_backend("local", AtomicLocalBackend, force=True, prefixes="")
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    hooks = cfg.get("default_hooks") or {}
    if (hooks.get("checkpoint") or {}).get("type") == "CheckpointHook":
        hooks["checkpoint"]["type"] = "AtomicCheckpointHook"
    present = [hook["type"] for hook in cfg.get("custom_hooks") or ()]
    ours = (dict(type="StopOnSignalHook"), dict(type="NonFiniteLossHook", patience=non_finite_steps or None))
    added = [hook for hook in ours if hook["type"] not in present]
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or ()), *added]
    loop = cfg.get("train_cfg") or {}
    if loop.get("type") == "EpochBasedTrainLoop" or loop.get("by_epoch"):
        loop.pop("by_epoch", None)
        loop["type"] = "ResumableEpochLoop"
    loader = cfg.get("train_dataloader") or {}
    if loader.get("num_workers"):
        loader.setdefault("timeout", WORKER_TIMEOUT)
        loader.setdefault("worker_init_fn", dict(type="start_worker", rank=get_rank()))
