"""Train what a config describes: detection, depth, tracking.

pe-spatial train configs/pe_spatial_cascade_coco.py --data-root data/coco
tools/dist_train.sh configs/pe_spatial_cascade_coco.py 8          # eight GPUs; for nodes see there
pe-spatial train mmdet::detr/detr_r50_8xb2-150e_coco.py --swap pe_spatial_s16_512    # PE for its backbone
pe-spatial train CONFIG --resume                    # the latest checkpoint of the work dir, if there is one
"""

import argparse
import os

from pe_spatial.cli.arguments import SWAP_OPTIONS, add_config_arguments, add_swap_arguments, load_config, swap_options
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.engine.checkpoints import check_complete, find_checkpoint
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.determinism import make_deterministic
from pe_spatial.engine.fault_tolerance import add_fault_tolerance, end_workers, max_across_ranks
from pe_spatial.engine.runner import (
    build_runner,
    explain_failure,
    explain_missing_weights,
    load_strictly,
    start_processes,
)
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="continue a run; default: its latest checkpoint"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16), if the config has none")
    parser.add_argument("--seed", type=int, help="of every random number")
    parser.add_argument(
        "--deterministic", action="store_true", help="same seed (default 0), same losses to the last bit, on resume too"
    )
    parser.add_argument(
        "--non-finite-steps",
        type=int,
        default=1,
        metavar="K",
        help="stop after K steps in a row whose loss is no finite number (default 1); 0: skip and count them",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument("--swap", metavar="VARIANT", help="put this encoder in the place of the config's backbone")
    add_swap_arguments(parser)


def restarted() -> bool:
    """Whether the launcher started any of the processes in the place of one that was lost.

    Not every process knows: on nodes that lost none, torchrun starts them anew without counting it.
    """
    counts = [int(os.environ.get(f"{launcher}_RESTART_COUNT") or 0) for launcher in ("TORCHELASTIC", "SLURM")]
    return bool(max_across_ranks(max(counts)))


def run(args: argparse.Namespace) -> None:
    cfg = None
    if args.swap:
        from pe_spatial.integrations.swap.policy import swap_backbone  # needs MMDetection

        cfg = swap_backbone(read_config(args.config), args.swap, **swap_options(args))
    elif swap_options(args):
        raise ConfigError(f"--{', --'.join(SWAP_OPTIONS)} belong to --swap VARIANT, which is missing")
    cfg = load_config(args, cfg)
    start_processes(cfg)
    if restarted() and not args.resume:
        args.resume = "auto"
    if args.amp:
        optimizer_options = ("type", "loss_scale", "dtype", "use_fsdp")
        cfg.optim_wrapper = dict(
            type="BFloat16OptimWrapper",
            **{key: value for key, value in cfg.optim_wrapper.items() if key not in optimizer_options},
        )
    if args.auto_scale_lr:
        if "base_batch_size" not in cfg.get("auto_scale_lr", {}):
            raise ConfigError(f"{args.config} has no auto_scale_lr.base_batch_size to scale the learning rate from")
        cfg.auto_scale_lr.enable = True
    if args.resume:
        checkpoint = find_checkpoint(args.resume, cfg.work_dir)
        if checkpoint:  # otherwise the run begins as its config says, with its load_from
            cfg.resume, cfg.load_from = True, checkpoint
    if not cfg.get("resume") and os.path.isfile(cfg.get("load_from") or ""):
        check_complete(cfg.load_from)
    add_fault_tolerance(cfg, non_finite_steps=args.non_finite_steps)
    if args.deterministic:
        make_deterministic(cfg, args.seed or 0)
    elif args.seed is not None:
        cfg.randomness = dict(cfg.get("randomness") or {}, seed=args.seed)
    runner = build_runner(cfg)
    if cfg.get("resume"):
        load_strictly(runner)
    try:
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
