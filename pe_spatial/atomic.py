"""Files and folders that are complete or as they were before, whenever the process that writes them dies."""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces `path` if the block succeeds and is removed if it fails.

    The parent folder is created. The temporary name is hidden and keeps the suffix, by which some libraries choose a
    format. The file gets the permissions of a new file, even from libraries that restrict theirs (safetensors).
    """
    with _named(path), _temporary(path) as unfinished:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, path)


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write bytes, or text in UTF-8, as `atomic_write` does."""
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON; the file is complete or absent."""
    write_file(path, json.dumps(value, indent=1))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which becomes `path` if the block succeeds.

    If the block fails, or if `path` exists by then and is not empty (OSError), the temporary folder is removed. A
    process that is killed leaves it behind: `.<name>.*` beside `path`.
    """
    with _named(path), _temporary(path) as unfinished:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        yield unfinished
        os.rename(unfinished, path)


@contextmanager
def _temporary(path: str | Path) -> Iterator[Path]:
    """Yield a hidden sibling of `path` that no other process uses, in a folder that exists; remove it at the end."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.{os.environ.get('RANK', 0)}{path.suffix}")
    try:
        yield unfinished
    finally:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)


@contextmanager
def _named(path: str | Path) -> Iterator[None]:
    """Let errors of the file system name `path`: a full disk names nothing, and others the temporary file."""
    try:
        yield
    except OSError as error:
        name = str(error.filename or path)  # None, a parent, the temporary file, or a file that the block reads
        if error.errno is None or not (str(path).startswith(name) or Path(path).name in name):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
    except RuntimeError as error:
        if not any(text in str(error) for text in ("PytorchStreamWriter", "inline_container", "iostream error")):
            raise
        raise OSError(errno.ENOSPC, "cannot be written completely", str(path)) from error
