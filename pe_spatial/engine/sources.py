"""The images of files, folders and videos, in an order and with names that do not change."""

import glob
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
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
    """The images of files, folders (searched recursively), patterns (*.jpg) and videos; it can be iterated repeatedly.

    `files` has them by the name of their results. The folder `exclude`, such as that of the results, and hidden files
    and folders are skipped. `omitted` counts the other files of the folders by suffix. Raises DatasetError for a path
    that does not exist, for folders without images, for folders in `exclude`, and for two images of one name.
    """

    def __init__(self, paths: Sequence[str | Path], *, exclude: Path) -> None:
        exclude = exclude.resolve()
        self.files: dict[str, Path] = {}
        self.omitted: Counter[str] = Counter()
        for text in map(str, paths):
            if "://" in text:
                raise DatasetError(f"{text} is an address; download it, and give the path of the file")
            root, found = _expand(text, exclude)
            for path in found:
                if path != root and path.suffix.lower() not in (*image_suffixes(), *VIDEOS):
                    self.omitted[path.suffix.lower() or path.name] += 1
                    continue
                name = path.stem if path == root else str(path.relative_to(root).with_suffix(""))
                other = self.files.setdefault(name, path)
                if other != path:
                    raise DatasetError(f"{other} and {path} would both be written as {name}; run them separately")
        if not self.files:
            raise DatasetError(
                f"{', '.join(map(str, paths))} contains no images ({', '.join((*image_suffixes(), *VIDEOS))})"
            )

    def __len__(self) -> int:
        """Return the number of images and frames; videos may announce a wrong number."""
        return sum(count_images(path) for path in self.files.values())

    def __iter__(self) -> Iterator[InputImage]:
        for name, path in self.files.items():
            if is_video(path):
                yield from _frames(name, path)
            else:
                yield InputImage(name, path, partial(read_rgb, path))


def _expand(text: str, exclude: Path) -> tuple[Path, list[Path]]:
    """Return the files of a path or a pattern, and the folder below which their names begin (a file: itself)."""
    root = Path(text)
    if not root.exists() and glob.has_magic(text):
        parts = list(takewhile(lambda part: not glob.has_magic(part), root.parts))
        files = [Path(path) for path in sorted(glob.glob(text, recursive=True)) if Path(path).is_file()]
        if not files:
            raise DatasetError(f"no file matches {text}; check the pattern")
        return Path(*parts), files
    if not root.exists():
        raise DatasetError(f"there is no file or folder {root}; check the path")
    if root.is_file():
        return root, [root]
    if exclude in (root.resolve(), *root.resolve().parents):
        raise DatasetError(f"{root} is in the folder of the results, {exclude}; write them to another folder")
    return root, _files_below(root, exclude)


def _files_below(root: Path, exclude: Path) -> list[Path]:
    paths = (path for path in sorted(root.rglob("*")) if path.is_file() and not is_hidden(path, root))
    return [path for path in paths if exclude not in path.resolve().parents]


def is_video(path: Path) -> bool:
    """Return whether a file is a video by its suffix."""
    return path.suffix.lower() in VIDEOS


def count_images(path: Path) -> int:
    """Return the frames that a video announces, or 1 for an image."""
    try:
        return count_frames(path) if is_video(path) else 1
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
