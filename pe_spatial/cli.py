"""What the command lines in tools/ share: arguments, configuration, and errors as one sentence."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial.conversion import to_mmdet
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.errors import ConfigError, DatasetError

_OURS = (CheckpointError, ConfigError, DatasetError)


def parser(description: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that all tools have."""
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("config", help="configuration file")
    result.add_argument("--work-dir", help="folder for logs and checkpoints (default work_dirs/<name of the config>)")
    result.add_argument(
        "--data-root", help="folder of the data; moves every path that begins with the config's data_root"
    )
    result.add_argument(
        "--cfg-options",
        nargs="+",
        action=DictAction,
        default={},
        metavar="KEY=VALUE",
        help="options of the config to replace, for instance model.backbone.variant=pe_spatial_s16_512",
    )
    result.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    result.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")
    result.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return result


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments that all tools have."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    with _as_config_error(args.config):
        cfg = Config.fromfile(args.config)
        if args.data_root is not None:
            move_data_root(cfg, args.data_root)
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    return cfg


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config asks for."""
    with _as_config_error(cfg.filename):
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


def check_training_checkpoint(path: str) -> None:
    """Raise CheckpointError unless a run can be resumed from `path`, and without running code.

    mmengine falls back to unpickling without restriction, so this comes first.
    """
    meta = read_checkpoint(path).rest.get("meta")
    if not isinstance(meta, Mapping) or "iter" not in meta:
        raise CheckpointError(f"{path} holds no state of a run; give a checkpoint that tools/train.py wrote")


def load_strictly(runner: Runner) -> None:
    """Have `runner` refuse a checkpoint that does not fit; mmengine would take what happens to fit and go on."""
    load = runner.load_checkpoint

    def strictly(filename: str, **options: Any) -> Any:
        try:
            return load(filename, **{**options, "strict": True})
        except RuntimeError as error:
            raise _no_checkpoint_of(filename, error) from error

    runner.load_checkpoint = strictly


def load_weights_of_any_layout(runner: Runner) -> None:
    """Have `runner` take weights alone, strictly: tools/train.py's, a safetensors file's, a Detectron2 detector's."""

    def load(source: str, **_: Any) -> Any:
        path = locate(source)
        file = read_checkpoint(path)
        checkpoint = {**file.rest, "state_dict": to_mmdet(file)}
        runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        try:
            load_state_dict(model, checkpoint["state_dict"], strict=True)
        except RuntimeError as error:
            raise _no_checkpoint_of(path, error) from error
        runner.logger.info(f"Load checkpoint from {path}")
        return checkpoint

    runner.load_checkpoint = load


def _no_checkpoint_of(path: object, error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"{path} is no checkpoint of this config: {' '.join(str(error).split())[:400]} ...")


def run(main: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run `main`; errors that the user can mend end in one sentence on stderr and exit code 1."""
    try:
        main(args)
    except _OURS as error:
        if args.traceback:
            raise
        # A data loader's worker hands its error over with the traceback in the text; the sentence is its last line.
        kind = type(error)
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        sys.exit(f"error: {sentence}")


def explain_missing_weights(cfg: Config, error: CheckpointError) -> CheckpointError:
    """Add to a checkpoint's error the options of this config that mend it."""
    place = next(_encoders(cfg.model, "model"), None)
    if place is None:
        return error
    return CheckpointError(
        f"{error}, with --cfg-options {place}.init_cfg.checkpoint=FILE; "
        f"or start from random weights on purpose with --cfg-options {place}.init_cfg=None"
    )


def _encoders(node: Any, place: str) -> Iterator[str]:
    if isinstance(node, Mapping):
        if node.get("type") in ("PerceptionEncoder", "PerceptionEncoderPyramid") and node.get("init_cfg"):
            yield place
        for key, value in node.items():
            yield from _encoders(value, f"{place}.{key}")


def move_data_root(cfg: Config, root: str) -> None:
    """Put every path that begins with the config's `data_root` below `root` instead."""
    old = cfg.get("data_root")
    if not old:
        raise ConfigError("it has no data_root at its top level that --data-root could move; set the paths themselves")
    new = root.rstrip("/") + "/"

    def move(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: move(value) for key, value in node.items()}
        if isinstance(node, list | tuple):
            return type(node)(map(move, node))
        return new + node[len(old) :] if isinstance(node, str) and node.startswith(old) else node

    cfg.merge_from_dict(move(cfg.to_dict()))


@contextmanager
def _as_config_error(filename: str | None) -> Iterator[None]:
    try:
        yield
    except _OURS:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, ImportError, SyntaxError) as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        raise ConfigError(f"{filename} cannot be used: {' '.join(text.split()) or type(error).__name__}") from error
