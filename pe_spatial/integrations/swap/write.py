"""A swapped config as a file that inherits the original and states what changed."""

import textwrap
from collections.abc import Mapping
from typing import Any

from mmengine.config import Config

from pe_spatial.errors import ConfigError
from pe_spatial.integrations.swap.policy import Swap

_COMMENT: dict[str, Any] = {"initial_indent": "# ", "subsequent_indent": "# "}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config that inherits `before` must state to equal `after`.

    A mapping that loses a key, or changes its type, is stated completely, with `_delete_`. A key that is lost at the
    top level, where nothing can be deleted, becomes None.
    """
    out: dict[str, Any] = {}
    for key, new in after.items():
        old = before.get(key)
        if key in before and _plain(old) == _plain(new):
            continue
        if not isinstance(new, Mapping) or not isinstance(old, Mapping):
            out[key] = _plain(new)
        elif set(old) - set(new) or old.get("type") != new.get("type"):
            out[key] = {"_delete_": True, **_plain(new)}
        else:
            out[key] = difference(old, new)
    return out | {key: None for key in before if key not in after}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value] if isinstance(value, list) else tuple(_plain(x) for x in value)
    return value


def write_swapped(cfg: Config, swap: Swap, *, base: str, variant: str) -> str:
    """Return the text of a config that inherits `base`, the file of `cfg`, and states what the swap changed.

    Raises ConfigError for configs with lazy imports, which other configs cannot inherit by name.
    """
    if not isinstance(cfg.model.get("type"), str) or "<" in repr(cfg.model.get("type")):
        raise ConfigError(
            f"{base} uses classes as types, and a config cannot inherit such a file; swap it in memory with "
            "pe-spatial train CONFIG --swap VARIANT"
        )
    name = base.rpartition("::")[2] if "::" in base else base.rpartition("/")[2]
    maps = ", ".join(f"{c} at stride {s}" for c, s in swap.feature_specs)
    unused = f"; no head reads those at {list(swap.unused)}, so they have no parameters" if swap.unused else ""
    lines = [f"# {name} with {variant} as its backbone."]
    lines += textwrap.wrap(f"Its maps have the channels of those they replace: {maps}{unused}.", 116, **_COMMENT)
    for note in swap.notes:
        lines += textwrap.wrap(f"Note: {note}.", 116, **_COMMENT)
    changes = difference(cfg.to_dict(), swap.cfg.to_dict())
    lines += ["", f"_base_ = {base!r}", "", *(f"{key} = {_source(value)}" for key, value in changes.items())]
    return "\n".join(lines) + "\n"


def _source(value: Any, indent: int = 0, room: int = 100) -> str:
    """Return Python source with `dict(...)`, and with one entry per line where it does not fit on one."""
    if isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value):
        entries, ends = [f"{key}={_source(x, indent + 4, room - len(key))}" for key, x in value.items()], ("dict(", ")")
    elif isinstance(value, Mapping):
        entries = [f"{key!r}: {_source(x, indent + 4, room - len(repr(key)))}" for key, x in value.items()]
        ends = ("{", "}")
    elif isinstance(value, list | tuple):
        entries = [_source(x, indent + 4) for x in value]
        ends = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
    else:
        return repr(value)
    line = ends[0] + ", ".join(entries) + ends[1]
    if len(line) + indent <= room and "\n" not in line:
        return line
    pad = "\n" + " " * (indent + 4)
    return ends[0] + pad + f",{pad}".join(entries) + ends[1]
