"""Train a config: the options of a run, and its errors as sentences."""

import os

import torch
from mmengine.config import Config
from mmengine.runner import Runner

from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.checkpoints import find_checkpoint
from pe_spatial.engine.checks import CheckClassesHook, check_files, empty_sets_as_errors
from pe_spatial.engine.determinism import make_deterministic
from pe_spatial.engine.fault_tolerance import StopOnSignalHook, add_fault_tolerance, end_workers, max_across_ranks
from pe_spatial.engine.runner import build_runner, explain_workers, start_processes
from pe_spatial.engine.summary import encoders, summarize
from pe_spatial.engine.weights import check_pretrained, check_weights, load_strictly, load_what_fits
from pe_spatial.errors import ConfigError, TrainingError


def prepare_training(
    cfg: Config,
    *,
    resume: str | None = None,
    scale_lr: bool = False,
    deterministic: bool = False,
    non_finite_steps: int = 1,
) -> None:
    """Put the options of a run into its config.

    Args:
        resume: a checkpoint, or 'auto' for the latest of the work dir, if there is one. A run that a launcher started
            again after a failure resumes in any case.
        scale_lr: scale the learning rate from the config's `auto_scale_lr.base_batch_size` to the real batch size.
        deterministic: same seed (the config's, or 0), same losses to the last bit, also after resuming.
        non_finite_steps: see `add_fault_tolerance`.
    """
    start_processes(cfg)
    if scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ConfigError(f"{cfg.filename} has no auto_scale_lr.base_batch_size to scale the learning rate from")
        cfg.auto_scale_lr.enable = True
    if cfg.get("resume"):
        resume = resume or cfg.get("load_from") or "auto"
    if _was_restarted():
        resume = resume or "auto"
    checkpoint = find_checkpoint(resume, cfg.work_dir) if resume else None
    cfg.resume = bool(checkpoint)
    if checkpoint:  # otherwise the run starts as its config says, with its load_from
        cfg.load_from = checkpoint
    if not checkpoint:
        check_weights(cfg.get("load_from"))
        check_pretrained(cfg)
    add_fault_tolerance(cfg, non_finite_steps=non_finite_steps)
    if deterministic:
        make_deterministic(cfg, (cfg.get("randomness") or {}).get("seed") or 0)


def _was_restarted() -> bool:
    """Return whether the launcher started any of the processes in place of one that was lost.

    Not every process knows: on nodes that lost none, torchrun starts them again without counting it.
    """
    counts = [int(os.environ.get(f"{launcher}_RESTART_COUNT") or 0) for launcher in ("TORCHELASTIC", "SLURM")]
    return bool(max_across_ranks(max(counts)))


def train(cfg: Config) -> Runner:
    """Train what a prepared config describes; errors that a user can fix become sentences."""
    for split in ("train", "val"):
        check_files(cfg, split)
    runner = build_runner(cfg)
    runner.register_hook(CheckClassesHook())
    (load_strictly if cfg.get("resume") else load_what_fits)(runner)
    runner.logger.info(f"Training\n{summarize(runner, training=True)}")
    try:
        with empty_sets_as_errors(cfg, "train"):
            runner.train()
    except CheckpointError as error:
        raise explain_missing_weights(cfg, error) from error
    except RuntimeError as error:
        explained = explain_failure(cfg, runner.iter + 1, error)
        if explained is error:
            raise
        raise explained from error
    finally:
        end_workers()
        for hook in runner.hooks:
            if isinstance(hook, StopOnSignalHook):
                hook.after_train(runner)
    return runner


def explain_missing_weights(cfg: Config, error: CheckpointError) -> CheckpointError:
    """Add to a checkpoint's error the options of this config that fix it."""
    place = next((place for place, options in encoders(cfg.model) if options.get("init_cfg")), None)
    if place is None or str(cfg.get("load_from") or None) in str(error):
        return error
    return CheckpointError(
        f"{error}, with --cfg-options {place}.init_cfg.checkpoint=FILE; "
        f"or train from random weights on purpose with --cfg-options {place}.init_cfg=None"
    )


def explain_failure(cfg: Config, step: int, error: RuntimeError) -> RuntimeError:
    """Return the error of a training step as a sentence with the options that fix it, if it is a known one."""
    text = str(error)
    loader = cfg.train_dataloader
    if isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        place, options = next(encoders(cfg.model), ("model.backbone", {"type": None}))
        encoder = place if "type" in options else f"{place}.encoder_options"
        return TrainingError(
            f"out of memory in step {step}: lower train_dataloader.batch_size (now {loader.get('batch_size')}; "
            f"{encoder}.micro_batch=1 keeps it), set {encoder}.grad_checkpointing=True, use --amp, or "
            f"smaller images; pe-spatial plan {cfg.filename} --fit GB finds what fits"
        )
    return explain_workers("train_dataloader", loader, f"step {step}", error)


