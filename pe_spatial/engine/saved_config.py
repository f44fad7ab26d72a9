"""A config that training saved inside a checkpoint, read as data: a checkpoint comes from anywhere, so nothing runs."""

import ast
import math
from collections.abc import Iterator, Mapping
from typing import Any

from pe_spatial.encoder.files import join_names

_SCOPES = ("pe_spatial", "mmengine", "mmcv", "mmdet", "mmseg", "mmpretrain")
"""Packages whose modules and registries a saved config may name."""

_CONSTANTS = {"inf": math.inf, "nan": math.nan}


def parse_saved_config(text: str) -> dict[str, Any]:
    """Return the values of a config as mmengine writes it (`Config.pretty_text`): assignments of plain values.

    Raises ValueError for anything else, and for values that name code outside of `_SCOPES`: mmengine imports
    `custom_imports` and calls what a `type` of several dotted parts names, whatever it is.
    """
    values: dict[str, Any] = {}
    try:
        for statement in ast.parse(text).body:
            if not (isinstance(statement, ast.Assign) and all(isinstance(t, ast.Name) for t in statement.targets)):
                raise ValueError(f"more than plain values (line {statement.lineno})")
            values |= dict.fromkeys((target.id for target in statement.targets), value_of(statement.value))  # type: ignore[attr-defined]
    except (SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError(f"more than plain values ({type(error).__name__})") from error
    if "_base_" in values:
        raise ValueError("more than plain values (_base_)")
    foreign = sorted(set(_foreign_code(values)))
    if foreign:
        raise ValueError(f"names of code in other packages ({join_names(foreign)})")
    return values


def value_of(node: ast.expr) -> Any:
    """Return the value of an expression of literals and dict(...); ValueError for any other."""
    match node:
        case ast.Constant(value=value):
            return value
        case ast.List(elts=items):
            return [value_of(item) for item in items]
        case ast.Tuple(elts=items):
            return tuple(value_of(item) for item in items)
        case ast.Set(elts=items):
            return {value_of(item) for item in items}
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {value_of(key): value_of(value) for key, value in zip(keys, values, strict=True) if key is not None}
        case ast.Call(func=ast.Name(id="dict"), args=[], keywords=words) if all(word.arg for word in words):
            return {word.arg: value_of(word.value) for word in words}
        case ast.Call(func=ast.Name(id="dict"), args=[ast.Dict() as pairs], keywords=[]):
            return value_of(pairs)
        case ast.Call(func=ast.Name(id="set"), args=[], keywords=[]):
            return set()
        case ast.Name(id="inf" | "nan" as name):
            return _CONSTANTS[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() | complex() as number)):
            return -number
        case ast.UnaryOp(op=ast.USub(), operand=ast.Name(id="inf")):
            return -math.inf
    raise ValueError(f"more than plain values (line {node.lineno})")


def _foreign_code(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        kind, imports = node.get("type"), node.get("custom_imports")
        if isinstance(kind, str) and "." in kind and (kind.count(".") > 1 or kind.partition(".")[0] not in _SCOPES):
            yield kind
        names = imports.get("imports", ()) if isinstance(imports, Mapping) else imports or ()
        for name in [names] if isinstance(names, str) else names:
            if str(name).partition(".")[0] not in _SCOPES:
                yield str(name)
        node = node.values()
    elif not isinstance(node, list | tuple | set):
        return
    for child in node:
        yield from _foreign_code(child)
