"""Pairs of an image and a depth map, from a list, a table or two folders."""

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS

from pe_spatial.engine.loading import RefetchBrokenMixin
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import is_hidden, read_size

_NAMED = 5  # number of files that an error names
_CAMERA = ("fx", "fy", "cx", "cy")
_COLUMNS = ("rgb", "depth", "units_per_meter", *_CAMERA, "max_eval_depth_m", "notes")


@DATASETS.register_module()
class DepthPairDataset(RefetchBrokenMixin, BaseDataset):
    """Pairs of an image and a depth map; missing files and malformed lines raise DatasetError.

    `metainfo["image_size"]` is (height, width) of the first image; checkpoints hold it for inference.

    The pairs come from `ann_file`, or without one from two folders:

    - `*.txt`, the lists of BTS: a line is `image depth [focal length]`, relative to the two prefixes; leading slashes
      are ignored, the focal length is only checked. Lines with the depth None (KITTI) are counted and omitted.
    - `*.csv` with the columns rgb and depth, relative to the two prefixes, and optionally units_per_meter, fx, fy, cx,
      cy, max_eval_depth_m and notes. Options given here override its columns.
    - folders: every file below `img_path` that matches `names[0]`, with the file `names[1]` in the same folder below
      `depth_path`.

    Args:
        ann_file: list or table, relative to `data_root`.
        data_prefix: `img_path` and `depth_path`, the folders of images and depth maps, relative to `data_root`.
        names: patterns of images and depth maps, with {} for the common part, such as
            ("rgb_{}.jpg", "sync_depth_{}.png") for NYUv2's folders.
        scale: units of the depth files per meter: 1000 for millimeters, 256 for KITTI, 1 for meters.
        min_depth, max_depth: valid range in meters; depth outside is missing.
        intrinsics: (fx, fy, cx, cy) of all images, in pixels.
        expected: required number of pairs, such as 24231 and 654 in NYUv2.
        skip_missing: omit and count pairs with a missing file; only for training.
        options: options of mmengine's `BaseDataset`, such as `pipeline`.
    """

    METAINFO: ClassVar[dict[str, Any]] = dict(classes=(), palette=[])  # MMSegmentation's tools ask for both

    def __init__(
        self, *, ann_file: str = "", data_root: str = "", data_prefix: Mapping[str, str] | None = None,
        names: Sequence[str] | None = None, scale: float | None = None, min_depth: float = 0.0,
        max_depth: float | None = None, intrinsics: Sequence[float] | None = None, expected: int | None = None,
        skip_missing: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        prefix = dict(data_prefix or {})
        if not set(prefix) <= {"img_path", "depth_path"}:
            raise ConfigError(f"data_prefix has the keys {', '.join(prefix)}; allowed are img_path and depth_path")
        if ann_file and not ann_file.endswith((".txt", ".csv")):
            raise ConfigError(f"ann_file is {ann_file}; give a list (.txt) or a table (.csv) of pairs")
        if bool(ann_file) == bool(names):
            raise ConfigError(f"ann_file is {ann_file!r} and names is {names}; give exactly one of them")
        if names is not None and not (len(names) == 2 and all(name.count("{}") == 1 for name in names)):
            raise ConfigError(f"names is {names}; give two patterns with one {{}} each, such as ('{{}}.jpg', ...)")
        if (scale is None and not ann_file.endswith(".csv")) or (scale is not None and not scale > 0):
            raise ConfigError(f"scale is {scale}; give the units of the depth files per meter, such as 1000")
        if max_depth is not None and not 0 <= min_depth < max_depth:
            raise ConfigError(f"min_depth is {min_depth} and max_depth {max_depth}; 0 <= min_depth < max_depth, meters")
        if intrinsics is not None and not (len(intrinsics) == 4 and min(intrinsics[:2]) > 0):
            raise ConfigError(f"intrinsics is {intrinsics}; give (fx, fy, cx, cy) in pixels")
        if skip_missing and options.get("test_mode"):
            raise ConfigError("skip_missing=True would omit pairs from an evaluation; remove it from the test set")
        self.names, self.expected, self.skip_missing = names, expected, skip_missing
        self.common = {"depth_scale": scale, "max_depth": max_depth, "intrinsics": intrinsics}
        self.min_depth = min_depth
        prefix = {"img_path": "", "depth_path": "", **prefix}
        super().__init__(ann_file=ann_file, data_root=data_root, data_prefix=prefix, **options)
        skips = ("skip_broken", "skip_empty")
        if self.test_mode and any(getattr(step, skip, False) for step in self.pipeline.transforms for skip in skips):
            raise ConfigError(
                "skip_broken or skip_empty is True in a test pipeline, which cannot draw another pair; remove it"
            )

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return img_path, depth_path, depth_scale, min_depth and, where known, max_depth and intrinsics."""
        self.without_depth = 0
        pairs = list(self._folder_pairs(*self.names) if self.names else self._file_pairs())
        if not pairs:
            raise DatasetError(f"{self._source()} contains no pairs; check data_root (--data-root) and ann_file")
        missing = self._drop_missing(pairs)
        if self.expected not in (None, len(pairs)):
            raise DatasetError(
                f"{self._source()} contains {len(pairs)} pairs instead of {self.expected}; "
                "complete the dataset, or set expected=None for another one"
            )
        with suppress(DatasetError):  # reported when it is read
            self._metainfo["image_size"] = read_size(pairs[0]["img_path"])
        MMLogger.get_current_instance().info(
            f"{self._source()}: {len(pairs)} pairs ({self.without_depth} more without depth, {missing} missing)"
        )
        return pairs

    def _file_pairs(self) -> Iterator[dict[str, Any]]:
        try:
            lines = Path(self.ann_file).read_text("utf-8-sig").splitlines()
        except FileNotFoundError:
            raise DatasetError(
                f"there is no file {self.ann_file}; check data_root (--data-root) and ann_file "
                "(NYUv2: see pe-spatial prepare_nyu --help)"
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{self.ann_file} is not readable as text ({error}); give a list of pairs") from error
        yield from self._table(lines) if self.ann_file.endswith(".csv") else self._list(lines)

    def _list(self, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
        for number, line in enumerate(lines, 1):
            fields = line.split()
            if not fields:
                continue
            if len(fields) not in (2, 3) or not all(_number(length) > 0 for length in fields[2:]):
                raise DatasetError(
                    f"{self.ann_file}, line {number}: {line!r} is not 'image depth focal_length'; "
                    "fix or remove it (paths must not contain blanks; use a .csv for those)"
                )
            if fields[1] == "None":
                self.without_depth += 1
            else:
                yield self._pair(fields[0].lstrip("/"), fields[1].lstrip("/"), {})

    def _table(self, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
        rows = csv.DictReader(lines)
        rows.fieldnames = columns = [name.replace("metre", "meter") for name in rows.fieldnames or ()]
        unknown = [name for name in columns if name not in _COLUMNS]
        if unknown or not {"rgb", "depth"} <= set(columns) or set(columns) & set(_CAMERA) not in (set(), set(_CAMERA)):
            raise DatasetError(
                f"{self.ann_file} has the columns {', '.join(columns)}; it needs rgb and depth, and allows "
                f"{', '.join(_COLUMNS[2:])} (fx, fy, cx, cy together)"
            )
        for row in rows:
            numbers = {name: _number(row[name]) for name in columns if name in _COLUMNS[2:-1] and row[name]}
            wrong = [k for k, x in numbers.items() if not math.isfinite(x) or (x <= 0 and k not in ("cx", "cy"))]
            if wrong or not row["rgb"] or not row["depth"] or None in row:
                raise DatasetError(
                    f"{self.ann_file}, line {rows.line_num}: {lines[rows.line_num - 1]!r} has a wrong "
                    f"{wrong[0] if wrong else 'rgb, depth or number of fields'}; fix or remove it"
                )
            own = {
                "depth_scale": numbers.get("units_per_meter"),
                "max_depth": numbers.get("max_eval_depth_m"),
                "intrinsics": tuple(float(row[k]) for k in _CAMERA) if row.get("fx") else None,
            }
            if own["depth_scale"] is None and self.common["depth_scale"] is None:
                raise DatasetError(
                    f"{self.ann_file}, line {rows.line_num} has no units_per_meter; add it, or set scale of the dataset"
                )
            yield self._pair(row["rgb"], row["depth"], own)

    def _folder_pairs(self, image_name: str, depth_name: str) -> Iterator[dict[str, Any]]:
        root = Path(self.data_prefix["img_path"])
        if not root.is_dir():
            raise DatasetError(f"there is no folder {root}; check data_root (--data-root) and data_prefix")
        head, tail = image_name.split("{}")
        for path in sorted(path for path in root.rglob(f"{head}*{tail}") if not is_hidden(path, root)):
            stem = path.name[len(head) : len(path.name) - len(tail)]
            image = path.relative_to(root)
            yield self._pair(str(image), str(image.with_name(depth_name.replace("{}", stem))), {})

    def _pair(self, image: str, depth: str, own: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: own.get(key) if value is None else value for key, value in self.common.items()}
        return {
            "img_path": os.path.join(self.data_prefix["img_path"], image),
            "depth_path": os.path.join(self.data_prefix["depth_path"], depth),
            "min_depth": self.min_depth,
            **{key: value for key, value in values.items() if value is not None},
            "seg_fields": [],
        }

    def _drop_missing(self, pairs: list[dict[str, Any]]) -> int:
        """Remove pairs with a missing file, or raise DatasetError; return their number."""
        listed: dict[str, set[str]] = {}  # listing each folder once is far cheaper than checking each file

        def is_missing(path: str) -> bool:
            parent, name = os.path.split(path)
            if parent not in listed:
                listed[parent] = set(os.listdir(parent or ".")) if os.path.isdir(parent or ".") else set()
            return name not in listed[parent]

        images = {pair["img_path"] for pair in pairs if is_missing(pair["img_path"])}
        maps = {pair["depth_path"] for pair in pairs if is_missing(pair["depth_path"])}
        bad = [pair for pair in pairs if pair["img_path"] in images or pair["depth_path"] in maps]
        if bad and (not self.skip_missing or len(bad) == len(pairs)):
            files = [path for pair in bad for path in (pair["img_path"], pair["depth_path"]) if path in images | maps]
            more = f" and {len(files) - _NAMED} more" if len(files) > _NAMED else ""
            raise DatasetError(
                f"{len(images)} images and {len(maps)} depth maps of the {len(pairs)} pairs in {self._source()} "
                f"are missing: {', '.join(files[:_NAMED])}{more}; check data_root (--data-root) and data_prefix"
                + ("" if self.test_mode else ", or set skip_missing=True of the dataset to train without them")
            )
        pairs[:] = [pair for pair in pairs if pair["img_path"] not in images and pair["depth_path"] not in maps]
        return len(bad)

    def _source(self) -> str:
        return self.ann_file or self.data_prefix["img_path"]


def _number(text: str) -> float:
    """Return the number, or NaN if it is none or infinite."""
    try:
        return float(text) if math.isfinite(float(text)) else math.nan
    except ValueError:
        return math.nan
