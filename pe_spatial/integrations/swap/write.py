"""A swapped config as a file that inherits the original and states what changed."""

import textwrap
from collections.abc import Mapping, Sequence
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
        if key in before and plain(old) == plain(new):
            continue
        if not isinstance(new, Mapping) or key not in before:
            out[key] = plain(new)
        elif not isinstance(old, Mapping) or set(old) - set(new) or old.get("type") != new.get("type"):
            out[key] = {"_delete_": True, **plain(new)}
        else:
            out[key] = difference(old, new)
    return out | {key: None for key in before if key not in after}


def plain(value: Any) -> Any:
    """Return a config as dicts, lists and tuples."""
    if isinstance(value, Mapping):
        return {key: plain(x) for key, x in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [plain(x) for x in value] if isinstance(value, list) else tuple(plain(x) for x in value)
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
    lines += ["", f"_base_ = {base!r}", "", *(f"{key} = {source(value)}" for key, value in changes.items())]
    return "\n".join(lines) + "\n"


def source(
    value: Any,
    indent: int = 0,
    room: int = 100,
    *,
    references: Mapping[str, Any] | None = None,
    place: tuple[str, Any] = ("", None),
) -> str:
    """Return Python source with `dict(...)`, and with one entry per line where it does not fit on one.

    Args:
        value: the value.
        indent, room: columns before it, and columns on its line.
        references: values by name; equal ones inside `value` are written as the name.
        place: name of the value that this one replaces, and that value: the entries of a list that only get other
            numbers or texts refer to it.
    """
    options: dict[str, Any] = dict(references=references)
    name, old = place
    if isinstance(value, Mapping):
        items = {
            key: _reference(x, references)
            or source(
                x,
                indent + 4,
                room - len(key if isinstance(key, str) and key.isidentifier() else repr(key)),
                place=(f"{name}.{key}", old.get(key)) if isinstance(old, Mapping) else ("", None),
                **options,
            )
            for key, x in value.items()
        }
        words = all(isinstance(key, str) and key.isidentifier() for key in value)
        entries = [f"{key}={text}" if words else f"{key!r}: {text}" for key, text in items.items()]
        ends = ("dict(", ")") if words else ("{", "}")
    elif isinstance(value, list | tuple):
        update = _common_update(value, old) if name else None
        if update:
            return f"[dict(one, {', '.join(f'{key}={x!r}' for key, x in update.items())}) for one in {name}]"
        entries = [_reference(x, references) or source(x, indent + 4, **options) for x in value]
        ends = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
    else:
        return repr(value)
    line = ends[0] + ", ".join(entries) + ends[1]
    if len(line) + indent <= room and "\n" not in line:
        return line
    pad = "\n" + " " * (indent + 4)
    return ends[0] + pad + f",{pad}".join(entries) + ends[1]


def _reference(value: Any, references: Mapping[str, Any] | None) -> str | None:
    if not references or not isinstance(value, Mapping | list):
        return None
    return next((name for name, other in references.items() if other == value), None)


def _common_update(new: Sequence[Any], old: Any) -> dict[str, Any] | None:
    """Return the numbers and texts that every dict of `new` has in place of those in `old`; None for other changes."""
    if not isinstance(new, list) or not isinstance(old, list | tuple) or len(new) != len(old) or not new:
        return None
    if not all(isinstance(x, Mapping) for x in (*new, *old)):
        return None
    pairs = list(zip(old, new, strict=True))
    updates = [{key: x for key, x in b.items() if key not in a or plain(a[key]) != plain(x)} for a, b in pairs]
    scalar = all(isinstance(x, int | float | str | None) for x in updates[0].values())
    kept = all(set(a) <= set(b) for a, b in pairs)
    return updates[0] if scalar and kept and updates[0] and all(one == updates[0] for one in updates) else None
