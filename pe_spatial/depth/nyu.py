"""The check of a download of NYU Depth v2: what is missing, unreadable or wrong."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pe_spatial.depth.datasets import DepthPairDataset
from pe_spatial.depth.transforms import DEPTH, LoadDepth
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import DatasetError

# split -> number of pairs behind published results, names of its list, folders that a list may be relative to
SPLITS = {
    "train": (24231, ("nyu_train.txt", "nyudepthv2_train_files_with_gt.txt"), ("", "sync")),
    "test": (654, ("nyu_test.txt", "nyudepthv2_test_files_with_gt.txt"), ("", "test", "official_splits/test")),
}


@dataclass
class SplitReport:
    """What was found of a split."""

    listed: int = 0  # number of pairs, as the next two
    read: int = 0
    broken: int = 0
    problems: list[str] = field(default_factory=list)  # a sentence for each
    options: str = ""  # what `DepthPairDataset` needs for this layout of the files, if it is not that of the configs


def check_split(
    root: Path, split: str, *, every: int = 1, progress: Callable[[Iterable[int]], Iterable[int]] = iter
) -> SplitReport:
    """Look for all files of a split of `SPLITS` below `root`, and decode every `every`-th pair."""
    report, expected = SplitReport(), SPLITS[split][0]
    try:
        name, prefix = _find_list(root, split)
        prefixes = dict(img_path=prefix, depth_path=prefix)
        dataset = DepthPairDataset(
            data_root=str(root), ann_file=name, data_prefix=prefixes, scale=1000, max_depth=10.0, pipeline=[]
        )
    except DatasetError as error:
        report.problems.append(str(error))
        return report
    if (name, prefix) != (SPLITS[split][1][0], ""):
        report.options = f"ann_file={name!r}, data_prefix={prefixes}"
    report.listed = len(dataset)
    if report.listed != expected:
        report.problems.append(f"{root / name} lists {report.listed} pairs; published results use {expected}")
    load_image, load_depth = LoadCheckedImage(), LoadDepth()
    not_black = 0
    for i in progress(range(0, report.listed, every)):
        report.read += 1
        try:
            pair = load_depth(load_image(dataset[i]))
            height, width = pair["ori_shape"]
            if (height, width) != (480, 640):
                raise DatasetError(f"{pair['img_path']} is {height}x{width} instead of 480x640 (height x width)")
            if not pair[DEPTH].any():
                raise DatasetError(f"{pair['depth_path']} contains no depth")
            not_black += split == "test" and pair["img"][:6].mean() > 8  # JPEG leaves some noise on black
        except DatasetError as error:
            report.broken += 1
            report.problems.append(str(error))
    if not_black:
        report.problems.append(
            f"{not_black} test images are not black in their outermost rows; extract them with the script of BTS"
        )
    return report


def _find_list(root: Path, split: str) -> tuple[str, str]:
    """Return the list of a split and the folder that it is relative to; DatasetError if there is no list."""
    _, names, prefixes = SPLITS[split]
    name = next((name for name in names if (root / name).is_file()), None)
    if name is None:
        raise DatasetError(f"{root} has neither {names[0]} nor {names[1]}; see --help for their origin")
    first = (root / name).read_text(errors="replace").split(maxsplit=1)[:1]
    existing = [prefix for prefix in prefixes if first and (root / prefix / first[0].lstrip("/")).is_file()]
    return name, (existing or prefixes)[0]
