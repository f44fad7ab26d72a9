"""A validation part split off from the training images."""

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

from pe_spatial.data.files import progress

T = TypeVar("T")


def split_off(
    paths: Mapping[str, str], classes: Mapping[str, set[str]], *, fraction: float, seed: int
) -> tuple[set[str], int]:
    """Choose images for validation, stratified by class: rare classes first, and never the last image of a class.

    Args:
        paths: image id -> file. Identical files stay together.
        classes: image id -> classes of its objects.
        fraction: of the images; at least one group of identical files is taken, and one is left.
        seed: of the choice.

    Returns:
        Ids of the chosen images (empty if all files are identical), and the number of duplicates.
    """
    groups = identical_files(paths)
    if len(groups) < 2:
        return set(), len(paths) - len(groups)
    random.Random(seed).shuffle(groups)
    labels = [{label for image in group for label in classes.get(image, ())} for group in groups]
    total = Counter(label for found in labels for label in found)
    wanted = max(1, round(fraction * len(groups)))
    chosen: set[int] = set()
    taken: Counter[str] = Counter()

    def take(candidates: Sequence[int], count: int) -> None:
        for i in candidates:
            if count < 1 or len(chosen) >= wanted:
                return
            if i not in chosen and all(total[label] - taken[label] > 1 for label in labels[i]):
                chosen.add(i)
                taken.update(labels[i])
                count -= 1

    members: defaultdict[str, list[int]] = defaultdict(list)
    for i, found in enumerate(labels):
        for label in found:
            members[label].append(i)
    for label in sorted(members, key=lambda label: (total[label], label)):
        take(members[label], round(fraction * total[label]) - taken[label])
    negatives = [i for i, found in enumerate(labels) if not found]
    take(negatives, round(fraction * len(negatives)))
    take(sorted(range(len(groups)), key=lambda i: -len(labels[i])), wanted)
    if not any(labels[i] for i in chosen):  # each class is in one image alone
        chosen = {max(range(len(groups)), key=lambda i: len(labels[i]))}
    return {image for i in chosen for image in groups[i]}, len(paths) - len(groups)


def identical_files(paths: Mapping[str, str]) -> list[list[str]]:
    """Group ids by the bytes of their files; only files of equal size and equal ends are read completely."""
    links: dict[tuple[int, int], list[str]] = {}
    by_size: defaultdict[Hashable, list[tuple[int, int]]] = defaultdict(list)
    for image, path in progress(paths.items(), "comparing images"):
        status = os.stat(path)
        file = (status.st_dev, status.st_ino)
        if file not in links:
            by_size[status.st_size].append(file)
        links.setdefault(file, []).append(image)
    groups: list[list[str]] = []
    for same_size in progress(by_size.values(), "comparing images of equal size"):
        for same_end in _grouped(same_size, lambda file: _digest(paths[links[file][0]], last=4096)):
            for same in _grouped(same_end, lambda file: _digest(paths[links[file][0]])):
                groups.append([image for file in same for image in links[file]])
    return groups


def _grouped(values: Sequence[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    groups: dict[Hashable, list[T]] = {}
    for value in values:
        groups.setdefault(key(value) if len(values) > 1 else None, []).append(value)
    return list(groups.values())


def _digest(path: str, last: int | None = None) -> bytes:
    with open(path, "rb") as file:
        if last:
            file.seek(max(0, os.path.getsize(path) - last))
        return hashlib.sha256(file.read()).digest()
