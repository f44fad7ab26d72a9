"""Draw what a detector will see: a contact sheet of images with boxes and masks, class counts and object sizes.

pe-spatial browse DATA --out sheet.png              # a folder, COCO JSON or data.yaml, as it is
pe-spatial browse CONFIG.py --out sheet.png         # after the augmentation of the config

Below are the counts of boxes that were clipped, skipped and ignored (docs/inputs.md).
"""

import argparse

from pe_spatial.cli.arguments import add_cfg_options, import_quietly
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="dataset in a form of docs/own_data.md, or a config (NAME.py, mmdet::NAME.py)")
    parser.add_argument("--out", default="sheet.png", metavar="FILE.png", help="where to write (default: sheet.png)")
    splits = ["train", "val", "test"]
    parser.add_argument("--split", choices=splits, default="train", help="images to draw (default: train)")
    parser.add_argument("--count", type=int, default=16, metavar="N", help="number of images (default: 16)")
    parser.add_argument("--seed", type=int, default=0, help="random seed of their choice and augmentation (default: 0)")
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    if args.count < 1:
        raise ConfigError(f"--count is {args.count}; give at least 1")
    import_quietly("mmdet.datasets")
    from pe_spatial.detection.browse import browse_config, browse_dataset

    options = dict(split=args.split, count=args.count, seed=args.seed)
    if args.data.endswith(".py"):
        from pe_spatial.engine.configs import read_config
        from pe_spatial.engine.options import set_options

        cfg = read_config(args.data)
        set_options(cfg, args.cfg_options)
        lines = browse_config(cfg, args.out, **options)
    else:
        if args.cfg_options:
            raise ConfigError(f"--cfg-options changes a config, but {args.data} is a dataset; omit it")
        from pe_spatial.data import open_dataset

        lines = browse_dataset(open_dataset(args.data), args.out, **options)
    print("\n".join([*lines, f"wrote {args.out}"]))
