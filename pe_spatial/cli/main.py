"""The console command pe-spatial; tools/NAME.py calls the same function."""

import argparse
import difflib
import errno
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pe_spatial


@dataclass(frozen=True)
class Command:
    """One line of help and the extras of setup.cfg that a command needs beside torch."""

    help: str
    extras: tuple[str, ...] = ("openmmlab",)

    def missing_extras(self) -> list[str]:
        """Return the extras that are not installed."""
        return [extra for extra in self.extras if not all(map(importlib.util.find_spec, MODULES[extra]))]


MODULES = {
    "openmmlab": ("mmengine", "mmcv", "mmdet", "mmseg"),
    "sam2": ("sam2",),
    "app": ("gradio",),
    "language": ("open_clip",),
    "images": ("numpy", "PIL", "cv2", "matplotlib", "tqdm"),
}
"""The modules by which an installed extra is recognized."""

COMMANDS = {
    "train": Command("train a detector, a depth model, a segmenter or a tracker"),
    "test": Command("evaluate a checkpoint; write or draw its predictions"),
    "analyze": Command("explain results of detection, depth or video masks in one HTML file; compare two"),
    "demo": Command("render a synthetic dataset, then train, evaluate and draw a small detector on it"),
    "browse": Command("draw a dataset, or what a config makes of it, with boxes, masks and statistics"),
    "swap_backbone": Command("replace the backbone of an MMDetection or MMSegmentation config with PE"),
    "check_swap": Command("try the swap on every model family of MMDetection and MMSegmentation"),
    "convert_checkpoint": Command("convert a checkpoint between pe_spatial, OpenMMLab, Detectron2, timm and Meta", ()),
    "consolidate_checkpoint": Command("merge a sharded checkpoint into one file"),
    "merge_lora": Command("merge LoRA adapters into a plain checkpoint"),
    "doctor": Command("show what is installed, which features work, and what to install for the others", ()),
    "plan": Command("estimate memory, FLOPs and time of a training before it starts"),
    "sweep_layers": Command("find the best layer of a frozen encoder for a task"),
    "geometry": Command("find the geometry, image size and layer that suit your images, and what they cost"),
    "show_features": Command("show the features of images and videos: colors, similarity, attention", ("images",)),
    "zero_shot": Command("classify, retrieve and search images and videos by words", ("images", "language")),
    "embed_classes": Command("write text embeddings of class names for open-vocabulary detectors", ("language",)),
    "predict": Command("predict images, folders, videos and cameras with any trained model"),
    "export": Command("export a model for other runtimes, with a certificate that it computes the same", ()),
    "infer_depth": Command("predict the depth of images, folders and videos"),
    "prepare_nyu": Command("check a download of NYU Depth v2"),
    "eval_vos": Command("score video object masks (J&F)"),
    "track_zero_shot": Command("track objects from a first mask with frozen features, without training"),
    "track": Command("track objects in a video from clicks, boxes and masks", ("openmmlab", "sam2")),
    "label": Command("label the objects of a video from a few prompts; write a dataset", ("openmmlab", "sam2")),
    "app": Command("show models in the browser: detect, depth, track, label, features, compare", ("openmmlab", "app")),
    "render_synthetic": Command("render the synthetic RGB-D dataset"),
}


def main(argv: Sequence[str] | None = None, command: str | None = None) -> None:
    """Run `COMMAND arguments...`; errors that the user can fix end in one sentence on stderr and exit code 1."""
    argv = sys.argv[1:] if argv is None else argv
    name, *rest = [command, *argv] if command else argv or ["--help"]
    if name in ("-h", "--help"):
        print(_overview())
        return
    if name == "--version":
        print(f"pe_spatial {pe_spatial.__version__}")
        return
    name = name.replace("-", "_")
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        print(f"error: pe-spatial has no command {name!r}.{hint} See pe-spatial --help.", file=sys.stderr)
        sys.exit(2)
    missing = COMMANDS[name].missing_extras()
    if missing and not {"-h", "--help"} & set(rest):
        sys.exit(f"error: {name} {_how_to_install(missing)}; pe-spatial doctor shows what is installed")
    args = build_parser(name).parse_args(rest)
    warnings.filterwarnings("ignore", category=UserWarning, module="mmcv|mmdet|mmseg")  # about their own code
    with errors_as_sentences(traceback=args.traceback):
        _module(name).run(args)


def run_command(name: str, argv: Sequence[str], **values: Any) -> None:
    """Run a command inside another one; `values` are parsed arguments."""
    args = build_parser(name).parse_args(argv)
    for key, value in values.items():
        setattr(args, key, value)
    _module(name).run(args)


@contextmanager
def errors_as_sentences(*, traceback: bool) -> Iterator[None]:
    """End the process with one sentence and exit code 1 at an error that the user can fix; quietly at Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # of `pe-spatial ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        from pe_spatial.errors import ConfigError, DatasetError, TrainingError

        ours = isinstance(error, (ConfigError, DatasetError, TrainingError, *_checkpoint_error()))
        system = error.strerror if isinstance(error, OSError) else None
        if isinstance(error, ImportError) and not (error.name or "").startswith("pe_spatial") and not traceback:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            sys.exit(f"error: {reason}; pe-spatial doctor shows what is missing, --traceback where it is imported")
        if traceback or not (ours or system or (isinstance(error, OSError) and "DataLoader worker" in str(error))):
            raise
        if isinstance(error, OSError) and system:
            where = f"{error.filename}: " if error.filename else ""
            remedy = REMEDIES.get(error.errno or 0, "check the path, or give another one")
            sys.exit(f"error: {where}{system}; {remedy}")
        # A data loader's worker hands its error over with the traceback in the text; the sentence is its last line.
        kind = type(error)
        sentence = str(error).strip().splitlines()[-1].removeprefix(f"{kind.__module__}.{kind.__name__}: ")
        sys.exit(f"error: {sentence}")


def _checkpoint_error() -> tuple[type[Exception], ...]:
    """Return the encoder's error, which needs torch; without torch nothing raises it."""
    if "torch" not in sys.modules:
        return ()
    from pe_spatial.encoder.files import CheckpointError

    return (CheckpointError,)


REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space, or write to another folder"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give another folder, or change its permissions"),
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files: ulimit -n 65536"),
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that says where arguments belong which a list option took."""

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        try:
            return super()._get_values(action, arg_strings)
        except argparse.ArgumentError as error:
            if action.option_strings and action.nargs in ("+", "*"):
                error.message += f"; positional arguments go before {action.option_strings[0]}"
            raise


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show the default of every option that has one, unless its help says it in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or "default:" in text or default in ({}, [], (), argparse.SUPPRESS):
            return text
        if default is None or default is False:
            return text
        return f"{text} (default: {' '.join(map(str, default)) if isinstance(default, list | tuple) else default})"


def build_parser(name: str) -> argparse.ArgumentParser:
    module = _module(name)
    parser = Parser(prog=f"pe-spatial {name}", description=module.__doc__, formatter_class=HelpFormatter)
    module.add_arguments(parser)
    parser.add_argument("--traceback", action="store_true", help="show the traceback of an error")
    return parser


def _module(name: str) -> Any:
    return importlib.import_module(f"pe_spatial.cli.{name}")


def _how_to_install(extras: list[str]) -> str:
    return f"needs pip install 'pe_spatial[{','.join(extras)}]'"


def _overview() -> str:
    lines = ["usage: pe-spatial COMMAND ...", "", "Meta's Perception Encoder for dense prediction.", ""]
    width = max(map(len, COMMANDS))
    for name, command in COMMANDS.items():
        missing = command.missing_extras()
        note = f" ({_how_to_install(missing)})" if missing else ""
        lines.append(f"  {name:<{width}}  {command.help}{note}")
    return "\n".join([*lines, "", "pe-spatial COMMAND --help shows the arguments of a command."])
