"""The files below a folder, the split that a name belongs to, and images found by the ends of their paths."""

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pe_spatial.errors import DatasetError
from pe_spatial.images import image_suffixes

T = TypeVar("T")
SPLITS = ("train", "val", "test")
_SPLIT = re.compile(r"(?<![a-z])(?:(train(?:ing|val)?)|(min-?ival|val(?:id(?:ation)?)?)|(test(?:ing)?))(?![a-z])")


class Files:
    """All files below a folder that are neither hidden nor in work_dirs; links to folders are followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.by_suffix: defaultdict[str, list[Path]] = defaultdict(list)
        self.images: set[str] = set()
        self._by_name: defaultdict[str, list[str]] = defaultdict(list)
        suffixes, seen = set(image_suffixes()), set()
        for folder, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(folder)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "work_dirs")
            if real in seen:  # a link to a folder above
                folders.clear()
                continue
            for name in sorted(names):
                suffix = os.path.splitext(name)[1].lower()
                if name.startswith("."):
                    continue
                if suffix in suffixes:
                    path = os.path.join(folder, name)
                    self.images.add(path)
                    self._by_name[name].append(path)
                else:
                    self.by_suffix[suffix].append(Path(folder, name))
            seen.add(real)

    def relative(self, path: Path | str) -> str:
        return os.path.relpath(path, self.root)

    def locate(self, names: Sequence[str], folder: Path, split: str | None) -> tuple[list[str | None], str]:
        """Find images by the names in an annotation file.

        A name leads there from `folder`, or it ends as the path of an image does. Where several images do, those in
        the folder that has the most of them are taken; never those in a folder that is named after another split.

        Returns:
            The path of each image, None if there is none; and a sentence if the names lead elsewhere, or ''.
        """
        names = [os.path.normpath(name.replace("\\", "/")) for name in names]
        paths: list[str | None] = []
        for name in names:
            path = os.path.normpath(os.path.join(folder, name))
            paths.append(path if path in self.images or os.path.isfile(path) else None)
        absent = [i for i, path in enumerate(paths) if path is None]
        candidates = {i: dict(self._ends(names[i], split)) for i in absent}
        votes = Counter(key for keys in candidates.values() for key in keys)

        def rank(key: tuple[str, str]) -> tuple[Any, ...]:
            named = split is not None and self.split_of(key[0]) == split
            return (named and votes[key] >= len(absent) / 2, votes[key], -len(key[1]), named, -len(key[0]))

        replaced: set[tuple[str, str]] = set()
        for i in absent:
            if candidates[i]:
                key = max(candidates[i], key=rank)
                paths[i] = candidates[i][key]
                replaced.update([key] if key[1] else [])
        told = ", ".join(f"{old} is now {new}" for new, old in sorted(replaced)[:3])
        return paths, f"paths lead elsewhere and were matched by their ends: {told}" if replaced else ""

    def _ends(self, name: str, split: str | None) -> Iterator[tuple[tuple[str, str], str]]:
        """Yield ((folder, what it replaces of `name`), path) for each image with the longest common end."""
        parts = name.split("/")
        for path in self._by_name.get(parts[-1], ()):
            own = path.split(os.sep)
            same = next((i for i, (a, b) in enumerate(zip(parts[::-1], own[::-1], strict=False)) if a != b), len(parts))
            base, replaced = os.sep.join(own[:-same]), "/".join(parts[:-same])
            if split is None or self.split_of(base) in (None, split):
                yield (base, replaced), path

    def split_of(self, path: Path | str) -> str | None:
        """Return the split that a path below the root is named after, by its last part that names one."""
        return split_of(self.relative(path))


def split_of(path: Path | str) -> str | None:
    """Return 'train', 'val' or 'test' by the last part of a relative path that contains such a word, or None."""
    for part in reversed(Path(path).parts):
        match = _SPLIT.search(Path(part).stem.lower())
        if match:
            return SPLITS[next(i for i, group in enumerate(match.groups()) if group)]
    return None


def read_json(path: Path) -> Any:
    """Read JSON of any Unicode encoding; DatasetError if that fails."""
    try:
        data = path.read_bytes()
        return json.loads(data.decode(json.detect_encoding(data)))
    except OSError as error:
        raise DatasetError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from error
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not valid JSON ({error}); download or write it again") from error


def progress(values: Iterable[T], what: str) -> Iterable[T]:
    """Show a progress bar where the loop takes longer than a second."""
    return tqdm(values, desc=what, delay=1, leave=False, disable=None)
