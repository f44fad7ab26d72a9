"""The largest batch that fits into the memory of this machine."""

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config

from pe_spatial.engine.recipe import set_batch
from pe_spatial.engine.runner import QuietRunner, prepare_loaders
from pe_spatial.errors import ConfigError, TrainingError
from pe_spatial.planning.search import GB, Hardware, plan

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "OutOfMemoryError")
_KILLED = (-9, 137)
_USED = 0.85  # of the free memory: kernels and the allocator need some too


def fit_batch(cfg: Config) -> tuple[int, str]:
    """Lower the batch until steps fit into memory, and accumulate gradients so that an update has as many images.

    It starts from the planner's estimate, and takes two real steps in a process of its own.

    Args:
        cfg: config of a training, on one GPU or without any; it is changed in place.

    Returns:
        The number of accumulated batches, and a sentence.

    Raises:
        TrainingError: if not even one image fits.
        ConfigError: if the steps fail for another reason.
    """
    loader = cfg.train_dataloader
    total = loader.batch_size
    if "source_ratio" in (loader.get("sampler") or {}):
        raise ConfigError("--batch auto: the sampler mixes several sources in a batch; give a number")
    fitting = [size for size in range(total, 0, -1) if total % size == 0]
    estimate = _estimate(cfg)
    for size in [size for size in fitting if size <= max(1, estimate)]:
        set_batch(cfg, size)
        if _fits(cfg):
            if total > size:
                wrapper = cfg.optim_wrapper
                wrapper["accumulative_counts"] = wrapper.get("accumulative_counts", 1) * (total // size)
            more = f", accumulated to {total}" if total > size else ""
            return total // size, f"batches of {size}{more}: two steps of it fitted into memory"
    set_batch(cfg, total)
    raise TrainingError(
        "not even one image fits into memory: use smaller images (--image-size), a smaller encoder, --amp, or "
        "model.backbone.grad_checkpointing=True"
    )


def free_memory() -> int:
    """Return the free memory of the GPU, or of the machine without one, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _estimate(cfg: Config) -> int:
    """Return the largest batch by the planner, or the config's if it cannot plan this model."""
    hardware = Hardware(gpus=1, gpu_memory=free_memory() * _USED / GB, reserve=0)
    try:
        rows = plan(cfg, hardware, images=1)
    except ConfigError:
        return cfg.train_dataloader.batch_size
    return next(row for row in rows if not row["recomputed"])["largest_batch"]


def _fits(cfg: Config) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "steps.py")
        _two_steps(cfg, folder).dump(path)
        script = f"from pe_spatial.engine.batch import take_steps; take_steps({str(path)!r})"
        search = os.pathsep.join([*filter(None, sys.path)])
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": search},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode == 0:
        return True
    if done.returncode in _KILLED or any(text in done.stderr for text in _OUT_OF_MEMORY):
        return False
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    raise ConfigError(f"--batch auto: the first steps failed: {reason}")


def _two_steps(cfg: Config, folder: str) -> Config:
    """Return a config that trains for two steps (the second has the optimizer's state) and saves nothing."""
    short = copy.deepcopy(cfg)
    short.train_cfg = dict(type="IterBasedTrainLoop", max_iters=2, val_interval=10**9)
    for split in ("val", "test"):
        for part in ("dataloader", "evaluator", "cfg"):
            short[f"{split}_{part}"] = None
    short.update(param_scheduler=None, load_from=None, resume=False, work_dir=folder, launcher="none")
    short.default_hooks = dict(checkpoint=None, logger=dict(type="LoggerHook", interval=1))
    short.custom_hooks = [hook for hook in short.get("custom_hooks") or [] if "EMAHook" in str(hook.type)]
    short.visualizer = dict(type="Visualizer", name="steps", vis_backends=[])
    short.log_processor = dict(by_epoch=False)
    _without_weights(short.model)
    return short


def _without_weights(node: object) -> None:
    if isinstance(node, dict):
        for key in ("init_cfg", "pretrained"):
            if key in node and (key == "pretrained" or "checkpoint" in (node[key] or {})):
                node[key] = None
        for child in node.values():
            _without_weights(child)
    elif isinstance(node, list | tuple):
        for child in node:
            _without_weights(child)


def take_steps(path: str) -> None:
    """Train the config of a file, as the process that `fit_batch` starts does."""
    cfg = Config.fromfile(path)
    prepare_loaders(cfg)
    QuietRunner.from_cfg(cfg).train()
