"""Build the runner of a config, and load its weights."""

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
from pe_spatial.engine.console import QuietStartMixin
from pe_spatial.errors import ConfigError


class QuietRunner(QuietStartMixin, Runner):
    """mmengine's Runner under `QuietStart`."""


def start_processes(cfg: Config) -> None:
    """Connect the processes of a launcher unless they are connected; without a GPU they communicate through gloo."""
    launcher = cfg.get("launcher", "none")
    if launcher == "none" or is_distributed():
        return
    if launcher == "pytorch" and not torch.cuda.is_available():  # where mmengine would ask for a driver
        torch.distributed.init_process_group("gloo")
    else:
        init_dist(launcher, **cfg.get("env_cfg", {}).get("dist_cfg", {}))


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config."""
    start_processes(cfg)
    if is_distributed() and not torch.cuda.is_available() and "runner_type" not in cfg:
        unused = cfg.get("find_unused_parameters", False)
        wrapper = dict(device_ids=None, broadcast_buffers=False, find_unused_parameters=unused)
        cfg.setdefault("model_wrapper_cfg", dict(type="MMDistributedDataParallel", **wrapper))
    if cfg.get("runner_type") == "ShardedRunner":
        import pe_spatial.engine.fsdp  # noqa: F401  (registers; needs a newer torch than the rest)
    elif cfg.get("sharded_checkpoints"):
        raise ConfigError("sharded_checkpoints=True needs runner_type=ShardedRunner. Set it, or remove this option.")
    with as_config_error(cfg.filename):
        return RUNNERS.build(cfg) if "runner_type" in cfg else QuietRunner.from_cfg(cfg)


def load_strictly(runner: Runner) -> None:
    """Let `runner` refuse a checkpoint that does not match; mmengine would load what matches and continue."""
    load = runner.load_checkpoint

    def strictly(filename: str, **options: Any) -> Any:
        try:
            return load(filename, **{**options, "strict": True})
        except RuntimeError as error:
            raise _mismatch(filename, error) from error

    runner.load_checkpoint = strictly


def load_weights_of_any_layout(runner: Runner) -> None:
    """Let `runner` load weights alone, strictly: of our training, a safetensors file, a Detectron2 detector."""

    def load(source: str, **_: Any) -> Any:
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        if hasattr(model, "load_encoder"):  # the model is an encoder: its file, in any layout, or 'released'
            model.load_encoder(source)
            runner.logger.info(f"Load encoder from {source}")
            return {}
        path = locate(source)
        check_complete(path)
        file = read_checkpoint(path)
        if "parts" in file.rest:
            raise CheckpointError(
                f"{path} has its weights in parts. Merge them: pe-spatial consolidate_checkpoint {path} FILE"
            )
        checkpoint = {**file.rest, "state_dict": to_mmdet(file)}
        runner.call_hook("after_load_checkpoint", checkpoint=checkpoint)
        try:
            load_state_dict(model, checkpoint["state_dict"], strict=True)
        except RuntimeError as error:
            raise _mismatch(path, error) from error
        runner.logger.info(f"Load checkpoint from {path}")
        return checkpoint

    runner.load_checkpoint = load


def _mismatch(path: object, error: RuntimeError) -> CheckpointError:
    return CheckpointError(f"{path} does not match the model of this config: {' '.join(str(error).split())[:400]} ...")
