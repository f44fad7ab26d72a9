"""Estimate what a training takes before it starts: memory of each GPU, FLOPs, time.

pe-spatial plan projects/coco_detection/deta/stage4_coco_1824.py --gpus 64 --gpu-memory 80
pe-spatial plan configs/pe_spatial_cascade_coco.py --gpus 8 --variants t16,s16,b16,l14,g14 --json plan.json
pe-spatial plan configs/pe_spatial_cascade_coco.py --gpus 1 --fit 24      # options with which it fits into 24 GB

Everything runs on the meta device: nothing is allocated and no GPU is needed. The table is Markdown.
"""

import argparse
import dataclasses
import importlib
import json
import tempfile
import warnings

from pe_spatial.cli.arguments import CONFIG_HELP, add_cfg_options, add_data, without_prints

# Packages with the examples of a framework's own models; other configs import what they need (custom_imports).
_PACKAGES = {"mmdet": "pe_spatial.detection", "mmseg": "pe_spatial.segmentation"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help=CONFIG_HELP)
    add_data(parser)
    parser.add_argument("--gpus", type=int, default=8, metavar="N", help="number of GPUs in all nodes")
    parser.add_argument("--gpu-memory", type=float, default=80, metavar="GB", help="memory of one GPU")
    fits = "print the fastest training that fits into GPUs of this memory, as options of `pe-spatial train`"
    parser.add_argument("--fit", type=float, metavar="GB", help=fits)
    parser.add_argument("--reserve", type=float, default=4, metavar="GB", help="GPU memory to leave free")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images or clips per GPU (default: the config's)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("H", "W"), help="image size, if the config has none")
    variants = "plan each of these variants: t16, s16, b16, l14, g14 (PE-Spatial) or complete names"
    parser.add_argument("--variants", metavar="t16,s16", help=variants)
    counted = "images or clips per epoch (default: those of the config's dataset, or COCO's 117266 if it is not there)"
    parser.add_argument("--images", type=int, metavar="N", help=counted)
    reached = "fraction of the peak rates that a training reaches"
    parser.add_argument("--efficiency", type=float, default=0.4, metavar="FRACTION", help=reached)
    peak = "peak rate of one GPU in {} (default: of an A10 up to 24 GB, an A40 up to 48, an H100 SXM above; dense{})"
    brain, single = peak.format("bfloat16", ""), peak.format("float32", ", without TF32")
    parser.add_argument("--bfloat16-rate", type=float, metavar="TFLOPS", help=brain)
    parser.add_argument("--float32-rate", type=float, metavar="TFLOPS", help=single)
    parser.add_argument("--json", metavar="OUT", help="also write the rows to this file, in bytes and operations")
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    from mmengine.logging import MMLogger

    from pe_spatial.atomic import write_file
    from pe_spatial.cli.own_data import use_data
    from pe_spatial.engine.configs import read_config
    from pe_spatial.engine.fit import fit
    from pe_spatial.engine.options import set_options
    from pe_spatial.errors import ConfigError
    from pe_spatial.planning.report import describe, explain, format_table
    from pe_spatial.planning.search import COCO_IMAGES, Hardware, build_dataset, plan, run_length, with_variants

    MMLogger.get_current_instance().setLevel("ERROR")  # mmengine logs the learning rate of every parameter
    for name in ("gpus", "batch_size", "images"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if args.fit is not None:
        if args.variants or args.batch_size or args.size:
            raise ConfigError("--fit chooses batch and size itself; omit --variants, --batch-size and --size")
        args.gpu_memory = args.fit
    hardware = Hardware(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Hardware)})
    with without_prints(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as args.work_dir:
        warnings.simplefilter("ignore")
        cfg = read_config(args.config)
        use_data(args, cfg)
        set_options(cfg, args.cfg_options)
        if cfg.get("default_scope") in _PACKAGES:
            importlib.import_module(_PACKAGES[cfg.default_scope])
        dataset, reason = build_dataset(cfg) if cfg.get("train_dataloader") else (None, "")
        images = args.images or (COCO_IMAGES if dataset is None else len(dataset))
        variants = with_variants(cfg, args.variants.split(",") if args.variants else ())
        if args.fit is not None:
            chosen = fit(cfg, hardware, images=images, dataset=dataset)
            rows = [dict(variant=next(iter(variants)), **chosen.row)]
        else:
            options = dict(images=images, batch_size=args.batch_size, size=args.size, dataset=dataset)
            rows = [
                dict(variant=variant, **row)
                for variant, changed in variants.items()
                for row in plan(changed, hardware, **options)
            ]
    epoch = f"{images}"
    if args.images is None and dataset is None:
        epoch += f" (assumed, as in COCO; --images N. The dataset cannot be read: {reason.partition('; ')[0]})"
    unit, number = run_length(cfg) or ("its length is not in the config", "")
    print(describe(rows[0], hardware, config=args.config, images=epoch, run=f"{number} {unit}".strip()))
    print(format_table(rows, hardware))
    print(explain(rows, hardware))
    if args.fit is not None:
        print(f"\nIt fits with {chosen.accumulated} x {chosen.batch} images in an update:")
        print(f"pe-spatial train {args.config} {chosen}".rstrip())
    if args.json:
        write_file(args.json, json.dumps(rows, indent=1) + "\n")
