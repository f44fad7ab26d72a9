"""Put PE into an MMDetection or MMSegmentation config; the file that comes out states only what changed.

python tools/swap_backbone.py mmdet::retinanet/retinanet_r50_fpn_1x_coco.py --variant pe_spatial_b16_512 --dry-run
python tools/swap_backbone.py mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py --variant pe_spatial_s16_512
python tools/swap_backbone.py mine.py --variant pe_spatial_l14_448 --adapter fused --layers 11,15,19,23 --out pe.py

The file inherits CONFIG and runs under tools/train.py, and under MMDetection's and MMSegmentation's own, where this
package is installed. A backbone that cannot be probed needs --strides 4,8,16,32 --channels 256,512,1024,2048.
"""

import argparse
import os
import sys
from pathlib import Path

from pe_spatial.cli.arguments import add_swap_arguments, swap_options
from pe_spatial.engine.configs import read_config
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.swap.policy import plan_swap, write_swapped


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a file, or mmdet::folder/name.py, mmseg::folder/name.py")
    parser.add_argument("--variant", required=True, help="pe_spatial_b16_512 and the like, or timm:NAME")
    parser.add_argument("--out", metavar="FILE", help="the config to write (default <CONFIG>_<variant>.py)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be written, and write nothing")
    parser.add_argument("--force", action="store_true", help="replace FILE")
    add_swap_arguments(parser)


def run(args: argparse.Namespace) -> None:
    cfg = read_config(args.config)
    done = plan_swap(cfg, args.variant, **swap_options(args))
    base = args.config
    out = Path(args.out or f"{Path(args.config.rpartition('::')[2]).stem}_{args.variant.replace(':', '_')}.py")
    if "::" not in base:
        base = os.path.relpath(Path(base).resolve(), out.resolve().parent)
    text = write_swapped(cfg, done, base=base, variant=args.variant)
    for note in done.notes:
        print(f"note: {note}", file=sys.stderr)
    if args.dry_run:
        print(text, end="")
        return
    if out.exists() and not args.force:
        raise ConfigError(f"{out} is there already; give another --out, or --force to replace it")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text)
    print(f"{out}: train it with python tools/train.py {out}")
