"""Estimate what a training takes before it starts: memory of each GPU, FLOPs, time.

pe-spatial plan projects/coco_detection/deta/stage4_coco_1824.py --gpus 64 --gpu-memory 80
pe-spatial plan configs/pe_spatial_cascade_coco.py --gpus 8 --variants t16,s16,b16,l14,g14 --json plan.json

Everything runs on the meta device: nothing is allocated and no GPU is needed. The table is Markdown.
"""

import argparse
import dataclasses
import importlib
import json

from pe_spatial.cli.arguments import add_cfg_options

# Packages with the examples of a framework's own models; other configs import what they need (custom_imports).
_PACKAGES = {"mmdet": "pe_spatial.detection", "mmseg": "pe_spatial.segmentation"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="config file, or a config of an installed package: mmdet::folder/name.py")
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs in all nodes (default 8)")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="memory of one GPU (default 80)")
    parser.add_argument("--reserve", type=float, default=4, metavar="GB", help="GPU memory to leave free (default 4)")
    parser.add_argument("--batch-size", type=int, metavar="B", help="images or clips per GPU (default: the config's)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size, if the config has none")
    parser.add_argument("--variants", metavar="T16,S16", help="plan each of these variants: t16, s16, b16, l14, g14")
    parser.add_argument(
        "--images", type=int, default=117266, help="images per epoch (default 117266: COCO with objects)"
    )
    parser.add_argument(
        "--efficiency", type=float, default=0.4, help="fraction of the peak rates reached (default 0.4)"
    )
    peak = "peak rate (default 989 in bfloat16, 67 in float32: H100 SXM, dense, no TF32)"
    parser.add_argument("--bfloat16-rate", type=float, default=989, metavar="TFLOPS", help=peak)
    parser.add_argument("--float32-rate", type=float, default=67, metavar="TFLOPS", help=peak)
    parser.add_argument("--json", metavar="OUT", help="also write the rows to this file, in bytes and operations")
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from mmengine.logging import MMLogger

    from pe_spatial.atomic import atomic_write
    from pe_spatial.engine.configs import read_config
    from pe_spatial.engine.options import set_options
    from pe_spatial.errors import ConfigError
    from pe_spatial.planning.report import describe, format_table
    from pe_spatial.planning.search import Hardware, plan, with_variants

    MMLogger.get_current_instance().setLevel("ERROR")  # mmengine logs the learning rate of every parameter
    for name in ("gpus", "batch_size", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    cfg = read_config(args.config)
    set_options(cfg, args.cfg_options)
    if cfg.get("default_scope") in _PACKAGES:
        importlib.import_module(_PACKAGES[cfg.default_scope])
    hardware = Hardware(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Hardware)})
    rows = [
        dict(variant=variant, **row)
        for variant, changed in with_variants(cfg, args.variants.split(",") if args.variants else ()).items()
        for row in plan(changed, hardware, images=args.images, batch_size=args.batch_size, size=args.size)
    ]
    print(describe(rows[0], hardware, config=args.config, images=args.images))
    print(format_table(rows, hardware))
    if args.json:
        with atomic_write(args.json) as unfinished:
            unfinished.write_text(json.dumps(rows, indent=1) + "\n")
