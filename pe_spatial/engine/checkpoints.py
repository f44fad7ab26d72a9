"""Checkpoints that are complete or absent, and the one that a run resumes from."""

import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list, is_main_process
from mmengine.fileio.backends import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MMLogger
from mmengine.registry import HOOKS
from mmengine.runner import Runner, find_latest_checkpoint

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.files import CheckpointError, read_checkpoint
from pe_spatial.encoder.lora import has_adapters


class AtomicLocalBackend(LocalBackend):
    """mmengine's local files, written beside their place and renamed: a kill leaves the old file or the new one."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes; the folder is created if it does not exist."""
        with atomic_write(filepath) as unfinished, open(unfinished, "wb") as file:
            file.write(obj)
            file.flush()
            os.fsync(file.fileno())

    def put_text(self, obj: str, filepath: str | Path, encoding: str = "utf-8") -> None:
        """Write text as `put` does."""
        self.put(obj.encode(encoding), filepath)


def check_complete(path: str | Path) -> None:
    """Raise CheckpointError if a checkpoint is truncated or holds other bytes than were written.

    torch.save writes a zip file with the CRC-32 of every record, which torch.load ignores: it accepts weights with
    flipped bits. Files of other formats hold no checksum and pass. Takes 0.3 s per GB.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises many types for broken files
        damaged = str(error) or type(error).__name__
    if damaged is not None:
        raise CheckpointError(
            f"{path} is damaged: its bytes differ from those that were written ({damaged}). Use an older checkpoint, "
            "or copy the file again."
        )


def find_checkpoint(source: str, work_dir: str) -> str | None:
    """Return a checkpoint that a run can resume from, the same on all processes; None if the run has none yet.

    The first process reads the complete file, the others check that it is there.

    Args:
        source: a file, a folder whose latest one is taken, or 'auto' for the latest one of `work_dir`. If that is
            damaged, the next older one beside it is used, with a warning: after a crash a run resumes without a person.
        work_dir: of the run.

    Raises CheckpointError, on all processes, if the file or all of them are damaged or hold no state of a run.
    """
    result: list[str | None] = [None, None]  # the checkpoint or the error
    if is_main_process():
        try:
            result[0] = _latest_complete(work_dir) if source == "auto" else _named(source)
        except CheckpointError as error:
            result[1] = str(error)
    broadcast_object_list(result)
    checkpoint, message = result
    if message is not None:
        raise CheckpointError(message)
    if checkpoint is not None and not is_main_process():
        _steps(checkpoint)
    return checkpoint


def _named(source: str) -> str:
    if not os.path.isdir(source):
        return _checked(source)
    latest = _latest_complete(source)
    if latest is None:
        raise CheckpointError(f"{source} has no checkpoint to resume from; give a .pth file, or the folder of a run")
    return latest


def _latest_complete(folder: str) -> str | None:
    """Return the checkpoint that `last_checkpoint` names, or the one with most steps, or the next one that is complete.

    The file names it by the path that it had when it was written, but the folder may have moved since.
    """
    record = Path(folder, "last_checkpoint")
    named = record.read_text().strip() if record.is_file() else ""
    recorded = next((p for p in (Path(named), Path(folder, re.split(r"[/\\]", named)[-1])) if p.is_file()), None)
    files = list((recorded.parent if recorded else Path(folder)).glob("[!.]*.pth"))
    files = [p for p in files if not p.name.startswith("best_")] or files  # weights alone are refused by name
    errors, latest_first = [], sorted(files, key=_order, reverse=True)
    for path in ([recorded] if recorded else []) + [p for p in latest_first if p != recorded]:
        try:
            checkpoint = _checked(str(path))
        except CheckpointError as error:
            errors.append(error)
            continue
        for skipped in errors:
            MMLogger.get_current_instance().warning(f"{skipped} This run resumes from {path}.")
        return checkpoint
    if errors:
        others = f" The {len(errors) - 1} others beside it cannot be used either." if len(errors) > 1 else ""
        raise CheckpointError(f"{errors[0]}{others}")
    if any(Path(folder).glob("*/*.log")):
        text = f"--resume: {folder} has logs of an earlier run but no checkpoint, so this one starts from the beginning"
        MMLogger.get_current_instance().warning(text)
    return None


def _order(path: Path) -> float:
    """Return the steps of a checkpoint, because copies have any times; one that cannot be read counts as the latest."""
    try:
        return _steps(path)
    except CheckpointError:
        return float("inf")


def _checked(path: str) -> str:
    _steps(path)
    check_complete(path)
    return path


def _steps(path: str | Path) -> int:
    """Return the number of steps of a checkpoint; CheckpointError unless a run can be resumed from it.

    This runs no code.
    """
    rest = read_checkpoint(path, in_parts=True).rest
    meta = rest.get("meta")
    if not isinstance(meta, Mapping) or "iter" not in meta or "optimizer" not in rest:
        raise CheckpointError(
            f"{path} holds no state of a run (step and optimizer), so none can be resumed from it; to start a new one "
            f"from its weights, use --cfg-options load_from={path} without --resume"
        )
    return meta["iter"]


@HOOKS.register_module()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, in an order that never leaves a run without a complete checkpoint.

    mmengine removes the oldest file first, then writes the new one, then records which is the latest; a kill in between
    can leave nothing, or the name of an incomplete file. Here the new file is complete before its name is recorded and
    an old one is removed. The next start removes the files of interrupted writes.
    """

    def before_train(self, runner: Runner) -> None:
        """Find the folder as mmengine does, and remove unfinished files from it."""
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
        saved = dict(save_optimizer=self.save_optimizer, save_param_scheduler=self.save_param_scheduler)
        options = dict(self.args, **saved, meta=meta, by_epoch=self.by_epoch, backend_args=self.backend_args)
        runner.save_checkpoint(self.out_dir, name, self.file_client_args, **options)
        if not is_main_process():
            return
        AtomicLocalBackend().put_text(self.last_ckpt, os.path.join(runner.work_dir, "last_checkpoint"))
        for old in outdated:
            path = self.file_backend.join_path(self.out_dir, self.filename_tmpl.format(old))
            if self.file_backend.isfile(path):
                self.file_backend.remove(path)

    def save_now(self, runner: Runner, steps: int) -> str:
        """Save after `steps` training steps, in addition to the regular checkpoints, and return the path."""
        name = f"iter_{steps}.pth"
        meta = dict(epoch=runner.epoch, iter=steps)
        runner.save_checkpoint(self.out_dir, name, meta=meta, by_epoch=False, backend_args=self.backend_args)
        path = self.file_backend.join_path(self.out_dir, name)
        if is_main_process():
            AtomicLocalBackend().put_text(path, os.path.join(runner.work_dir, "last_checkpoint"))
        return str(path)


@HOOKS.register_module()
class ResumeWithoutPretrained(Hook):
    """Let a run that resumes start without the released weights: its checkpoint overwrites them anyway.

    Only adapters need the weights that they were trained on.
    """

    def before_run(self, runner: Runner) -> None:
        """Mark what loads released weights as initialized if a checkpoint is going to be resumed; that happens next."""
        if has_adapters(runner.model):
            return
        if runner.cfg.get("resume") and (runner.cfg.get("load_from") or find_latest_checkpoint(runner.work_dir)):
            for module in runner.model.modules():
                if getattr(module, "loads_released_weights", False):
                    module.is_init = True
