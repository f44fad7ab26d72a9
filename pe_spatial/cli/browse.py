"""Draw what a detector will see: a contact sheet of images with boxes and masks, class counts and object sizes.

pe-spatial browse DATA --out sheet.png              # a folder, COCO JSON or data.yaml, as it is
pe-spatial browse CONFIG.py --out sheet.png         # after the augmentation of the config
pe-spatial browse CONFIG.py --data DATA             # own data after the augmentation of the config

Below are the counts of boxes that were clipped, skipped and ignored (docs/inputs.md).
"""

import argparse
import tempfile

from pe_spatial.cli.arguments import add_cfg_options, add_data, import_quietly
from pe_spatial.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = "a config (NAME.py, mmdet::NAME.py), or a dataset in a form of docs/own_data.md"
    parser.add_argument("config", metavar="CONFIG|DATA", help=what)
    add_data(parser)
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
    if args.config.endswith(".py"):
        from pe_spatial.cli.own_data import use_data
        from pe_spatial.engine.configs import read_config
        from pe_spatial.engine.options import set_options

        cfg = read_config(args.config)
        with tempfile.TemporaryDirectory() as args.work_dir:
            use_data(args, cfg)
            set_options(cfg, args.cfg_options)
            lines = browse_config(cfg, args.out, **options)
    else:
        if args.cfg_options or args.data:
            raise ConfigError(f"--data and --cfg-options belong to a config, but {args.config} is a dataset; omit them")
        from pe_spatial.data import open_dataset

        lines = browse_dataset(open_dataset(args.config), args.out, **options)
    print("\n".join([*lines, f"wrote {args.out}"]))
