"""Train what a config describes: detection, depth, tracking.

python tools/train.py configs/pe_spatial_cascade_coco.py --data-root data/coco
torchrun --nproc_per_node 8 tools/train.py configs/pe_spatial_cascade_coco.py --launcher pytorch
python tools/train.py mmdet::detr/detr_r50_8xb2-150e_coco.py --swap pe_spatial_s16_512    # PE for its backbone
python tools/train.py CONFIG --resume                    # the latest checkpoint of the work dir, if there is one
"""

import argparse

from mmengine.runner import find_latest_checkpoint

from pe_spatial import cli
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.errors import ConfigError


def main(args: argparse.Namespace) -> None:
    cfg = cli.load_config(args)
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
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else args.resume
        checkpoint = cfg.load_from or find_latest_checkpoint(cfg.work_dir)
        if checkpoint:
            cli.check_training_checkpoint(checkpoint)
    runner = cli.build_runner(cfg)
    if args.resume:
        cli.load_strictly(runner)
    try:
        runner.train()
    except CheckpointError as error:
        raise cli.explain_missing_weights(cfg, error) from error


if __name__ == "__main__":
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT", help="continue a run; default: its latest checkpoint"
    )
    parser.add_argument("--amp", action="store_true", help="mixed precision (bfloat16), if the config has none")
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the learning rate with the batch size")
    parser.add_argument("--swap", metavar="VARIANT", help="put this encoder in the place of the config's backbone")
    cli.add_swap_arguments(parser)
    arguments = parser.parse_args()
    cli.run(main, arguments)
