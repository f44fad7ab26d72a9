"""Describe a conversion as a table."""

import re
from collections.abc import Iterable

from pe_spatial.convert.converter import Conversion

# all blocks, layers or stages, and all tensors of a layer, share one line of the table
_NUMBER = re.compile(
    r"(?:(?<=blocks\.)|(?<=head\.)|(?<=predictor\.)|(?<=coder\.layers\.)|(?<=embed\.)|(?<=branches\.))\d+(?=\.)"
)
_TENSOR = re.compile(r"(?<=[._])(weight|bias|cos|sin)$")


def _grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[int, str, str]]:
    """Merge rows that differ only in the block, the stage or the tensor of a layer into (how many, name, text)."""
    groups: dict[tuple[str, ...], list[tuple[str, str]]] = {}
    for row in rows:
        number, tensor = _NUMBER.search(row[0]), _TENSOR.search(row[0])
        key = tuple(_TENSOR.sub("{tensor}", _NUMBER.sub("{number}", cell)) for cell in row)
        groups.setdefault(key, []).append((number[0] if number else "", tensor[0] if tensor else ""))
    merged = []
    for key, members in groups.items():
        names = list(dict.fromkeys(name for _, name in members))
        tensors = names[0] if len(names) == 1 else f"{{{','.join(names)}}}"
        numbers = _spans({int(digits) for digits, _ in members if digits})
        name, text = (cell.replace("{number}", numbers).replace("{tensor}", tensors) for cell in key)
        merged.append((len(members), name, text))
    return merged


def _spans(numbers: set[int]) -> str:
    """{0, 1, 2, 5} -> '{0-2,5}', {0} -> '0'."""
    starts, ends = (sorted(n for n in numbers if n + step not in numbers) for step in (-1, 1))
    text = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
    return text if len(numbers) == 1 else f"{{{text}}}"


def _section(title: str, rows: Iterable[tuple[str, str]], between: str) -> list[str]:
    groups = _grouped(rows)
    width = max((len(name) for _, name, _ in groups), default=0)
    lines = [f"  {count:>4}  {name:<{width}} {between} {text}" for count, name, text in groups]
    return [f"{title}: {sum(count for count, _, _ in groups) or 'none'}", *lines]


def report(conversion: Conversion) -> str:
    """Return a table of the conversion, grouped over blocks."""
    same = sum(before == after for before, after in conversion.renamed.items())
    rope = [] if conversion.rope is None else [f"rotary tables: {conversion.rope}"]
    return "\n".join(
        [
            *_section("renamed", ((a, b) for a, b in conversion.renamed.items() if a != b), "->"),
            f"kept under their names: {same}",
            *_section("dropped", conversion.dropped.items(), ":"),
            *_section("added", conversion.added.items(), ":"),
            *_section("resized", conversion.resized.items(), ":"),
            *rope,
            *(f"note: {note}" for note in conversion.notes),
        ]
    )
