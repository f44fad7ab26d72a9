"""Merge a checkpoint that ShardedRunner wrote in parts (sharded_checkpoints=True) into the single file of a plain run.

pe-spatial consolidate_checkpoint work_dirs/run/iter_90000.pth merged.pth
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="the .pth file, beside the folder of its parts")
    parser.add_argument("target", help="file to write")


def run(args: argparse.Namespace) -> None:
    from pe_spatial.engine.fsdp import consolidate

    consolidate(args.checkpoint, args.target)
