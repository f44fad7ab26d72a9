"""Reading of configs: files, configs of installed packages, configs in checkpoints."""

import difflib
import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.errors import ConfigError, DatasetError, TrainingError


def read_config(name: str) -> Config:
    """Read a config file, or a config of an installed package such as mmdet::detr/detr_r50_8xb2-150e_coco.py."""
    with as_config_error(name):
        return Config.fromfile(installed_config(name))


def config_in(checkpoint: str) -> Config:
    """Return the config that training wrote into a checkpoint; CheckpointError if there is none."""
    meta = read_checkpoint(locate(checkpoint)).rest.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{checkpoint} holds no config; name it with --config")
    return Config.fromstring(text, ".py")


def installed_config(name: str) -> str:
    """Return the path of package::folder/name.py; other names are returned as they are."""
    package, mark, path = name.partition("::")
    if not mark:
        return name
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{name} cannot be found: the package {package!r} is not installed")
    file = Path(spec.origin).parent / ".mim" / "configs" / path
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=3)
        folder = "" if file.parent.is_dir() else f", and no folder {Path(path).parent}"
        hint = f"; similar names: {', '.join(near)}" if near else ""
        raise ConfigError(f"{package} has no config {path}{folder}{hint}")
    return str(file)


def move_data_root(cfg: Config, root: str) -> None:
    """Replace the config's `data_root` with `root` in every path that starts with it."""
    old = cfg.get("data_root")
    if not old:
        raise ConfigError("the config has no data_root at its top level that --data-root could replace; set the paths")
    new = root.rstrip("/") + "/"

    def move(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: move(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(move, node))
        return new + node[len(old) :] if isinstance(node, str) and node.startswith(old) else node

    cfg.merge_from_dict(move(cfg.to_dict()))


@contextmanager
def as_config_error(filename: str | None) -> Iterator[None]:
    """Turn the errors of a config that cannot be read or built into ConfigError."""
    try:
        yield
    except (CheckpointError, ConfigError, DatasetError, TrainingError):
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, SyntaxError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise ConfigError(f"{filename} cannot be used: {' '.join(text.split()) or type(error).__name__}") from error
