"""Train a detector, a depth model, a segmenter or a tracker.

pe-spatial train pe_spatial::pe_spatial_cascade_coco.py --data-root data/coco
pe-spatial train mmdet::detr/detr_r50_8xb2-150e_coco.py --swap pe_spatial_s16_512    # with PE as the backbone
pe-spatial train CONFIG --resume            # from the latest checkpoint of the work dir, if there is one
tools/dist_train.sh CONFIG 8                # on eight GPUs; the file says how to train on several nodes

The console shows a summary and the progress. The log file in the work dir has everything.
"""

import argparse

from pe_spatial.cli import arguments
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_config_arguments(parser)
    latest = "resume from a checkpoint (default: the latest one of the work dir)"
    parser.add_argument("--resume", nargs="?", const="auto", metavar="CHECKPOINT", help=latest)
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16)")
    parser.add_argument("--seed", type=int, help="random seed")
    repeatable = "the same seed (default 0) gives the same losses to the last bit, also after resuming"
    parser.add_argument("--deterministic", action="store_true", help=repeatable)
    stop = "stop after K steps in a row with a loss that is not finite (default 1); 0: skip and count them"
    parser.add_argument("--non-finite-steps", type=int, default=1, metavar="K", help=stop)
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    arguments.add_verbose(parser)
    swap = f"replace the backbone by an {arguments.VARIANT_HELP}"
    parser.add_argument("--swap", type=arguments.variant, metavar="VARIANT", help=swap)
    arguments.add_swap_arguments(parser)


def run(args: argparse.Namespace) -> None:
    with arguments.quiet_start(args):
        from pe_spatial.engine.training import prepare_training, train

        cfg, options = None, arguments.swap_options(args)
        if args.swap:
            from pe_spatial.engine.configs import read_config
            from pe_spatial.integrations.swap.policy import swap_backbone

            cfg = swap_backbone(read_config(args.config), args.swap, **options)
        elif options:
            raise ConfigError(f"--{', --'.join(arguments.SWAP_OPTIONS)} belong to --swap VARIANT, which is missing")
        cfg = arguments.load_config(args, cfg)
        rules = {name: getattr(args, name) for name in ("resume", "seed", "deterministic", "non_finite_steps")}
        prepare_training(cfg, bfloat16=args.amp, scale_lr=args.auto_scale_lr, **rules)
        train(cfg)
