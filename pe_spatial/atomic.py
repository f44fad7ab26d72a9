"""Files and folders that are complete or as they were before, whenever the process that writes them dies."""

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
    unfinished = _temporary(path)
    try:
        unfinished.touch()
        mode = unfinished.stat().st_mode
        yield unfinished
        unfinished.chmod(mode)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write `value` as JSON; the file is complete or absent."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(json.dumps(value, indent=1))


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`, which becomes `path` if the block succeeds.

    If the block fails, or if `path` exists by then and is not empty (OSError), the temporary folder is removed. A
    process that is killed leaves it behind: `.<name>.*` beside `path`.
    """
    unfinished = _temporary(path)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        os.rename(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _temporary(path: str | Path) -> Path:
    """Name a hidden sibling of `path` that no other process uses, and create the parent folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.{os.environ.get('RANK', 0)}{path.suffix}")
