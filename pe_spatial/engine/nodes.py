"""Parts of a config, wherever they are: datasets inside wrappers, pipelines, transforms."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mmengine.config import Config, ConfigDict

LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
EVALUATORS = ("val_evaluator", "test_evaluator", "tta_evaluator")


def leaves(dataset: Any) -> Iterator[ConfigDict]:
    """Yield the datasets inside wrappers (RepeatDataset, ConcatDataset, MultiImageMixDataset, ...) of a config."""
    if isinstance(dataset, list | tuple):
        for one in dataset:
            yield from leaves(one)
    elif dataset:
        inner = dataset.get("dataset") or dataset.get("datasets")
        yield from leaves(inner) if inner else [dataset]


def pipelines(cfg: Config) -> Iterator[list[Any]]:
    """Yield every pipeline of a config: of datasets and their wrappers, of test-time augmentation, of hooks."""
    nodes = [cfg.get(name) for name in (*LOADERS, "custom_hooks")]
    while nodes:
        node = nodes.pop()
        if isinstance(node, Mapping):
            for key, value in node.items():
                if key.endswith("pipeline") and isinstance(value, list):
                    yield value
                nodes.append(value)
        elif isinstance(node, list | tuple):
            nodes += node
    yield cfg.get("tta_pipeline") or []


def steps(pipeline: Any) -> Iterator[ConfigDict]:
    """Yield the transforms of a pipeline, also those inside RandomApply, MultiBranch and the like."""
    if isinstance(pipeline, Mapping):
        if "type" in pipeline:
            yield pipeline
        for value in pipeline.values():
            yield from steps(value)
    elif isinstance(pipeline, list | tuple):
        for value in pipeline:
            yield from steps(value)


def replace_dataset(leaf: Any, *, keep: Sequence[str], **options: Any) -> None:
    """Make a dataset of a config another one, with what it states of the options `keep`."""
    kept = {key: leaf[key] for key in keep if key in leaf}
    leaf.clear()
    leaf.update(kept, **options)


def type_name(node: Mapping[str, Any]) -> str:
    """Return the type of a config without its scope."""
    return str(node.get("type")).rpartition(".")[2].strip("'>")


_CHECKED = {"CocoDataset": "CheckedCocoDataset", "CocoMetric": "CheckedCocoMetric"}


def use_checked(node: dict[str, Any]) -> bool:
    """Let MMDetection's CocoDataset or CocoMetric with an annotation file be the checked one; return whether it was."""
    checked = _CHECKED.get(str(node.get("type")).removeprefix("mmdet."))
    if not checked or not node.get("ann_file"):
        return False
    node["type"] = checked
    return True


def core(model: Any) -> Any:
    """Return the part of a model that has backbone and heads: trackers, semi-supervision and TTA wrap it."""
    while "detector" in model or "module" in model:
        model = model.get("detector") or model["module"]
    return model
