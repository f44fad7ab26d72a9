"""The images of files, folders and videos, in an order and with names that do not change."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from pe_spatial.errors import DatasetError
from pe_spatial.images import image_suffixes, is_hidden, read_rgb
from pe_spatial.video import VIDEOS, count_frames, decode_video


@dataclass(frozen=True)
class InputImage:
    """An image or a frame of a video."""

    name: str  # of its results
    path: Path
    read: Callable[[], np.ndarray]  # returns (H, W, 3) uint8 RGB, or raises DatasetError


class Sources:
    """The images of files, folders (searched recursively) and videos; it can be iterated over repeatedly.

    The folder `exclude`, such as that of the results, and hidden files and folders are skipped. `omitted` counts the
    other files of the folders by suffix. Raises DatasetError for a path that does not exist, for folders without images
    and for two images of one name.
    """

    def __init__(self, paths: Sequence[str | Path], *, exclude: Path) -> None:
        exclude = exclude.resolve()
        self._files: dict[str, Path] = {}
        self.omitted: Counter[str] = Counter()
        for root in map(Path, paths):
            if not root.exists():
                raise DatasetError(f"there is no file or folder {root}; check the path")
            for path in [root] if root.is_file() else _files_below(root, exclude):
                if path != root and path.suffix.lower() not in (*image_suffixes(), *VIDEOS):
                    self.omitted[path.suffix.lower() or path.name] += 1
                    continue
                name = path.stem if root.is_file() else str(path.relative_to(root).with_suffix(""))
                other = self._files.setdefault(name, path)
                if other != path:
                    raise DatasetError(f"{other} and {path} would both be written as {name}; run them separately")
        if not self._files:
            raise DatasetError(
                f"{', '.join(map(str, paths))} contains no images ({', '.join((*image_suffixes(), *VIDEOS))})"
            )

    def __len__(self) -> int:
        """Return the number of images and frames; videos may announce a wrong number."""
        return sum(_count(path) for path in self._files.values())

    def __iter__(self) -> Iterator[InputImage]:
        for name, path in self._files.items():
            if _is_video(path):
                yield from _frames(name, path)
            else:
                yield InputImage(name, path, partial(read_rgb, path))


def _files_below(root: Path, exclude: Path) -> list[Path]:
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and not is_hidden(path, root))
    return [path for path in paths if exclude not in path.resolve().parents]


def _is_video(path: Path) -> bool:
    return path.suffix.lower() in VIDEOS


def _count(path: Path) -> int:
    try:
        return count_frames(path) if _is_video(path) else 1
    except DatasetError:  # reported when it is read
        return 1


def _frames(name: str, path: Path) -> Iterator[InputImage]:
    number = 0
    try:
        for rgb in decode_video(path):
            yield InputImage(f"{name}/{number:06d}", path, partial(np.asarray, rgb))
            number += 1
    except DatasetError as error:
        yield InputImage(f"{name}/{number:06d}", path, partial(_fail, error))


def _fail(error: DatasetError) -> np.ndarray:
    raise error
