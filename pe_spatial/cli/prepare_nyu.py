"""Check a download of NYU Depth v2 for training and evaluation: one table of what is missing, unreadable or wrong.

pe-spatial prepare_nyu data/nyu
pe-spatial prepare_nyu data/nyu --every 50        # look for all files, but decode only every 50th pair

Nothing is moved, changed or written. The exit code is 0 if the dataset is complete and 1 if not. Where to get it:

- "nyu.zip" of zhyever/Monocular-Depth-Estimation-Toolbox (docs/dataset_prepare.md), which BinsFormer and DINOv3 used
  too: unpack it as data/nyu. It contains the lists nyu_train.txt (24231 pairs) and nyu_test.txt (654).
- Or from cleinc/bts: the training set as data/nyu/sync; utils/extract_official_train_test_set_from_mat.py, which writes
  data/nyu/official_splits/test from nyu_depth_v2_labeled.mat; and the lists
  train_test_inputs/nyudepthv2_{train,test}_files_with_gt.txt, copied to data/nyu.

Without the lists results cannot be compared: the folder of the training set contains more than the 24231 pairs. The
test images of that extraction are black in the 7 outermost rows; those of other exports are not, and give other
results. NYUv2 is for research only.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from pe_spatial.errors import ConfigError, DatasetError

SHOWN = 10  # problems that are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="folder of the download")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="decode only every Nth pair (default: all)")


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from pe_spatial.depth.nyu import SPLITS, check_split

    if args.every < 1:
        raise ConfigError(f"--every is {args.every}; it must be at least 1")
    if not args.root.is_dir():
        raise DatasetError(f"there is no folder {args.root}; see --help for its content")
    rows: list[tuple[object, ...]] = [("split", "expected", "listed", "read", "broken")]
    problems: list[str] = []
    for split, (expected, *_) in SPLITS.items():
        report = check_split(args.root, split, every=args.every, progress=partial(tqdm, desc=split, leave=False))
        rows.append((split, expected, report.listed, report.read, report.broken))
        problems += report.problems
        if report.options:
            print(f"{split}: set {report.options} in the config")
    for row in rows:
        print("".join(f"{cell!s:>10}" for cell in row))
    for problem in problems[:SHOWN]:
        print(f"- {problem}")
    if len(problems) > SHOWN:
        print(f"- and {len(problems) - SHOWN} more")
    print("incomplete: see --help for the files and their origin" if problems else "complete")
    sys.exit(int(bool(problems)))
