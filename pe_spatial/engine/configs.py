"""Reading of configs: files, configs of installed packages, configs in checkpoints."""

import ast
import difflib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.utils import import_modules_from_strings

from pe_spatial.encoder.files import CheckpointError, join_names, locate, read_checkpoint
from pe_spatial.engine.options import RUN_KEYS, places_of
from pe_spatial.engine.saved_config import parse_saved_config
from pe_spatial.errors import ConfigError, DatasetError, TrainingError


def read_config(name: str) -> Config:
    """Read a config file, or a config of an installed package such as mmdet::detr/detr_r50_8xb2-150e_coco.py."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # where custom_imports finds a user's modules, as with `python -m`
    with as_config_error(name):
        path = installed_config(name)
        if path == name:  # a config of one's own
            check_overrides(path)
        return Config.fromfile(path)


def config_in(checkpoint: str) -> Config:
    """Return the config that training wrote into a checkpoint; nothing of it runs, see `parse_saved_config`.

    Raises CheckpointError if there is none, and if it holds or names code.
    """
    meta = read_checkpoint(locate(checkpoint)).rest.get("meta")
    text = meta.get("cfg") if isinstance(meta, Mapping) else None
    if not isinstance(text, str):
        raise CheckpointError(f"{checkpoint} holds no config; name it with --config (in Python: config=)")
    try:
        values = parse_saved_config(text)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint} holds a config with {error}, which is not run; name a config that you trust with --config"
        ) from error
    import_modules_from_strings(**values.get("custom_imports") or {"imports": []})
    return Config(values)


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
    """Replace the config's `data_root` with `root` in every path that lies in it."""
    old = cfg.get("data_root")
    if not old:
        raise ConfigError("the config has no data_root at its top level that --data-root could replace; set the paths")
    if not root:
        raise ConfigError("--data-root is empty; give a folder, such as . for the current one")
    old, new = old.rstrip("/") + "/", os.path.expanduser(root).rstrip("/") + "/"

    def move(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: move(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(move, node))
        if not isinstance(node, str) or not f"{node}/".startswith(old):
            return node
        return new + node[len(old) :] if node.startswith(old) else new.rstrip("/")

    cfg.merge_from_dict(move(cfg.to_dict()))


def check_overrides(path: str) -> None:
    """Refuse a config file that sets a variable of its bases which nothing reads any more: it would change nothing."""
    try:
        body = ast.parse(Path(path).read_text(encoding="utf-8")).body
        targets = [(target, node.value) for node in body if isinstance(node, ast.Assign) for target in node.targets]
        assigned = {target.id: value for target, value in targets if isinstance(target, ast.Name)}
        bases = ast.literal_eval(assigned["_base_"])
    except (KeyError, SyntaxError, ValueError, OSError):
        return
    names = [node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Name)]
    unread = assigned.keys() - {node.id for node in names if isinstance(node.ctx, ast.Load)} - RUN_KEYS - {"_base_"}
    for base in [bases] if isinstance(bases, str) else bases:
        packaged = "::" in base
        base = installed_config(base) if packaged else str(Path(path).parent / base)
        if not packaged:
            check_overrides(base)
        inherited = Config.fromfile(base, import_custom_modules=False) if unread else {}
        for name in unread & set(inherited):
            cfg = Config.fromfile(path, import_custom_modules=False)
            used = list(places_of({key: value for key, value in cfg.items() if key != name}, inherited[name]))
            if inherited[name] != cfg[name] and used:
                raise ConfigError(
                    f"{path} sets {name}, which {base} has used already: this changes nothing in "
                    f"{join_names(used)}. Set those, or repeat in {Path(path).name} what uses {name}"
                )


def mixed_packages() -> str | None:
    """Name packages of OpenMMLab that are installed twice: its own and onedl-*, which write into the same folders."""
    ours = dict(mmdet="onedl-mmdetection", mmsegmentation="onedl-mmsegmentation", mmcv="onedl-mmcv")
    ours.update(mmengine="onedl-mmengine")
    names = {str(one.name).lower() for one in importlib.metadata.distributions()}
    mixed = [f"{theirs} and {onedl}" for theirs, onedl in ours.items() if {theirs, onedl} <= names]
    if not mixed:
        return None
    return f"{', '.join(mixed)} overwrite each other; pip uninstall all of them, then install pe_spatial[openmmlab]"


@contextmanager
def as_config_error(filename: str | None) -> Iterator[None]:
    """Turn the errors of a config that cannot be read or built into ConfigError; not those of files, which say more."""
    try:
        yield
    except (CheckpointError, ConfigError, DatasetError, TrainingError):
        raise
    except OSError as error:
        if error.strerror:  # of the system
            raise
        raise ConfigError(f"{filename} cannot be used: {' '.join(str(error).split())}") from error
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, SyntaxError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        mixed = mixed_packages() if isinstance(error, ImportError | AttributeError) else None
        text = mixed or " ".join(text.split()) or type(error).__name__
        raise ConfigError(f"{filename} cannot be used: {text}") from error
