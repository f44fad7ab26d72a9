"""The runner of a config: how it is built, what it loads, and what its errors mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import init_dist, is_distributed
from mmengine.model import is_model_wrapper
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial.convert.converter import to_mmdet
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint
from pe_spatial.engine.checkpoints import check_complete
from pe_spatial.engine.configs import as_config_error
from pe_spatial.errors import ConfigError, TrainingError


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
    with as_config_error(cfg.filename):
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
            raise CheckpointError(f"{path} has its weights in parts; run pe-spatial consolidate_checkpoint {path} FILE")
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
            f"smaller images; pe-spatial plan {cfg.filename} says what a step takes"
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
