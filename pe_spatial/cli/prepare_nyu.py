"""Check a download of NYU Depth v2 for training and evaluation: what is missing, unreadable or wrong, in one table.

python tools/prepare_nyu.py data/nyu
python tools/prepare_nyu.py data/nyu --every 50        # decode only each 50th pair; all files are looked for anyway

Nothing is moved, changed or written. The exit code is 0 if the set is complete and 1 if not. Where to get it:

- "nyu.zip" of zhyever/Monocular-Depth-Estimation-Toolbox (docs/dataset_prepare.md), which BinsFormer and DINOv3 used
  too: unpack it as data/nyu. It has the lists nyu_train.txt (24231 pairs) and nyu_test.txt (654).
- Or from cleinc/bts: the training set as data/nyu/sync; utils/extract_official_train_test_set_from_mat.py, which writes
  data/nyu/official_splits/test from nyu_depth_v2_labeled.mat; and the lists
  train_test_inputs/nyudepthv2_{train,test}_files_with_gt.txt, copied to data/nyu.

Without the lists there is no comparable number: the folder of the training set holds more than the 24231 pairs. The
test images of that extraction are black in the 7 outermost rows; other exports are not, and give other numbers. NYUv2
is for research.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

from rich.progress import track

from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.transforms import LoadDepth
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import ConfigError, DatasetError

# split -> pairs of the published numbers, names of its list, folders that a list may be relative to
SPLITS = {
    "train": (24231, ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"), ("", "sync")),
    "test": (654, ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"), ("", "test", "official_splits/test")),
}
SIZE = (480, 640)
SHOWN = 10  # sentences, then how many more there are


def find(root: Path, split: str) -> tuple[str, str]:
    """Return the list of a split and the folder that it is relative to; DatasetError if there is no list."""
    _, names, prefixes = SPLITS[split]
    name = next((name for name in names if (root / name).is_file()), None)
    if name is None:
        raise DatasetError(f"neither {names[0]} nor {names[1]} in {root}; see --help for where it comes from")
    first = (root / name).read_text(errors="replace").split(maxsplit=1)[:1]
    there = [prefix for prefix in prefixes if first and (root / prefix / first[0].lstrip("/")).is_file()]
    return name, (there or prefixes)[0]


def check(root: Path, split: str, *, every: int) -> tuple[Counter, list[str]]:
    """Return counts of the pairs of a split, and a sentence for each thing that is wrong."""
    counts: Counter = Counter()
    problems = []
    try:
        name, prefix = find(root, split)
        dataset = DepthPairDataset(
            data_root=str(root),
            ann_file=name,
            data_prefix=dict(img_path=prefix, depth_path=prefix),
            scale=1000,
            max_depth=10.0,
            pipeline=[],
        )
    except DatasetError as error:
        return counts, [str(error)]
    if (name, prefix) != (SPLITS[split][1][0], ""):
        print(f"{split}: set ann_file={name!r}, data_prefix=dict(img_path={prefix!r}, depth_path={prefix!r})")
    counts["listed"] = len(dataset)
    if len(dataset) != SPLITS[split][0]:
        problems.append(f"{root / name} lists {len(dataset)} pairs; the published numbers are on {SPLITS[split][0]}")
    image, depth = LoadCheckedImage(), LoadDepth()
    bordered = 0
    for i in track(range(0, len(dataset), every), description=split, transient=True):
        counts["read"] += 1
        try:
            pair = depth(image(dataset[i]))
            if pair["ori_shape"] != SIZE:
                raise DatasetError(f"{pair['img_path']} is {'x'.join(map(str, pair['ori_shape']))} and not 480x640")
            if not pair["gt_depth_map"].any():
                raise DatasetError(f"{pair['depth_path']} holds no depth")
            bordered += split == "test" and pair["img"][:6].mean() > 8  # JPEG leaves some noise on black
        except DatasetError as error:
            counts["wrong"] += 1
            problems.append(str(error))
    if bordered:
        problems.append(
            f"{bordered} test images are not black in their outermost rows, as the BTS extraction leaves them; "
            "extract them anew"
        )
    return counts, problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("root", type=Path, help="folder of the download")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="decode each Nth pair only (default all)")


def run(args: argparse.Namespace) -> None:
    root, every = args.root, args.every
    if every < 1:
        raise ConfigError(f"--every is {every}; it must be at least 1")
    if not root.is_dir():
        raise DatasetError(f"no folder {root}; see --help for what belongs there")
    rows, problems = [("split", "expected", "listed", "read", "wrong")], []
    for split, (expected, *_) in SPLITS.items():
        counts, found = check(root, split, every=every)
        rows.append((split, expected, counts["listed"], counts["read"], counts["wrong"]))
        problems += found
    for row in rows:
        print("".join(f"{cell!s:>10}" for cell in row))
    for problem in problems[:SHOWN]:
        print(f"- {problem}")
    if len(problems) > SHOWN:
        print(f"- and {len(problems) - SHOWN} more")
    print("not complete: see --help for the files and where they come from" if problems else "complete")
    sys.exit(int(bool(problems)))
