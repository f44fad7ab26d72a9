"""Options KEY=VALUE of the command line. What a value means depends on what the config has at its key."""

import ast
import copy
import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.runner import Runner

from pe_spatial.engine.saved_config import value_of
from pe_spatial.errors import ConfigError

RUN_KEYS = frozenset(inspect.signature(Runner).parameters) | {
    "auto_scale_lr", "compile", "custom_imports", "find_unused_parameters", "load_from_share", "model_wrapper_cfg",
    "param_scheduler", "runner_type", "sharded_checkpoints", "sync_bn", "tta_evaluator", "tta_model", "tta_pipeline",
}  # fmt: skip
"""The keys at the top level of a config that a run reads; others are variables of the file."""

_TEXT_KEYS = re.compile(r"(name|file|root|dir|path|prefix|checkpoint|load_from)$")
_NUMBER = re.compile(r"[-+]?(((0|[1-9]\d*)(\.\d*)?|\.\d+)(e[-+]?\d+)?|inf)", re.IGNORECASE)
_WORDS = {"true": True, "false": False}
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def set_options(cfg: Config, options: Mapping[str, str]) -> None:
    """Set options in the order in which they were typed; ConfigError for a key or a value that cannot be meant.

    - A key into a list without an index, such as `model.roi_head.bbox_head.num_classes`, sets all that have it.
    - Text stays as it was typed where the config has text, and for names of files and folders: blanks, commas and
      leading zeros too. Only a plain word such as 'vitdet' can be replaced by a number.
    - Where the config has a number, a truth value or a list, so must the value be.
    - Elsewhere (None, or a new key), numbers, true, false, None, `1,2`, `[1,2]`, `(1,2)`, `{'a': 1}` and `dict(a=1)`
      are read.
    - One pair of quotes around a value is removed; what is in quotes is text.
    - Where the test is the validation, as in most configs, it stays so: `val_*` sets `test_*` too.
    """
    same = [part for part in ("dataloader", "evaluator") if cfg.get(f"test_{part}") == cfg.get(f"val_{part}")]
    for key, text in options.items():
        for path, old in _places(cfg, key):
            try:
                value = _read(text, old, path[-1])
            except ValueError as error:
                raise ConfigError(f"{key}={text}: {error}") from None
            cfg[path[0]] = _assign(cfg.get(path[0]), path[1:], value)
    for part in same:
        if f"val_{part}" in cfg and not any(key.startswith(f"test_{part}") for key in options):
            cfg[f"test_{part}"] = copy.deepcopy(cfg[f"val_{part}"])


def places_of(node: Any, value: Any, place: str = "") -> Iterator[str]:
    """Yield the keys below `node` that hold `value`; for text also those that begin with it."""
    if isinstance(node, Mapping | list | tuple) and node != value:
        for key, child in node.items() if isinstance(node, Mapping) else enumerate(node):
            yield from places_of(child, value, f"{place}.{key}" if place else str(key))
    elif node == value or (isinstance(node, str) and isinstance(value, str) and value and node.startswith(value)):
        yield place


def _places(cfg: Config, key: str) -> list[tuple[list[str], Any]]:
    """Return (path, present value or None) of every place that `key` stands for."""
    places: list[tuple[list[str], Any]] = [([], cfg)]
    parts = key.split(".")
    if parts[0] in cfg and parts[0] not in RUN_KEYS:
        _check_variable(cfg, parts[0])
    for part in parts:
        places = [found for path, node in places for found in _step(path, node, part)]
    return places


def _step(path: list[str], node: Any, part: str) -> list[tuple[list[str], Any]]:
    name = ".".join(path)
    if isinstance(node, list | tuple):
        if part.lstrip("-").isdigit():
            if not -len(node) <= int(part) < len(node):
                raise ConfigError(f"{name}.{part}: {name} has {len(node)} elements, 0 to {len(node) - 1}")
            return [([*path, part], node[int(part)])]
        groups = [(i, one) for i, one in enumerate(node) if isinstance(one, Mapping)]
        having = [([*path, str(i), part], one[part]) for i, one in groups if part in one]
        if not having:
            keys = {key for _, one in groups for key in one}
            raise ConfigError(
                f"{name}.{part}: none of the {len(node)} elements of {name} has {part}{_nearest(part, keys)}; "
                f"name one element by its index to add a key: {name}.0.{part}"
            )
        return having
    if node is None:
        return [([*path, part], None)]
    if not isinstance(node, Mapping | Config):
        raise ConfigError(f"{name}.{part}: {name} is {node!r}, not a group of options")
    if part not in node:
        known = set(node) if path else {*node, *RUN_KEYS}
        near = _nearest(part, known, cutoff=0.79 if path else 0.6)  # below the top level, new keys are normal
        if part not in known and (near or not path):
            where = f"in {name}" if path else "at its top level"
            raise ConfigError(f"{'.'.join([*path, part])}: the config has no {part} {where}{near}")
        return [([*path, part], None)]
    return [([*path, part], node[part])]


def _nearest(part: str, known: set[str], cutoff: float = 0.6) -> str:
    near = difflib.get_close_matches(part, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def _check_variable(cfg: Config, name: str) -> None:
    """Refuse to set a variable of the config file: it was read when the file was."""
    used = list(places_of({key: value for key, value in cfg.items() if key != name}, cfg[name]))
    if used:
        more = f" and {len(used) - 3} more" if len(used) > 3 else ""
        remedy = "use --data-root" if name == "data_root" else "set those"
        raise ConfigError(
            f"{name} is a variable of the config file; setting it changes nothing in {', '.join(used[:3])}{more}, "
            f"which have its value: {remedy}"
        )


def _assign(node: Any, path: Sequence[str], value: Any) -> Any:
    """Return a copy of `node` that has `value` at `path`; configs share parts, so none is changed in place."""
    if not path:
        return value
    if isinstance(node, list | tuple):
        items = list(node)
        items[int(path[0])] = _assign(items[int(path[0])], path[1:], value)
        return type(node)(items)
    changed = ConfigDict() if node is None else copy.copy(node)
    changed[path[0]] = _assign(changed.get(path[0]), path[1:], value)
    return changed


def _read(text: str, old: Any, key: str) -> Any:
    """Read `text`, which replaces `old` at a key with this last part; ValueError if the two do not go together."""
    if text == "None":
        return None
    if isinstance(old, str | None) and _TEXT_KEYS.search(key):
        return _unquote(text)
    if isinstance(old, list | tuple):
        return _read_list(text, old)
    value = _literal(text)
    if isinstance(old, str):
        if isinstance(value, dict) or (
            text.strip()[:1] in _BRACKETS and (isinstance(value, list) or (isinstance(value, tuple) and value[1:]))
        ):
            return value
        is_plain = isinstance(value, int | float) and old.isidentifier() and not key.isdigit()
        return value if is_plain else _unquote(text)
    words = [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, str)]
    if words and not _is_quoted(text):
        if isinstance(old, bool):
            raise ValueError(f"the config has {old} there; give true or false (or text in quotes: \"'{text}'\")")
        if isinstance(old, int | float):
            raise ValueError(f"the config has the number {old} there; give a number (or text in quotes: \"'{text}'\")")
        if isinstance(old, Mapping):
            raise ValueError(f"the config has a group of options there ({', '.join(map(str, old))}); set one of them")
    if isinstance(old, bool) and value in (0, 1):
        return bool(value)
    if type(old) is int and isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _read_list(text: str, old: list[Any] | tuple[Any, ...]) -> Any:
    """Read a list of the kind of `old`, or a number or a plain word in its place."""
    body, items = text.strip(), None
    if body[:1] in ("[", "(") and body.endswith(_BRACKETS[body[0]]):
        items = _split(body[1:-1])
    if items is None:
        items = _split(body) or [body]
        if len(items) == 1 and not (old and isinstance(old[0], str)):
            value = _literal(body)
            if isinstance(value, str) and not value.isidentifier():
                raise ValueError(f"the config has the list {list(old)} there; give 1,2,3 or [1,2,3]")
            return value
    kinds = {type(one) for one in old}
    return type(old)(_read(item, old[0] if len(kinds) == 1 else None, "0") for item in items)


def _literal(text: str) -> Any:
    """Read a number, a truth value, None, a list or a dictionary; other text is returned as it was typed."""
    body = text.strip()
    if _is_quoted(body) and body[0] not in body[1:-1]:
        return body[1:-1]
    if _NUMBER.fullmatch(body):
        return float(body) if re.search("[.en]", body, re.IGNORECASE) else int(body)
    if body.lower() in _WORDS or body == "None":
        return _WORDS.get(body.lower())
    if body.startswith("dict(") and body.endswith(")"):
        try:
            return value_of(ast.parse(body, mode="eval").body)
        except (SyntaxError, ValueError):
            return text
    if body[:1] in _BRACKETS and body.endswith(_BRACKETS[body[0]]):
        if body[0] == "{":
            try:
                return ast.literal_eval(body)
            except (ValueError, SyntaxError):
                return text
        items = _split(body[1:-1])
        if items is not None:
            return (list if body[0] == "[" else tuple)(map(_literal, items))
    items = _split(body)
    if items and (len(items) > 1 or body.endswith(",")):
        values = [_literal(item) for item in items]
        if not re.search(r"[\s/\\]", body) or not any(isinstance(value, str) for value in values):
            return values
    return text


def _split(text: str) -> list[str] | None:
    """Split at the commas outside of brackets and quotes; None where those do not match."""
    items, item, closing, quote = [], "", [], ""
    for char in text:
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and not item.strip(" [({"):
            quote = char
        elif char in _BRACKETS:
            closing.append(_BRACKETS[char])
        elif closing and char == closing[-1]:
            closing.pop()
        elif char in "])}":
            return None
        elif char == "," and not closing:
            items.append(item.strip())
            item = ""
            continue
        item += char
    if closing or quote:
        return None
    return [*items, item.strip()] if item.strip() else items


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _unquote(text: str) -> str:
    return text[1:-1] if _is_quoted(text) else text
