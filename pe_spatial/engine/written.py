"""A changed config as a short file: it inherits the original and states what differs."""

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pe_spatial.atomic import write_file
from pe_spatial.engine.configs import read_config
from pe_spatial.integrations.swap.write import difference, plain, source

_OF_THE_START = ("launcher", "work_dir", "resume")
_SMALLEST = 80  # characters of a value that is worth a reference to the base config


def write_config(path: Path, cfg: Config, *, base: str, notes: Sequence[str] = ()) -> None:
    """Write `cfg` as a file that inherits `base` and equals `cfg` when it is read.

    Args:
        path: file to write.
        cfg: a merged config that was made from `base`.
        base: name of the original config, as `read_config` takes it.
        notes: sentences for the comment at the top.
    """
    original = read_config(base)
    inherited = base if "::" in base else os.path.relpath(Path(base).resolve(), path.resolve().parent)
    comments = [f"# {line}" for note in notes for line in textwrap.wrap(note, 114)]
    wanted = _compared(cfg)
    before = {key: value for key, value in original.to_dict().items() if key not in _OF_THE_START}
    changes = difference(before, {key: value for key, value in cfg.to_dict().items() if key not in _OF_THE_START})
    lines = [*comments, "", f"_base_ = {inherited!r}", ""]
    lines += _assignments(changes, before)
    write_file(path, "\n".join(lines) + "\n")
    try:
        same = _compared(Config.fromfile(path, import_custom_modules=False)) == wanted
    except Exception:  # of a base with lazy imports, or values that have no source
        same = False
    if not same:
        complete = Config({key: value for key, value in cfg.to_dict().items() if key not in _OF_THE_START})
        write_file(path, "\n".join([*comments, "", complete.pretty_text]))


def _assignments(changes: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Return one statement for each changed key; values that the base has, or that stand above, are named."""
    references = {f"_base_.{key}": plain(value) for key, value in before.items() if key.isidentifier()}
    references = {
        name: value
        for name, value in references.items()
        if isinstance(value, Mapping | list) and len(repr(value)) >= _SMALLEST and name[7:] not in changes
    }
    lines: list[str] = []
    for key, value in changes.items():
        old = plain(before.get(key))
        first = next(other for other, x in changes.items() if x == value and plain(before.get(other)) == old)
        if first != key and isinstance(value, Mapping):
            lines.append(f"{key} = {first}")
        else:
            place = (f"_base_.{key}", before.get(key))
            lines.append(f"{key} = {source(value, references=references, place=place)}")
    return lines


def _compared(cfg: Config) -> Any:
    return _lists({key: value for key, value in cfg.to_dict().items() if key not in (*_OF_THE_START, "filename")})


def _lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _lists(one) for key, one in value.items() if key not in ("_scope_",)}
    if isinstance(value, list | tuple):
        return [_lists(one) for one in value]
    return value
