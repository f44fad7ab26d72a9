"""What the command lines in tools/ share: arguments, configuration, and errors as one sentence."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, DictAction
from mmengine.dist import init_dist, is_distributed
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial.convert.converter import to_mmdet
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.engine.fault_tolerance import check_complete
from pe_spatial.errors import ConfigError, DatasetError, TrainingError

SWAP_OPTIONS = ("layers", "adapter", "strides", "channels", "preset", "checkpoint", "lr")
_OURS = (CheckpointError, ConfigError, DatasetError, TrainingError)


class _Options(DictAction):  # type: ignore[misc]
    """KEY=VALUE pairs; given twice, both count, so that a script can set some and its user others."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**before, **getattr(namespace, self.dest)})


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
        action=_Options,
        default={},
        metavar="KEY=VALUE",
        help="options of the config to replace, for instance model.backbone.variant=pe_spatial_s16_512",
    )
    result.add_argument("--launcher", choices=["none", "pytorch", "slurm", "mpi"], default="none")
    result.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")
    result.add_argument("--traceback", action="store_true", help="show where an error comes from")
    return result


def add_swap_arguments(result: argparse.ArgumentParser) -> None:
    """Add the options of a swap."""
    group = result.add_argument_group("swap")
    group.add_argument("--layers", type=_numbers, metavar="5,8,11", help="blocks of the encoder to read, 0-based")
    group.add_argument("--adapter", choices=["simple", "fused", "single"], help="how maps become levels (simple)")
    group.add_argument("--strides", type=_numbers, metavar="8,16,32", help="of the maps, if they cannot be found out")
    group.add_argument("--channels", type=_numbers, metavar="256,512,1024", help="of the maps, with --strides")
    group.add_argument("--preset", choices=["vitdet", "release", "timm"], help="geometry of the encoder (vitdet)")
    group.add_argument("--checkpoint", help="of the encoder (released); none for random weights")
    group.add_argument("--lr", type=float, help="learning rate (the original's if it suits AdamW, or 1e-4)")


def swap_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `plan_swap` that were given."""
    options = {name: getattr(args, name) for name in SWAP_OPTIONS if getattr(args, name) is not None}
    if options.get("checkpoint") == "none":
        options["checkpoint"] = None
    return options


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def read_config(name: str) -> Config:
    """Read a config: a file, or one that a package brings, such as mmdet::detr/detr_r50_8xb2-150e_coco.py."""
    with _as_config_error(name):
        return Config.fromfile(installed_config(name))


def config_in(checkpoint: str) -> Config:
    """Return the config that tools/train.py wrote into a checkpoint; CheckpointError if there is none."""
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
        raise ConfigError(f"{name} is in no installed package: {package!r} cannot be imported")
    file = Path(spec.origin).parent / ".mim" / "configs" / path
    if not file.is_file():
        near = difflib.get_close_matches(file.name, [p.name for p in file.parent.glob("*.py")], n=3)
        folder = "" if file.parent.is_dir() else f", which has no folder {Path(path).parent}"
        hint = f"; it has {', '.join(near)}" if near else ""
        raise ConfigError(f"{package} brings no config {path}{folder}{hint}")
    return str(file)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config and apply the arguments that all tools have."""
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    with _as_config_error(args.config):
        cfg = read_config(args.config)
        if getattr(args, "swap", None):
            from pe_spatial.integrations.swap.policy import swap_backbone  # needs MMDetection

            cfg = swap_backbone(cfg, args.swap, **swap_options(args))
        elif hasattr(args, "swap") and swap_options(args):
            raise ConfigError(f"--{', --'.join(SWAP_OPTIONS)} belong to --swap VARIANT, which is missing")
        if args.data_root is not None:
            move_data_root(cfg, args.data_root)
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / Path(args.config).stem)
    return cfg


def start_processes(cfg: Config) -> None:
    """Let the processes of a launcher find one another, if they have not; without a GPU they talk through gloo."""
    launcher = cfg.get("launcher", "none")
    if launcher == "none" or is_distributed():
        return
    if launcher == "pytorch" and not torch.cuda.is_available():  # where mmengine would ask for a driver
        torch.distributed.init_process_group("gloo")
    else:
        init_dist(launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))


def build_runner(cfg: Config) -> Runner:
    """Build the runner that the config asks for."""
    start_processes(cfg)
    if is_distributed() and not torch.cuda.is_available() and "runner_type" not in cfg:
        unused = cfg.get("find_unused_parameters", False)
        wrapper = dict(device_ids=None, broadcast_buffers=False, find_unused_parameters=unused)
        cfg.setdefault("model_wrapper_cfg", dict(type="MMDistributedDataParallel", **wrapper))
    if cfg.get("runner_type") == "ShardedRunner":
        import pe_spatial.engine.fsdp  # noqa: F401  (registers; needs a newer torch than the rest)
    elif cfg.get("sharded_checkpoints"):
        raise ConfigError("sharded_checkpoints=True belongs to runner_type=ShardedRunner; set it, or leave this out")
    with _as_config_error(cfg.filename):
        return RUNNERS.build(cfg) if "runner_type" in cfg else Runner.from_cfg(cfg)


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
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if hasattr(model, "load_encoder"):  # nothing but an encoder: its file, of any layout, or 'released'
            model.load_encoder(source)
            runner.logger.info(f"Load encoder from {source}")
            return {}
        path = locate(source)
        check_complete(path)
        file = read_checkpoint(path)
        if "parts" in file.rest:
            raise CheckpointError(f"{path} has its weights in parts; run tools/consolidate_checkpoint.py {path} FILE")
        checkpoint = {**file.rest, "state_dict": to_mmdet(file)}
        runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
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


def explain_failure(cfg: Config, step: int, error: RuntimeError) -> RuntimeError:
    """Return the error of a training step as a sentence with the options that mend it, if it is a known one."""
    text = str(error)
    loader = cfg.train_dataloader
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        encoder = next(_encoders(cfg.model, "model", initialised=False), "model.backbone")
        return TrainingError(
            f"out of memory in step {step}: lower train_dataloader.batch_size (now {loader.get('batch_size')}; "
            f"optim_wrapper.accumulative_counts makes up for it), set {encoder}.grad_checkpointing=True, use --amp, or "
            f"smaller images; tools/plan.py {cfg.filename} says what a step takes"
        )
    if "DataLoader timed out" in text:
        return TrainingError(
            f"step {step} waited {loader.get('timeout')} s for a data worker: the storage hangs, or images take "
            "longer than that; look at the storage, raise train_dataloader.timeout, or set num_workers=0 to see where"
        )
    return error


def _encoders(node: Any, place: str, *, initialised: bool = True) -> Iterator[str]:
    """Places of the encoders in a config; of those with init_cfg alone if `initialised`."""
    if isinstance(node, Mapping):
        encoder = node.get("type") in ("PerceptionEncoder", "PerceptionEncoderPyramid")
        if encoder and (node.get("init_cfg") or not initialised):
            yield place
        for key, value in node.items():
            yield from _encoders(value, f"{place}.{key}", initialised=initialised)


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
