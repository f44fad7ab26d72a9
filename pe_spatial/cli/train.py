"""Train a detector, a depth model, a segmenter or a tracker.

pe-spatial train pe_spatial::pe_spatial_cascade_coco.py --data-root data/coco
pe-spatial train mmdet::detr/detr_r50_8xb2-150e_coco.py --swap pe_spatial_s16_512    # with PE as the backbone
pe-spatial train CONFIG --resume            # from the latest checkpoint of the work dir, if there is one
pe-spatial train CONFIG --data DATA --epochs 50    # on own images and labels, see docs/own_data.md
pe-spatial train CONFIG --freeze 12 --no-augmentation --cache-features maps    # the frozen encoder runs once
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
    repeatable = "the same seed (0 without --seed) gives the same losses to the last bit, also after resuming"
    parser.add_argument("--deterministic", action="store_true", help=repeatable)
    stop = "stop after K steps in a row with a loss that is not finite; 0: skip and count them"
    parser.add_argument("--non-finite-steps", type=int, default=1, metavar="K", help=stop)
    scaled = "scale the learning rate with the batch size (--data and --batch do so too)"
    parser.add_argument("--auto-scale-lr", action="store_true", help=scaled)
    arguments.add_verbose(parser)
    swap = f"replace the backbone by an {arguments.VARIANT_HELP}"
    parser.add_argument("--swap", type=arguments.variant, metavar="VARIANT", help=swap)
    arguments.add_swap_arguments(parser)
    group = parser.add_argument_group("own data and short schedules")
    arguments.add_data(group)
    length = group.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the images; warm-up and decay follow")
    length.add_argument("--iterations", type=int, metavar="N", help="batches; warm-up and decay follow")
    batch = "images per GPU and step; auto: the config's, in parts that fit into memory"
    group.add_argument("--batch", type=arguments.batch, metavar="N|auto", help=batch)
    frozen = "freeze the patch embedding and the first K blocks of the encoder"
    group.add_argument("--freeze", type=int, metavar="K", help=frozen)
    size = "longer side of the images in pixels, rounded to complete windows of the encoder"
    group.add_argument("--image-size", type=int, metavar="PIXELS", help=size)
    shapes = "batches of either landscape or portrait images, padded to complete windows instead of squares"
    group.add_argument("--rectangular", action="store_true", help=shapes)
    repeat = "show images with classes in fewer than this fraction of the images more often (default: 0.3)"
    group.add_argument("--balance", type=float, nargs="?", const=0.3, metavar="FRACTION", help=repeat)
    group.add_argument("--ema", action="store_true", help="evaluate and save an average of the weights over time")
    patience = "stop when the main metric has not improved in K validations"
    group.add_argument("--patience", type=int, metavar="K", help=patience)
    arguments.add_cache(group)
    plain = "train on images as evaluation sees them, without augmentation"
    group.add_argument("--no-augmentation", action="store_true", help=plain)
    services = "also log to wandb, mlflow or clearml (TensorBoard is used if it is installed)"
    group.add_argument("--log", nargs="+", default=(), choices=["wandb", "mlflow", "clearml"], help=services)


def run(args: argparse.Namespace) -> None:
    with arguments.quiet_start(args):
        from pe_spatial.cli import own_data
        from pe_spatial.engine.configs import read_config
        from pe_spatial.engine.recipe import log_to
        from pe_spatial.engine.training import prepare_training, train

        cfg, options = read_config(args.config), arguments.swap_options(args)
        if args.swap:
            from pe_spatial.integrations.swap.policy import swap_backbone

            cfg = swap_backbone(cfg, args.swap, **options)
        elif options:
            raise ConfigError(f"--{', --'.join(arguments.SWAP_OPTIONS)} belong to --swap VARIANT, which is missing")
        dataset = own_data.use_data(args, cfg)
        cfg = arguments.load_config(args, cfg)
        if cfg.get("default_scope") == "mmdet":
            from pe_spatial.detection.coco import use_checked_annotations

            use_checked_annotations(cfg)
        notes = own_data.change_recipe(args, cfg, dataset)
        rules = {name: getattr(args, name) for name in ("resume", "deterministic", "non_finite_steps")}
        if dataset:
            own_data.write(args, cfg, [*notes, dataset.summary()])
        log_to(cfg, args.log)
        prepare_training(cfg, scale_lr=args.auto_scale_lr, **rules)
        train(cfg)
