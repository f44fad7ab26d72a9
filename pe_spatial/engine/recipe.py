"""Options of a training run that change its recipe: batch, freezing, averaging, early stopping, image size, logs."""

import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from pe_spatial.engine.nodes import LOADERS, core, leaves, pipelines, steps, type_name
from pe_spatial.engine.schedule import counts_epochs
from pe_spatial.engine.summary import encoders
from pe_spatial.errors import ConfigError, one_of

BACKENDS = {
    "wandb": ("wandb", "WandbVisBackend"),
    "mlflow": ("mlflow", "MLflowVisBackend"),
    "clearml": ("clearml", "ClearMLVisBackend"),
}

_SIZES = ("scale", "scales", "img_scale", "crop_size", "size", "resize_limits", "random_size_range")
_MIXING = ("Mosaic", "CachedMosaic", "MixUp", "CachedMixUp")
_SMALLEST = 96  # of the sizes of images in a pipeline, in pixels; smaller numbers mean something else


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


def batch_rectangles(cfg: Config) -> None:
    """Form batches of either landscape or portrait images, and pad them to complete windows instead of squares."""
    mixing = next((step for p in pipelines(cfg) for step in steps(p) if type_name(step) in _MIXING), None)
    if mixing or cfg.get("default_scope") == "mmseg" or "input_size" in _anchors(cfg):
        why = f"{type_name(mixing)} mixes images into squares" if mixing else "its model takes images of one size"
        raise ConfigError(f"--rectangular does not suit {cfg.filename}: {why}; omit it")
    for pipeline in pipelines(cfg):
        pipeline[:] = [one for one in pipeline if type_name(one) != "Pad" or "size_divisor" in one]
    preprocessor = _preprocessor(cfg)
    augments = preprocessor.get("batch_augments") or []
    if augments:
        preprocessor["batch_augments"] = [one for one in augments if type_name(one) != "BatchFixedSizePad"]
    preprocessor["pad_size_divisor"] = max(preprocessor.get("pad_size_divisor", 1), _unit(cfg)[0])
    for name in ("train_dataloader", "val_dataloader"):
        if cfg.get(name):
            cfg[name]["batch_sampler"] = dict(type="AspectRatioBatchSampler")


def set_image_size(cfg: Config, side: int) -> str:
    """Scale all image sizes of a config so that the longer side in testing is about `side` pixels; return what it is.

    Sides are rounded to complete windows of the encoder, or to the coarsest stride.
    """
    if cfg.get("default_scope") == "mmseg":
        raise ConfigError(f"--image-size is for detection; set crop_size and scale in the pipelines of {cfg.filename}")
    if "input_size" in _anchors(cfg):
        size = _anchors(cfg)["input_size"]
        raise ConfigError(f"--image-size: the anchors of {cfg.filename} belong to images of {size} px")
    unit, what = _unit(cfg)
    rounded = max(1, round(side / unit)) * unit
    old = _longest_side(cfg)
    ratio = rounded / old

    def scaled(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(scaled, value))
        if isinstance(value, int) and value >= _SMALLEST:
            return rounded if value == old else round(value * ratio)
        return value

    for pipeline in pipelines(cfg):
        for step in steps(pipeline):
            for key in (*_SIZES, *(("pad_to",) if "pad_to" in step else ())):
                if key in step and not isinstance(step[key], str | Mapping):
                    step[key] = scaled(step[key])
    preprocessor = _preprocessor(cfg)
    if preprocessor.get("pad_size_divisor", 1) >= _SMALLEST:
        preprocessor["pad_size_divisor"] = scaled(preprocessor["pad_size_divisor"])
    for augment in preprocessor.get("batch_augments") or []:
        for key in ("size", "random_size_range"):
            if key in augment:
                augment[key] = scaled(augment[key])
    note = "" if rounded == side else f" (--image-size {side} rounded to multiples of {unit} px, {what})"
    return f"images have {rounded} px at their longer side{note}"


def _anchors(cfg: Config) -> Any:
    return (core(cfg.model).get("bbox_head") or {}).get("anchor_generator") or {}


def _preprocessor(cfg: Config) -> Any:
    preprocessor = cfg.model.setdefault("data_preprocessor", ConfigDict())
    while isinstance(preprocessor.get("data_preprocessor"), Mapping):
        preprocessor = preprocessor["data_preprocessor"]
    return preprocessor


def _unit(cfg: Config) -> tuple[int, str]:
    """Return the pixels of which an image side should be a multiple, and why."""
    places = [options for place, options in encoders(cfg.model) if "type" in options and place.endswith("backbone")]
    if not places:
        return 32, "the coarsest stride"
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmengine"), torch.device("meta"):
        backbone: Any = MODELS.build({key: value for key, value in places[0].items() if key != "init_cfg"})
    encoder = getattr(backbone, "encoder", backbone)
    window = getattr(getattr(encoder, "geometry", None), "window_size", None)
    cell = math.lcm(encoder.patch_size, *(int(s) for s in getattr(backbone, "strides", ()) if s >= 1))
    if window:
        return math.lcm(cell, window * encoder.patch_size), "complete windows of the encoder"
    return cell, "the coarsest stride"


def _longest_side(cfg: Config) -> int:
    for name in ("test_dataloader", "val_dataloader", "train_dataloader"):
        for leaf in leaves((cfg.get(name) or {}).get("dataset")):
            for step in steps(leaf.get("pipeline") or []):
                for key in ("scale", "scales", "img_scale", "crop_size", "size"):
                    sides = list(_numbers(step.get(key)))
                    if sides and max(sides) >= _SMALLEST:
                        return max(sides)
    raise ConfigError(f"--image-size: the pipelines of {cfg.filename} have no size to replace")


def _numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


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
