"""From a checkpoint to a config, a kind of task, and a model with its test pipeline."""

from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial.engine.configs import config_in, read_config
from pe_spatial.engine.nodes import leaves, type_name
from pe_spatial.errors import ConfigError


def config_and_weights(source: str | Path, config: str | Path | Config | None = None) -> tuple[Config, str]:
    """Return the config of `source`, and where the weights are; see `pe_spatial.load`."""
    weights = str(source)
    if weights.endswith(".py"):
        cfg = read_config(weights)
        if config is not None:
            raise ConfigError(f"{source} is a config already; give the checkpoint first, and this one as config")
        if not cfg.get("load_from"):
            raise ConfigError(f"{source} has no weights (load_from); give a checkpoint, and this file as its config")
        return cfg, cfg.load_from
    if config is None:
        return config_in(weights), weights
    return (config if isinstance(config, Config) else read_config(str(config))), weights


def task_of(cfg: Config) -> str:
    """Return 'detection', 'segmentation', 'depth' or 'tracking'; ConfigError for a model of no such kind."""
    model = cfg.get("model") or {}
    kind, scope = str(model.get("type")), cfg.get("default_scope")
    if kind == "PEDepthEstimator":
        return "depth"
    if "tracker" in model:
        return "tracking"
    if kind == "ZeroShotTracker":
        raise ConfigError("a ZeroShotTracker starts from a mask of the first frame; use pe-spatial track_zero_shot")
    if "." in kind:
        scope = kind.partition(".")[0]
    tasks = {"mmdet": "detection", "mmseg": "segmentation"}
    if scope not in tasks:
        raise ConfigError(f"a {kind} of {scope} has no predictor; those are detectors, segmenters, depth and trackers")
    return tasks[scope]


def test_dataset(cfg: Config) -> ConfigDict:
    """Return the first dataset of the test, without wrappers, that has a pipeline."""
    for name in ("test_dataloader", "val_dataloader"):
        loader = cfg.get(name) or {}
        for dataset in leaves(loader.get("dataset")):
            if dataset.get("pipeline"):
                return dataset
    raise ConfigError("the config has no test_dataloader with a pipeline, which prepares the images; add one")


def without_loading(pipeline: Any) -> list[Any]:
    """Return a pipeline without the steps that read images and annotations."""
    return [step for step in pipeline if not type_name(step).startswith("Load")]


def find_meta(cfg: Config, rest: dict[str, Any]) -> dict[str, Any]:
    """Return `classes` and `palette` of a checkpoint's other entries, else those of the config's test dataset."""
    meta = rest.get("meta")
    found = (meta.get("dataset_meta") if isinstance(meta, dict) else None) or {}
    found = {str(key).lower(): value for key, value in found.items()}
    if found.get("classes"):
        return found
    dataset = test_dataset(cfg)
    if (dataset.get("metainfo") or {}).get("classes"):
        return dict(dataset.metainfo)
    with DATASETS.switch_scope_and_registry(cfg.get("default_scope")) as registry:
        kind = registry.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    return dict(getattr(kind, "METAINFO", {}))
