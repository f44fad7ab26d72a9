"""Class names as a file of text embeddings, which detectors read as their classifier."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import ConfigError

from .model import PECore
from .protocol import check_names, class_embeddings


def names_of(source: str) -> tuple[str, ...]:
    """Return the class names of a COCO or LVIS json, by id as detectors number them, of a file with one per line, or of
    'a,b,c'.

    Underscores become blanks, and parentheses are left out: 'flag_(banner)' is 'flag banner'.
    """
    path = Path(source)
    if not path.is_file():
        if path.suffix in (".json", ".txt"):
            raise ConfigError(f"there is no file {path}; give names with commas, a text file, or annotations")
        return check_names(source.split(",") if source.strip() else [], "the list")
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        try:
            categories = sorted(json.loads(text)["categories"], key=lambda category: category["id"])
            names = [str(category["name"]) for category in categories]
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} has no categories; give annotations as COCO or LVIS write them") from None
    else:
        names = [line for line in text.splitlines() if line.strip()]
    return check_names([_cleaned(name) for name in names], str(path))


def _cleaned(name: str) -> str:
    return " ".join(name.replace("_", " ").translate(str.maketrans("", "", "()")).split())


def write_vocabulary(
    path: Path, model: PECore, names: Sequence[str], templates: Sequence[str], *, source: str = ""
) -> None:
    """Write the embeddings (C, D) of class names as .safetensors, with the names among its metadata."""
    from safetensors.torch import save_file

    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} should end in .safetensors")
    embeddings = class_embeddings(model, names, templates).cpu().contiguous()
    facts = {"names": json.dumps(list(names)), "templates": json.dumps(list(templates)), "model": source}
    with atomic_write(path) as unfinished:
        save_file({"embeddings": embeddings}, unfinished, facts)
