"""Make one file of a checkpoint that ShardedRunner wrote in parts (sharded_checkpoints=True), as a plain run writes it.

python tools/consolidate_checkpoint.py work_dirs/run/iter_90000.pth whole.pth
"""

import argparse

from pe_spatial.cli import common as cli
from pe_spatial.engine.fsdp import consolidate


def main(args: argparse.Namespace) -> None:
    consolidate(args.checkpoint, args.target)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", help="the file; the folder of its parts lies beside it")
    parser.add_argument("target", help="file to write")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")
    cli.run(main, parser.parse_args())
