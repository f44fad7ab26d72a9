"""Folders of predictions that a later call continues: what they depend on is recorded and compared."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pe_spatial.atomic import write_json
from pe_spatial.encoder.files import locate, split_entry
from pe_spatial.errors import ConfigError


def record_model(folder: Path, checkpoint: str | Path, *, overwrite: bool, **model: Any) -> None:
    """Write metadata.json into `folder`: the checkpoint, with its digest, and the options in `model`.

    Raises ConfigError if the folder holds predictions of another model and `overwrite` is False. A folder with nothing
    but metadata.json, of a call that failed before its first prediction, holds none.
    """
    digest = hashlib.sha256()
    with split_entry(locate(checkpoint))[0].open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    model = {"checkpoint": Path(checkpoint).name, "sha256": digest.hexdigest(), **model}
    path = folder / "metadata.json"
    if path.is_file() and not overwrite and any(other != path for other in folder.iterdir()):
        before = recorded(path, "model")
        names = ", ".join(key for key in model if before.get(key) != model[key])
        if names:
            raise ConfigError(f"{folder} holds predictions with another {names}; choose another --out, or --overwrite")
    write_json(path, {"model": model})


def recorded(path: Path, key: str) -> Any:
    """Return an entry of a metadata.json; ConfigError for a file that another command wrote, or that is damaged."""
    try:
        return dict(json.loads(path.read_text())[key])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(f"{path} is not of such predictions; choose another --out") from None
