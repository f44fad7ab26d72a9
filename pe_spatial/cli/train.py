"""Train a detector, a depth model, a segmenter or a tracker.

pe-spatial train pe_spatial::pe_spatial_cascade_coco.py --data-root data/coco
pe-spatial train mmdet::detr/detr_r50_8xb2-150e_coco.py --swap pe_spatial_s16_512    # with PE as the backbone
pe-spatial train CONFIG --resume            # from the latest checkpoint of the work dir, if there is one
tools/dist_train.sh CONFIG 8                # on eight GPUs; the file says how to train on several nodes

The console shows a summary and the progress. The log file in the work dir has everything.
"""

import argparse

from pe_spatial.cli.arguments import (
    SWAP_OPTIONS,
    VARIANT_HELP,
    add_config_arguments,
    add_swap_arguments,
    add_verbose,
    load_config,
    quiet_start,
    swap_options,
    variant,
)
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config_arguments(parser)
    parser.add_argument(
        "--resume",
        nargs="?",
        const="auto",
        metavar="CHECKPOINT",
        help="resume from a checkpoint (default: the latest one of the work dir)",
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16)")
    parser.add_argument("--seed", type=int, help="random seed")
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="the same seed (default 0) gives the same losses to the last bit, also after resuming",
    )
    parser.add_argument(
        "--non-finite-steps",
        type=int,
        default=1,
        metavar="K",
        help="stop after K steps in a row whose loss is not finite (default 1); 0: skip and count them",
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    add_verbose(parser)
    parser.add_argument("--swap", type=variant, metavar="VARIANT", help=f"replace the backbone by an {VARIANT_HELP}")
    add_swap_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with quiet_start(args):
        from pe_spatial.engine.training import prepare_training, train

        cfg = None
        if args.swap:
            from pe_spatial.engine.configs import read_config
            from pe_spatial.integrations.swap.policy import swap_backbone

            cfg = swap_backbone(read_config(args.config), args.swap, **swap_options(args))
        elif swap_options(args):
            raise ConfigError(f"--{', --'.join(SWAP_OPTIONS)} belong to --swap VARIANT, which is missing")
        cfg = load_config(args, cfg)
        prepare_training(
            cfg,
            resume=args.resume,
            bfloat16=args.amp,
            scale_lr=args.auto_scale_lr,
            seed=args.seed,
            deterministic=args.deterministic,
            non_finite_steps=args.non_finite_steps,
        )
        train(cfg)
