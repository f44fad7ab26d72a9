"""Arguments that several commands share."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

CONFIG_HELP = "config file, or a config of an installed package: pe_spatial::NAME.py, mmdet::folder/name.py"
SWAP_OPTIONS = ("layers", "adapter", "strides", "channels", "geometry", "checkpoint", "lr")


class _Options(argparse.Action):
    """KEY=VALUE pairs. If the option is given twice, both count: a launch script's and its user's."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        for text in values:
            if "=" not in text:
                parser.error(f"{text!r} is not KEY=VALUE; positional arguments go before {option_string}")
        pairs = dict(text.split("=", 1) for text in values)
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **pairs})


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    replaced = (
        "options of the config to replace, for instance model.backbone.variant=pe_spatial_s16_512. Lists are KEY=1,2,3 "
        "or 'KEY=[1, 2, 3]'; text may have blanks: 'KEY=my data/a.json'; a key into a list of groups sets all of them, "
        "and with an index (bbox_head.0.num_classes) one"
    )
    parser.add_argument("--cfg-options", nargs="+", action=_Options, default={}, metavar="KEY=VALUE", help=replaced)


def add_config_arguments(
    parser: argparse.ArgumentParser, *, folder: str = "work_dirs/<name of the config>", several: bool = False
) -> None:
    """Add the config, or `configs` if there may be several, and the options that change it; for `load_config`."""
    if several:
        parser.add_argument("configs", nargs="+", metavar="config", help=CONFIG_HELP)
    else:
        parser.add_argument("config", help=CONFIG_HELP)
    parser.add_argument("--work-dir", help=f"folder to write (default: {folder})")
    parser.add_argument("--data-root", help="folder of the data; replaces data_root in the paths that start with it")
    add_cfg_options(parser)
    launchers = ["none", "pytorch", "slurm", "mpi"]
    parser.add_argument("--launcher", choices=launchers, default="none", help="how the processes were started")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="set by the launcher")


def add_data(parser: Any) -> None:
    """Add --data; `own_data.use_data` reads it."""
    own = (
        "own dataset for a config of detection or segmentation: a folder, JSON or YAML in the form of COCO, YOLO, "
        "Pascal VOC, LabelMe, LVIS or Objects365; classes, heads and evaluation follow (docs/own_data.md)"
    )
    parser.add_argument("--data", metavar="DATA", help=own)


def add_cache(parser: Any) -> None:
    """Add --cache-features and what belongs to it."""
    cached = "compute the features of the frozen encoder once, keep them in DIR, and train on them (docs/probing.md)"
    parser.add_argument("--cache-features", metavar="DIR", help=cached)
    dtypes = ["float32", "float16", "bfloat16", "int8"]
    parser.add_argument("--cache-dtype", choices=dtypes, help="type of the cached features (default: float32, exact)")
    views = "random augmentations of each image in the cache (default: 1 image without augmentation)"
    parser.add_argument("--cache-views", type=int, metavar="K", help=views)


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Add --verbose; `quiet_start` reads it."""
    parser.add_argument("--verbose", action="store_true", help="show everything that goes to the log file")


def quiet_start(args: argparse.Namespace) -> AbstractContextManager[Any]:
    """Return a context that shows only a summary of the start on the console, unless --verbose."""
    from pe_spatial.engine.console import QuietStart

    return nullcontext() if args.verbose else QuietStart()


def load_config(args: argparse.Namespace, cfg: Config | None = None) -> Config:
    """Read the config of `add_config_arguments`, or take `cfg` in its place, and apply the other arguments."""
    from pe_spatial.engine.configs import as_config_error, move_data_root, read_config
    from pe_spatial.engine.options import set_options

    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    with as_config_error(args.config):
        cfg = cfg or read_config(args.config)
        if args.data_root is not None:
            move_data_root(cfg, args.data_root)
        set_options(cfg, args.cfg_options)
    cfg.launcher = args.launcher
    name = Path(args.config.rpartition("::")[2]).stem
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("work_dirs") / name)
    return cfg


def without_prints() -> AbstractContextManager[Any]:
    """Return a context that drops what is printed: OpenMMLab's packages print which optional packages they lack."""
    return redirect_stdout(io.StringIO())


def import_quietly(package: str) -> None:
    """Import a package without what it prints."""
    with without_prints():
        importlib.import_module(package)


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add --device; `choose_device` reads it."""
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: the GPU if there is one)")


def choose_device(args: argparse.Namespace) -> str:
    """Return the device; ConfigError if torch cannot use it."""
    import torch

    from pe_spatial.errors import ConfigError

    if args.device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (AssertionError, RuntimeError) as error:  # without CUDA, without a driver, without this one
        text = f"--device is {args.device}, which cannot be used ({str(error).splitlines()[0]})"
        raise ConfigError(f"{text}; give cpu, or omit --device") from error
    return args.device


def add_swap_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("swap")
    group.add_argument("--layers", type=comma_separated, metavar="5,8,11", help="encoder layers (blocks), 0-based")
    group.add_argument("--adapter", choices=["simple", "fused", "single"], help="maps to levels (default: simple)")
    strides, channels = "strides of the backbone's maps, if not detected", "channels of the maps, with --strides"
    group.add_argument("--strides", type=comma_separated, metavar="8,16,32", help=strides)
    group.add_argument("--channels", type=comma_separated, metavar="256,512,1024", help=channels)
    group.add_argument("--geometry", choices=["vitdet", "release", "timm"], help="geometry of PE (default: vitdet)")
    group.add_argument("--checkpoint", help="weights of the encoder; none: random (default: released)")
    group.add_argument("--lr", type=float, help="learning rate (default: the original's if it suits AdamW, or 1e-4)")


def swap_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `plan_swap` that were given."""
    options = {name: getattr(args, name) for name in SWAP_OPTIONS if getattr(args, name) is not None}
    if options.get("checkpoint") == "none":
        options["checkpoint"] = None
    return options


VARIANT_HELP = """encoder: a name such as pe_spatial_b16_512, timm:NAME, or JSON: '{"img_size": 192, ...}'"""


def variant(text: str) -> str | dict[str, Any]:
    """Parse an encoder: a name, 'timm:NAME', or JSON with the fields of a custom one, '{"img_size": 192, ...}'."""
    if not text.startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error})") from None


def comma_separated(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not integers with commas between them, such as 5,8,11") from None


def batch(text: str) -> str | int:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither an integer nor auto") from None


def layers(text: str) -> str | list[int]:
    try:
        return text if text == "all" else comma_separated(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or all") from None


def given(args: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Return those of `names` that were given: an option that was not is None, False or empty; 0 was given."""
    values = ((name, getattr(args, name)) for name in names)
    return [name for name, value in values if value is not None and value is not False and value not in ([], {})]


def refuse(args: argparse.Namespace, *names: str, because: str) -> None:
    """Raise ConfigError for a given option that would have no effect; `because` ends before its name, with 'has no'."""
    from pe_spatial.errors import ConfigError

    if found := given(args, names):
        raise ConfigError(f"{because} --{found[0].replace('_', '-')}; omit it")


def refuse_for_exported(args: argparse.Namespace, *names: str) -> None:
    """Raise ConfigError for an option that an exported model does not have."""
    refuse(args, *names, because=f"{args.checkpoint} is an exported model, which has no")
