"""Options of a training run that change its recipe: batch, freezing, averaging, early stopping, logs."""

import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict

from pe_spatial.engine.classes import add_imports
from pe_spatial.engine.nodes import LOADERS, core, leaves, type_name
from pe_spatial.engine.schedule import counts_epochs
from pe_spatial.errors import ConfigError, one_of

BACKENDS = {
    "wandb": ("wandb", "WandbVisBackend"),
    "mlflow": ("mlflow", "MLflowVisBackend"),
    "clearml": ("clearml", "ClearMLVisBackend"),
}


def count_images(cfg: Config, content: Mapping[str, Any] | None = None) -> int | None:
    """Return how many images an epoch of training shows; None if the training set is not a COCO file.

    Args:
        cfg: config of a training.
        content: COCO instances of the training set, if they are in memory.
    """
    node, times = cfg.train_dataloader.dataset, 1
    while node.get("dataset") or node.get("datasets"):
        times *= node.get("times", 1)
        node = node.get("dataset") or node["datasets"][0]
    if content is None:
        path = Path(node.get("data_root") or "", str(node.get("ann_file") or ""))
        if path.suffix != ".json" or not path.is_file():
            return None
        content = json.loads(path.read_bytes())
    images = {image["id"] for image in content["images"]}
    if (node.get("filter_cfg") or {}).get("filter_empty_gt"):
        images &= {annotation["image_id"] for annotation in content["annotations"]}
    return len(images) * times


def count_iterations(cfg: Config, steps: int | None) -> int | None:
    """Return the iterations of a training whose epochs have `steps`; None if unknown."""
    if counts_epochs(cfg):
        return steps and steps * cfg.train_cfg.max_epochs
    return cfg.train_cfg.max_iters


def fit_to_small_sets(cfg: Config) -> None:
    """Let each epoch begin with running workers: with few images their start would take most of the time."""
    for name in LOADERS:
        loader = cfg.get(name)
        if loader and loader.get("num_workers"):
            loader.setdefault("persistent_workers", True)


def report(cfg: Config) -> None:
    """Report the result of the best checkpoint after training."""
    if str((cfg.get("val_evaluator") or {}).get("type")).endswith("CheckedCocoMetric"):
        _add_hook(cfg, dict(type="ReportDetectionsHook"))


def set_batch(cfg: Config, number: int) -> None:
    """Train on `number` images per GPU and step, with a learning rate that fits if the config has a rule for it."""
    if number < 1:
        raise ConfigError(f"--batch is {number}; it must be at least 1")
    loader = cfg.train_dataloader
    sampler = loader.get("sampler") or {}
    if "source_ratio" in sampler:  # labeled and unlabeled images in one batch
        sampler["batch_size"] = number
    loader["batch_size"] = number


def scale_rate(cfg: Config) -> str | None:
    """Scale the learning rate with the batch by the config's rule; return a sentence if it has none."""
    if "base_batch_size" in (cfg.get("auto_scale_lr") or {}):
        cfg.auto_scale_lr.enable = True
        return None
    return f"the learning rate stays as it is: {cfg.filename} has no auto_scale_lr.base_batch_size to scale it from"


def use_bfloat16(cfg: Config) -> None:
    """Train under autocast to bfloat16, whatever optimizer wrapper the config has."""
    replaced = ("type", "loss_scale", "dtype", "use_fsdp")
    kept = {key: value for key, value in cfg.optim_wrapper.items() if key not in replaced}
    cfg.optim_wrapper = dict(type="BFloat16OptimWrapper", **kept)


def main_metric(cfg: Config) -> str | None:
    """Return the metric that tells which checkpoint is best; None if the config does not evaluate."""
    evaluators = cfg.get("val_evaluator")
    evaluator = evaluators[0] if isinstance(evaluators, list | tuple) and evaluators else evaluators
    kind = str((evaluator or {}).get("type"))
    if kind.endswith("IoUMetric"):
        return "mIoU"
    if not kind.endswith("CocoMetric"):
        return None
    metric = evaluator.get("metric", "bbox")
    names = [metric] if isinstance(metric, str) else list(metric)
    objects = next((name for name in ("bbox", "segm") if name in names), None)
    name = f"{objects}_mAP" if objects else "AR@300" if names == ["proposal_fast"] else "AR@1000"
    both = "TeacherStudent" in str((cfg.get("val_cfg") or {}).get("type"))
    return f"{'teacher/' * both}coco/{name}"


def keep_best(cfg: Config) -> None:
    """Keep the checkpoint with the best main metric, beside the last ones."""
    metric, hook = main_metric(cfg), cfg.default_hooks.get("checkpoint")
    if metric and hook and cfg.get("val_dataloader"):
        hook.update(save_best=metric, rule="greater")


def stop_early(cfg: Config, patience: int) -> None:
    """Stop when the main metric has not improved in `patience` validations."""
    metric = main_metric(cfg)
    if patience < 1 or not metric:
        why = f"it is {patience}" if patience < 1 else "the config has no validation by CocoMetric or IoUMetric"
        raise ConfigError(f"--patience needs at least one validation, and {why}")
    hook = dict(type="EarlyStoppingHook", monitor=metric, rule="greater", min_delta=0.001, patience=patience)
    _add_hook(cfg, hook)


def average_weights(cfg: Config, iterations: int | None) -> None:
    """Evaluate and save an exponential moving average of the weights, over about a twentieth of the training."""
    if any("EMAHook" in str(hook.get("type")) for hook in cfg.get("custom_hooks") or []):
        return
    momentum = 0.0002 if iterations is None else min(0.1, max(0.0002, 20 / iterations))
    gamma = 2000 if iterations is None else max(1, iterations // 20)
    options = dict(momentum=float(f"{momentum:.2g}"), gamma=gamma, update_buffers=True)
    _add_hook(cfg, dict(type="EMAHook", ema_type="ExpMomentumEMA", **options, priority="NORMAL"))


def cache_features(cfg: Config, folder: str, *, dtype: str | None = None, views: int | None = None) -> None:
    """Train on features of the frozen encoder in `folder`; the options are those of `CacheOptions`."""
    options = {key: value for key, value in dict(dtype=dtype, views=views).items() if value is not None}
    _add_hook(cfg, dict(type="CacheFeaturesHook", folder=folder, **options))
    add_imports(cfg, "pe_spatial.engine")


def read_as_in_testing(cfg: Config) -> None:
    """Train on images as evaluation sees them, without augmentation; labels are resized with them.

    Segmentation and depth crop the center to the size of the training's random crop.
    """
    evaluation = cfg.val_dataloader.dataset.pipeline
    resizing = [step for step in evaluation if not type_name(step).startswith(("Load", "Pack"))]
    dataset, mixing = cfg.train_dataloader.dataset, []
    while "pipeline" in dataset and "dataset" in dataset:  # mixes several images
        mixing += dataset.pipeline
        dataset = dataset.dataset
    cfg.train_dataloader.dataset = dataset
    for leaf in leaves(dataset):
        if "pipeline" not in leaf:
            raise ConfigError(f"the training set is a {leaf.type}, which has no pipeline; give a dataset with one")
        steps = [*leaf.pipeline, *mixing]
        crop = next((step for step in steps if type_name(step).endswith("RandomCrop")), None)
        dense = cfg.get("default_scope") == "mmseg"
        crops = [dict(type="CropPackedCenter", size=_size(crop))] if crop and dense else []
        loading = [step for step in steps if type_name(step).startswith("Load")]
        packing = [step for step in steps if type_name(step).startswith(("Filter", "Pack"))]
        leaf.pipeline = [*loading, *resizing, *packing, *crops]
    cfg.custom_hooks = [one for one in cfg.get("custom_hooks") or [] if type_name(one) != "PipelineSwitchHook"]
    add_imports(cfg, "pe_spatial.engine")


def _size(crop: Mapping[str, Any]) -> tuple[int, int]:
    size = crop.get("crop_size", crop.get("size"))
    return (size, size) if isinstance(size, int) else tuple(size)


def freeze(cfg: Config, blocks: int) -> None:
    """Freeze the patch embedding and the first blocks of the encoder, or the first stages of another backbone."""
    backbone = core(cfg.model).get("backbone")
    if not backbone:
        raise ConfigError(f"--freeze {blocks}: {cfg.filename} has no model.backbone")
    backbone["frozen_stages"] = blocks


def balance(cfg: Config, threshold: float) -> None:
    """Show images with classes in fewer than this fraction of the images more often (LVIS's repeat factors)."""
    if not 0 < threshold <= 1:
        raise ConfigError(f"--balance is {threshold}; give a fraction of the images, above 0 and at most 1")
    for leaf in leaves(cfg.train_dataloader.dataset):
        options = dict(leaf)
        leaf.clear()
        leaf.update(type="ClassBalancedDataset", oversample_thr=threshold, dataset=ConfigDict(options))


def log_to(cfg: Config, names: Sequence[str]) -> None:
    """Log to these services through mmengine's backends, and to TensorBoard if it is installed."""
    visualizer = cfg.setdefault("visualizer", ConfigDict(type="Visualizer"))
    backends = list(visualizer.get("vis_backends") or [dict(type="LocalVisBackend")])
    for name in names:
        module, kind = BACKENDS[one_of("--log", name, tuple(BACKENDS))]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(f"--log {name} needs the package {module}, which is not installed: pip install {module}")
        backends.append(dict(type=kind))
    if importlib.util.find_spec("tensorboard"):
        backends.append(dict(type="TensorboardVisBackend"))
    kinds = [backend["type"] for backend in backends]
    visualizer["vis_backends"] = [b for i, b in enumerate(backends) if b["type"] not in kinds[:i]]


def _add_hook(cfg: Config, hook: Mapping[str, Any]) -> None:
    cfg.custom_hooks = [*(cfg.get("custom_hooks") or []), ConfigDict(hook)]
