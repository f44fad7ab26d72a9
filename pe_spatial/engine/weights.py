"""Weights that a run starts from or is evaluated with: checked before anything is built, counted, never run."""

import copy
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner.checkpoint import load_state_dict
from torch import nn

from pe_spatial.atomic import atomic_write
from pe_spatial.convert.converter import check_destination, to_mmdet
from pe_spatial.encoder.checkpoint import mismatch, released_source
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint, split_entry, unwrap
from pe_spatial.encoder.lora import is_adapter, merge_adapters
from pe_spatial.encoder.lora_files import add_base
from pe_spatial.encoder.unpickling import explain, unpickle
from pe_spatial.engine.checkpoints import check_complete
from pe_spatial.engine.summary import encoders
from pe_spatial.errors import TrainingError

_SHARE = 0.5
"""Share of a model's values that a checkpoint to start from must have; `load_from_share` of a config replaces it."""


def _method(owner: Any, name: str) -> Any:
    """Replace getattr in pickles, by which a HistoryBuffer names its own methods."""
    if owner is not HistoryBuffer or name.startswith("_"):
        raise ValueError(f"getattr of {name}")
    return getattr(HistoryBuffer, name)


_method.__module__, _method.__name__, _method.__qualname__ = "builtins", "getattr", "getattr"
_dtypes = {type(np.dtype(name)) for name in ("bool", "int32", "int64", "uint8", "uint32", "float32", "float64")}


def _of_any_numpy(function: Any) -> list[Any]:
    """Return a function of numpy under the names that it has in numpy 1 and in numpy 2."""
    both = []
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        alias = partial(function)
        alias.__module__, alias.__name__, alias.__qualname__ = module, function.__name__, function.__name__  # type: ignore[attr-defined]
        both.append(alias)
    return both


_REAL = [
    HistoryBuffer,
    _method,
    np.ndarray,
    np.dtype,
    *_of_any_numpy(np.zeros(1).__reduce__()[0]),  # _reconstruct
    *_of_any_numpy(np.float64(0).__reduce__()[0]),  # scalar
    *_dtypes,
]


def load_from_file(filename: str, map_location: Any = None) -> Any:
    """Read a checkpoint for mmengine, with the state of a run, from a file or an http address; code never runs.

    mmengine's own reader tries this first and then reads the file without any restriction.
    """
    path = locate(Path(filename).expanduser() if "://" not in filename else filename)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; give the path of a .pth file")
    try:
        return unpickle(path, real=_REAL, map_location=map_location)
    except Exception as error:  # of pickle, zipfile and torch
        raise CheckpointError(explain(path, error)) from error


def read_safely() -> None:
    """Let mmengine read every checkpoint, whoever asks for it, through `load_from_file`."""
    CheckpointLoader.register_scheme(prefixes=("", "http://", "https://"), loader=load_from_file, force=True)


def check_weights(source: str | None) -> None:
    """Raise CheckpointError if the weights are missing or damaged; mmengine's own addresses and plain names pass."""
    if not source or ("://" in source and not source.startswith(("hf://", "http://", "https://", "package://"))):
        return
    path, _ = split_entry(locate(source))
    if path.is_file():
        check_complete(path)
    elif path.suffix or os.sep in str(path):  # others are names, such as 'released'
        raise CheckpointError(f"no checkpoint at {path}; download it, or give the path of a file that exists")


def load_weights(model: nn.Module, source: str | Path) -> dict[str, Any]:
    """Load weights of any layout into a model, strictly; return the checkpoint's other entries, such as 'meta'.

    Raises CheckpointError for a file that is missing or damaged, or that does not match the model.
    """
    path = locate(source)
    check_complete(split_entry(path)[0])
    file = read_checkpoint(path)
    try:
        state = unwrap(to_mmdet(file), model.state_dict())
        add_base(model, file.rest.get("meta"), {"": state}, path)
        load_state_dict(model, state, strict=True)
    except RuntimeError as error:
        raise _mismatch(path, error) from error
    return file.rest


def check_pretrained(cfg: Config) -> None:
    """Check the weights that encoders start from; released ones are downloaded now."""
    for place, options in encoders(cfg.get("model")):
        source, variant = (options.get("init_cfg") or {}).get("checkpoint"), options.get("variant")
        try:
            if source == "released" and isinstance(variant, str) and not variant.startswith("timm:"):
                source = released_source(variant, variant)
            check_weights(source)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error}, with --cfg-options {place}.init_cfg.checkpoint=FILE; "
                f"or train from random weights on purpose with --cfg-options {place}.init_cfg=None"
            ) from error


def load_strictly(runner: Runner) -> None:
    """Let `runner` refuse a checkpoint that does not match; mmengine would load what matches and continue."""
    load = runner.load_checkpoint

    def strictly(filename: str, **options: Any) -> Any:
        try:
            return load(filename, **{**options, "strict": True})
        except TrainingError:
            raise
        except RuntimeError as error:
            raise _mismatch(filename, error) from error

    runner.load_checkpoint = strictly


def load_weights_of_any_layout(runner: Runner) -> None:
    """Let `runner` load weights alone, strictly: of our training, a safetensors file, a released detector."""

    def load(source: str, **_: Any) -> Any:
        model: Any = plain_model(runner.model)
        if hasattr(model, "load_encoder"):  # the model is an encoder: its file, in any layout, or 'released'
            model.load_encoder(source)
            runner.logger.info(f"Load encoder from {source}")
            return {}
        path, checkpoint = _read(runner, source)
        try:
            load_state_dict(model, checkpoint["state_dict"], strict=True)
        except RuntimeError as error:
            raise _mismatch(path, error) from error
        runner.logger.info(f"Load checkpoint from {path}")
        return checkpoint

    runner.load_checkpoint = load


def load_what_fits(runner: Runner) -> None:
    """Let `runner` load the weights of `load_from` that its model has too, in name and shape, and say which did not.

    Raises CheckpointError, when the run starts, if they are less than half of the model's values, or than the config's
    `load_from_share`.
    """

    def load(source: str, **_: Any) -> Any:
        path, checkpoint = _read(runner, source)
        model = plain_model(runner.model)
        state, expected = checkpoint["state_dict"], model.state_dict()
        fits = [name for name, value in expected.items() if name in state and state[name].shape == value.shape]
        share = sum(expected[name].numel() for name in fits) / max(sum(x.numel() for x in expected.values()), 1)
        problems = mismatch(state, expected)
        text = f"{len(fits)} of {len(expected)} tensors of the model, {share:.0%} of the values, are in {path}"
        if share < runner.cfg.get("load_from_share", _SHARE):
            raise CheckpointError(
                f"{text}. {problems}. Give a checkpoint of this model as load_from, or start from less on purpose with "
                "--cfg-options load_from_share=0"
            )
        passed = {name: x for name, x in state.items() if name not in expected or x.shape == expected[name].shape}
        load_state_dict(model, passed, strict=False, logger="silent")
        (runner.logger.warning if problems else runner.logger.info)(f"{text}. {problems}".removesuffix(" "))
        runner._has_loaded = True
        return checkpoint

    runner.load_checkpoint = load


def _read(runner: Runner, source: str) -> tuple[Path, dict[str, Any]]:
    """Read weights under the names of the runner's model; its hooks see them as mmengine's do."""
    path = locate(source)
    check_complete(split_entry(path)[0])
    file = read_checkpoint(path, in_parts=hasattr(type(runner), "checkpoint_file"))
    checkpoint = {**file.rest, "state_dict": unwrap(to_mmdet(file), plain_model(runner.model).state_dict())}
    if "parts" in checkpoint:  # the runner reads them when it calls the hooks
        runner.checkpoint_file = file.path
    runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
    return path, checkpoint


def plain_model(model: Any) -> nn.Module:
    """Return a model without the wrappers of distributed training and of test-time augmentation."""
    model = model.module if is_model_wrapper(model) else model
    return model.module if isinstance(model, BaseTTAModel) else model


def merge_checkpoint(cfg: Config, source: str, target: str | Path) -> int:
    """Write the weights of a checkpoint with adapters as those of a plain model, with its config; return their number.

    Raises CheckpointError for a checkpoint without adapters, or whose base is not that of `cfg`.
    """
    check_destination(target, source)
    path = locate(source)
    file = read_checkpoint(path)
    if not any(map(is_adapter, file.state)):
        raise CheckpointError(f"{path} holds no LoRA adapters: it never had any, or they are merged already")
    init_default_scope(cfg.get("default_scope", "mmengine"))
    model = MODELS.build(copy.deepcopy(cfg.model))  # MMDetection writes into it
    rest = load_weights(model, path)
    merge_adapters(model)
    plain = Config(_without_lora(cfg.to_dict()), format_python_code=False)
    meta = {name: value for name, value in rest.get("meta", {}).items() if name != "lora"}
    with atomic_write(target) as unfinished:
        torch.save(dict(state_dict=model.state_dict(), meta=meta | dict(cfg=plain.pretty_text)), unfinished)
    return len(model.state_dict())


def _without_lora(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {key: _without_lora(value) for key, value in node.items() if key != "lora"}
    return type(node)(map(_without_lora, node)) if isinstance(node, list | tuple) else node


def _mismatch(path: object, error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"{path} does not match the model of this config: {' '.join(str(error).split())[:400]} ...")
