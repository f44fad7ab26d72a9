"""The batch of a config in parts that fit into the memory of this machine."""

import copy
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from mmengine.config import Config

from pe_spatial.engine.fit import fit
from pe_spatial.engine.micro_batch import divisors, micro_batch_of, micro_batch_place, set_micro_batch
from pe_spatial.engine.recipe import set_batch
from pe_spatial.engine.runner import QuietRunner, prepare_loaders
from pe_spatial.errors import ConfigError, TrainingError
from pe_spatial.planning.search import GB, Hardware, plan

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "OutOfMemoryError")
_KILLED = (-9, 137)
_USED = 0.85  # of the free memory: kernels and the allocator need some too


def fit_batch(cfg: Config) -> tuple[int, str]:
    """Make steps fit into memory, with as many images in an update as before.

    First the encoder gets fewer images at a time (`micro_batch`), which changes no loss. If that is not enough, or the
    backbone is another one, gradients of smaller batches are averaged. The planner chooses what is tried, by two real
    steps in a process of its own.

    Args:
        cfg: config of a training, on one GPU or without any; it is changed in place.

    Returns:
        The number of accumulated batches, and a sentence.

    Raises:
        TrainingError: if not even one image fits; it says what would, by the planner.
        ConfigError: if the steps fail for another reason.
    """
    loader = cfg.train_dataloader
    total = loader.batch_size
    if "source_ratio" in (loader.get("sampler") or {}):
        raise ConfigError("--batch auto: the sampler mixes several sources in a batch; give a number")
    ways = _ways(cfg)
    for number, (batch, micro_batch) in enumerate(ways, 1):
        tried = _split(cfg, batch, micro_batch)
        if not _expected_to_fit(tried, last=number == len(ways)) or not _fits(tried):
            continue
        cfg.model = tried.model
        set_batch(cfg, batch)
        said = f", encoded {micro_batch} at a time" if micro_batch else ""
        if batch < total:
            wrapper = cfg.optim_wrapper
            wrapper["accumulative_counts"] = wrapper.get("accumulative_counts", 1) * (total // batch)
            said += f", accumulated to {total} (their losses are averaged)"
        return total // batch, f"batches of {batch}{said}: two steps of it fitted into memory"
    raise TrainingError(f"not even one image fits into memory. {_remedy(cfg)}")


def _ways(cfg: Config) -> list[tuple[int, int | None]]:
    """Return (images of a batch, images that the encoder gets at a time or None for the config's) in order of trial."""
    total, place = cfg.train_dataloader.batch_size, micro_batch_place(cfg)
    smaller = divisors(total)[1:]
    if place is None:
        return [(size, None) for size in (total, *smaller)]
    parts = [size for size in smaller if size < micro_batch_of(cfg, place)]
    return [(total, None), *((total, size) for size in parts), *((size, 1 if size > 1 else None) for size in smaller)]


def _split(cfg: Config, batch: int, micro_batch: int | None) -> Config:
    changed = copy.deepcopy(cfg)
    set_batch(changed, batch)
    if micro_batch:
        place = micro_batch_place(changed)
        assert place is not None
        set_micro_batch(changed, place, micro_batch)
    return changed


def _hardware() -> Hardware:
    return Hardware(gpus=1, gpu_memory=free_memory() * _USED / GB, reserve=0)


def _expected_to_fit(cfg: Config, *, last: bool) -> bool:
    """Return whether the planner expects a step to fit; True if it cannot plan this model, or nothing else is left."""
    if last:
        return True
    hardware = _hardware()
    try:
        (row,) = plan(cfg, hardware, images=1, kinds=[None])
    except ConfigError:
        return True
    return bool(row["total"] <= hardware.usable)


def _remedy(cfg: Config) -> str:
    """Return what would fit, by the planner if it can plan this model."""
    hardware = _hardware()
    try:
        plan(cfg, hardware, images=1, kinds=[None])
    except ConfigError:
        return "Use smaller images (--image-size), a smaller encoder, --amp, or model.backbone.grad_checkpointing=True"
    try:
        found = fit(cfg, hardware, images=1)
    except ConfigError as error:
        return str(error)
    return f"The planner expects that it fits with {found}" if str(found) else "Close what else takes memory."


def free_memory() -> int:
    """Return the free memory of the GPU, or of the machine without one, in bytes."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
