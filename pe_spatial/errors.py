"""Errors that a user can fix. Commands print them as one sentence; `CheckpointError` belongs to the encoder."""

import operator
from collections.abc import Sequence
from typing import Any


class ConfigError(ValueError):
    """A configuration that cannot be read or built; the message says what came and what is allowed."""


class DatasetError(ValueError):
    """Input data that cannot be used; the message names the file and the remedy, on one line."""


class TrainingError(RuntimeError):
    """A run that cannot continue; the message names the step and what to change, on one line."""


def one_of(name: str, value: Any, allowed: Sequence[Any]) -> Any:
    """Return `value`; ConfigError if it is not one of `allowed`."""
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")
    return value


def listed(values: Sequence[Any], limit: int = 5) -> str:
    """Return the first `limit` values, separated by commas, and the number of the others."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(map(str, values[:limit])) + more


def integer(name: str, value: Any) -> int:
    """Return `value` as an int; TypeError for floats, texts and truth values."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}; give an integer") from None
