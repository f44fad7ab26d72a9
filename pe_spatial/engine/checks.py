"""Checks of a run before its first step: annotation files, and the classes of heads, datasets and evaluators."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import DATASETS
from mmengine.runner import BaseLoop, Runner

from pe_spatial.errors import ConfigError, DatasetError, listed

NOT_OF_THE_DATA = ("rpn_head", "backbone", "data_preprocessor", "reid", "semantic_head")
"""Parts of a model with classes of their own: objects or not, persons, stuff."""


def neighbors(path: str) -> str:
    """Say which JSON files are beside a path that does not exist."""
    folder = os.path.dirname(path) or "."
    if not os.path.isdir(folder):
        return f"there is no folder {folder}"
    files = sorted(name for name in os.listdir(folder) if name.endswith(".json") and not name.startswith("."))
    return f"{folder} contains {listed(files, 20) or 'no json'}"


def check_files(cfg: Config, split: str) -> None:
    """Raise an error if an annotation file of a split is absent, or its evaluator reads another one."""
    loader = cfg.get(f"{split}_dataloader")
    if not loader:
        return
    for place, dataset in _with_files(loader.dataset, f"{split}_dataloader.dataset"):
        _check_exists(_path(dataset), f"{place}.ann_file")
        _check_folders(dataset, place)
    evaluators = cfg.get(f"{split}_evaluator") or []
    single = not isinstance(evaluators, list | tuple)
    for i, evaluator in enumerate([evaluators] if single else evaluators):
        option = f"{split}_evaluator.ann_file" if single else f"{split}_evaluator.{i}.ann_file"
        path = evaluator.get("ann_file")
        read = _path(loader.dataset)
        if path and read and os.path.abspath(path) != os.path.abspath(read):
            raise ConfigError(
                f"the {split} set is {read}, but its evaluator reads {path}; evaluate with the same file: "
                f"--cfg-options {option}={read}"
            )
        _check_exists(path, option)


def _with_files(node: Any, place: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the datasets with an annotation file, which may be inside wrappers and lists, and where they are."""
    if isinstance(node, Mapping):
        if isinstance(node.get("ann_file"), str):
            yield place, node
        for key in ("dataset", "datasets"):
            yield from _with_files(node.get(key), f"{place}.{key}")
    elif isinstance(node, list | tuple):
        for i, entry in enumerate(node):
            yield from _with_files(entry, f"{place}.{i}")


def _path(dataset: Mapping[str, Any]) -> str:
    """Return the annotation file of a dataset, as mmengine joins it; '' if it has none."""
    file = dataset.get("ann_file")
    return os.path.join(dataset.get("data_root") or "", file) if isinstance(file, str) and file else ""


def _check_exists(path: str | None, option: str) -> None:
    if path and path.endswith(".json") and "://" not in path and not os.path.isfile(path):
        raise DatasetError(
            f"no annotation file at {path}; {neighbors(path)}. Check data_root (--data-root), or set {option}"
        )


def _check_folders(dataset: Mapping[str, Any], place: str) -> None:
    """Check the folders of the images; a prefix without a slash at its end may be the beginning of names."""
    root, prefixes = dataset.get("data_root") or "", dataset.get("data_prefix")
    for key, prefix in prefixes.items() if isinstance(prefixes, Mapping) else ():
        folder = os.path.dirname(os.path.join(root, prefix)) if isinstance(prefix, str) else ""
        if folder and "://" not in folder and not os.path.isdir(folder):
            raise DatasetError(
                f"there is no folder {folder}; check data_root (--data-root), or set {place}.data_prefix.{key}"
            )


@contextmanager
def empty_sets_as_errors(cfg: Config, *splits: str) -> Iterator[None]:
    """Explain the ValueError with which mmengine ends where no image of a set has a usable object."""
    try:
        yield
    except ValueError as error:
        if "need at least one array to concatenate" not in str(error):
            raise
        sets = [found for split in splits for found in _with_files(cfg[f"{split}_dataloader"], split)]
        raise DatasetError("; ".join(_describe_classes(dataset) for _, dataset in sets)) from error


def _describe_classes(dataset: Mapping[str, Any]) -> str:
    path = _path(dataset)
    wanted = (dataset.get("metainfo") or {}).get("classes") or DATASETS.get(dataset["type"]).METAINFO.get("classes", ())
    try:
        with open(path, encoding="utf-8-sig") as file:
            names = [category["name"] for category in json.load(file)["categories"]]
    except (OSError, ValueError, KeyError, TypeError):
        names = ["no readable categories"]
    return (
        f"no image of {path} has a usable object of the classes of the config, {listed(wanted, 20)}; the file has "
        f"{listed(names, 20)}. Set metainfo.classes of the dataset to those"
    )


class CheckClassesHook(Hook):
    """Refuse a run in which a head does not have as many classes as the data, or two sets have different classes."""

    def before_run(self, runner: Runner) -> None:
        """Compare the model with the datasets of all loops that were built."""
        loops = {split: getattr(runner, f"_{split}_loop", None) for split in ("train", "val", "test")}
        datasets = {split: loop.dataloader.dataset for split, loop in loops.items() if isinstance(loop, BaseLoop)}
        metas = {split: getattr(dataset, "metainfo", {}) for split, dataset in datasets.items()}
        check_classes(runner.cfg.get("model"), metas)
        for split, dataset in datasets.items():
            classes, ids = metas[split].get("classes") or (), getattr(dataset, "cat_ids", None)
            if ids is not None and len(ids) < len(classes):  # mmdet's own dataset numbers the others without a gap
                text = (
                    f"{dataset.ann_file} has {len(ids)} of the {len(classes)} classes ({listed(classes)}) of the "
                    "config; labels count only those. Set metainfo.classes of the dataset to the categories of the file"
                )
                if not ids:
                    raise DatasetError(text)
                runner.logger.warning(text)


def check_classes(model: Any, metas: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ConfigError if heads of `model`, a config, and the `metainfo` of datasets differ in their classes.

    Args:
        model: of a detector or segmenter; other models have no `num_classes`.
        metas: `metainfo` by split ('train', 'val', 'test').
    """
    metas = {split: meta for split, meta in metas.items() if _is_named(meta.get("classes"))}
    if not isinstance(model, Mapping) or not metas:
        return
    (first, meta), *others = metas.items()
    for split, other in others:
        if tuple(other["classes"]) != tuple(meta["classes"]):
            raise ConfigError(
                f"the {first} set has the classes {listed(meta['classes'])} ({len(meta['classes'])}) and the {split} "
                f"set {listed(other['classes'])} ({len(other['classes'])}); give both the same, in the same order: "
                f"--cfg-options {split}_dataloader.dataset.metainfo.classes=..."
            )
    number = len(meta["classes"])
    allowed = {number, len(meta.get("thing_classes", meta["classes"]))}
    heads = {place: count for place, count in _class_counts(model, "model") if count not in allowed}
    if heads:
        options = dict.fromkeys(_without_indices(place) for place in heads)
        raise ConfigError(
            f"the {first} set has {number} class{'es' * (number != 1)} ({listed(meta['classes'])}), but "
            f"{', '.join(f'{place} is {count}' for place, count in heads.items())}; set "
            f"--cfg-options {' '.join(f'{option}={number}' for option in options)}"
        )


def _is_named(classes: Any) -> bool:
    return isinstance(classes, list | tuple) and len(classes) > 0


def _class_counts(node: Any, place: str) -> Iterator[tuple[str, int]]:
    """Yield each `num_classes` of a model's heads, and where it is."""
    if isinstance(node, list | tuple):
        for i, entry in enumerate(node):
            yield from _class_counts(entry, f"{place}.{i}")
    elif isinstance(node, Mapping) and "language_model" not in node:  # it detects what a text names
        for key, value in node.items():
            if key == "num_classes" and isinstance(value, int):
                yield f"{place}.{key}", value
            elif key not in NOT_OF_THE_DATA and "teacher" not in key:
                yield from _class_counts(value, f"{place if key == 'module' else f'{place}.{key}'}")


def _without_indices(place: str) -> str:
    return ".".join(part for part in place.split(".") if not part.isdigit())
