"""Replace the backbone of an MMDetection or MMSegmentation config with PE; write a config that states what changed.

pe-spatial swap_backbone mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --variant pe_spatial_b16_512 --dry-run
pe-spatial swap_backbone mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py --variant pe_spatial_s16_512
pe-spatial swap_backbone mine.py --variant pe_spatial_l14_448 --adapter fused --layers 11,15,19,23 --out pe.py

The new config inherits CONFIG. It runs under `pe-spatial train`, and under the tools of MMDetection and MMSegmentation
if this package is installed. A backbone that cannot be probed needs --strides 4,8,16,32 --channels 256,512,1024,2048.
"""

import argparse
import os
import sys
from pathlib import Path

from pe_spatial.cli.arguments import VARIANT_HELP, add_swap_arguments, swap_options, variant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or mmdet::folder/name.py, mmseg::folder/name.py")
    parser.add_argument("--variant", type=variant, required=True, help=VARIANT_HELP)
    parser.add_argument("--out", metavar="FILE", help="config to write (default: <CONFIG>_<variant>.py)")
    parser.add_argument("--dry-run", action="store_true", help="print the new config instead of writing it")
    parser.add_argument("--force", action="store_true", help="overwrite FILE")
    add_swap_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from pe_spatial.atomic import write_file
    from pe_spatial.engine.configs import read_config
    from pe_spatial.errors import ConfigError
    from pe_spatial.integrations.swap.policy import count_parameters, plan_swap
    from pe_spatial.integrations.swap.write import write_swapped

    cfg = read_config(args.config)
    swap = plan_swap(cfg, args.variant, **swap_options(args))
    name = args.variant if isinstance(args.variant, str) else "custom"
    out = Path(args.out or f"{Path(args.config.rpartition('::')[2]).stem}_{name.replace(':', '_')}.py")
    packaged = "::" in args.config
    base = args.config if packaged else os.path.relpath(Path(args.config).resolve(), out.resolve().parent)
    text = write_swapped(cfg, swap, base=base, variant=name)
    for note in swap.notes:
        print(f"note: {note}", file=sys.stderr)
    counts = (f"{part} {number / 1e6:.1f} M" for part, number in count_parameters(swap.cfg).items())
    print(f"parameters: {', '.join(counts)}", file=sys.stderr)
    if args.dry_run:
        print(text, end="")
        return
    if out.exists() and not args.force:
        raise ConfigError(f"{out} already exists; give another --out, or --force to overwrite it")
    write_file(out, text)
    print(f"{out}: train it with pe-spatial train {out}")
