"""Merge LoRA adapters into the weights that they were trained on: a plain checkpoint with the same outputs.

pe-spatial merge_lora work_dirs/run/iter_2000.pth merged.pth
pe-spatial merge_lora CHECKPOINT merged.pth --cfg-options model.backbone.init_cfg.checkpoint=BASE.pt

The merged file holds its config, without lora; pe-spatial test, pe_spatial.load and others take it as any other. See
docs/lora.md.
"""

import argparse

from pe_spatial.cli.arguments import add_cfg_options, import_quietly, without_prints


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="checkpoint that `pe-spatial train` wrote")
    parser.add_argument("target", metavar="OUT", help="file to write (.pth)")
    parser.add_argument("--config", help="config file (default: the config inside the checkpoint)")
    add_cfg_options(parser)


def run(args: argparse.Namespace) -> None:
    import_quietly("mmdet.models")
    import_quietly("mmseg.models")
    from pe_spatial.engine.configs import config_in, read_config
    from pe_spatial.engine.options import set_options
    from pe_spatial.engine.weights import merge_checkpoint

    with without_prints():
        cfg = read_config(args.config) if args.config else config_in(args.checkpoint)
        set_options(cfg, args.cfg_options)
        number = merge_checkpoint(cfg, args.checkpoint, args.target)
    print(f"{args.checkpoint} -> {args.target}: {number} tensors of a plain model")
