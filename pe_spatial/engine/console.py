"""What a run shows on the console until it starts: its summary and warnings. The log file has everything else."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, TextIO

from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.runner import Runner
from tqdm import tqdm

PACKAGE = str(Path(__file__).resolve().parents[1])
NOISE = ("deprecated", "is skipped since", "prefix is not set")
"""Warnings of mmengine that tell a user nothing, by a part of the text."""

TWICE = ("Exp name: ", "_mAP_copypaste: ")
"""Lines of mmengine and MMDetection that repeat what others say, by a part of the text."""

_active: QuietStart | None = None


class _Lines(io.TextIOBase):
    """A stream that logs what is printed, line by line."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("stdout")
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._logger.info(line)
        return len(text)


class QuietStart(AbstractContextManager["QuietStart"]):
    """Keep the console short until the first iteration of the run that is built inside.

    Of the loggers it shows warnings and what this package logs; afterwards everything. What libraries print, and their
    Python warnings, go to the log file all the time. `stdout` is the console itself.
    """

    def __enter__(self) -> QuietStart:
        global _active
        _active = self
        self.started = False
        self.stdout: TextIO = sys.stdout
        self._bar: tqdm[Any] | None = None
        self._undo: list[Callable[[], None]] = []
        # It holds the records until there is a log file.
        self._file = MemoryHandler(1_000_000, flushLevel=logging.CRITICAL + 1)
        sys.stdout = _Lines()
        logging.captureWarnings(True)
        warnings = logging.StreamHandler(sys.stderr)
        warnings.setLevel(logging.WARNING)
        warnings.addFilter(lambda record: record.name != "py.warnings" or record.getMessage().startswith(PACKAGE))
        for name in ("stdout", "py.warnings", "pe_spatial"):
            logger = logging.getLogger(name)
            self._undo.append(partial(logger.setLevel, logger.level))
            logger.setLevel(logging.INFO)
            self._add(logger, self._file)
            if name != "stdout":
                self._add(logger, warnings)
        default = MMLogger.get_current_instance()
        self._add(default, self._file)
        self._limit(default)
        return self

    def __exit__(self, *_: object) -> None:
        global _active
        _active = None
        self.advance(None)
        sys.stdout = self.stdout
        logging.captureWarnings(False)
        for undo in self._undo:
            undo()
        self._file.close()

    def advance(self, runner: Runner | None, *, steps: int = 0) -> None:
        """Show a progress bar of the training if stderr is a terminal; None removes it."""
        if runner is not None and self._bar is None and sys.stderr.isatty() and is_main_process():
            total, start = runner.max_iters, runner.iter
            self._bar = tqdm(total=total, initial=start, desc="training", unit="step", leave=False, dynamic_ncols=True)
        if self._bar is None:
            return
        if runner is None:
            self._bar.close()
            self._bar = None
            return
        losses = runner.message_hub.log_scalars.get("train/loss")
        if steps and losses is not None:
            self._bar.set_postfix(loss=f"{losses.current():.4g}", refresh=False)
        self._bar.update(steps)

    def attach(self, logger: logging.Logger) -> None:
        """Limit what the logger of a run shows, and write into its file what was kept until now."""
        self._limit(logger)
        for handler in logger.handlers:
            if isinstance(handler, logging.FileHandler):
                self._file.setTarget(handler)
                self._file.flush()
                self._file.flushLevel = logging.NOTSET

    def _add(self, logger: logging.Logger, handler: logging.Handler) -> None:
        logger.addHandler(handler)
        self._undo.append(partial(logger.removeHandler, handler))

    def _limit(self, logger: logging.Logger) -> None:
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.stream = self.stdout
                handler.addFilter(self._is_shown)
                self._undo.append(partial(handler.removeFilter, self._is_shown))

    def _is_shown(self, record: logging.LogRecord) -> bool:
        if self._bar is not None:
            if "(train)" in record.getMessage():
                return False
            self._bar.clear()  # the next step draws it again, below the line
        if any(text in record.getMessage() for text in TWICE):
            return False
        if self.started or record.pathname.startswith(PACKAGE):
            return True
        return record.levelno >= logging.WARNING and not any(text in record.getMessage() for text in NOISE)


class QuietStartMixin:
    """For runners: obey the `QuietStart` inside which they are built."""

    def build_logger(self, *args: Any, **options: Any) -> MMLogger:
        """Build the logger of a run as mmengine does."""
        logger = super().build_logger(*args, **options)  # type: ignore[misc]
        if _active:
            _active.attach(logger)
        return logger

    def call_hook(self, fn_name: str, **options: Any) -> None:
        """As in Runner; the first iteration ends the silence."""
        if fn_name in ("before_train_iter", "before_val_iter", "before_test_iter") and _active:
            _active.started = True
        super().call_hook(fn_name, **options)  # type: ignore[misc]
        if _active and fn_name in ("before_train_iter", "after_train_iter", "after_train"):
            ended = fn_name == "after_train"
            _active.advance(None if ended else self, steps=fn_name == "after_train_iter")
