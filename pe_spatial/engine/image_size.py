"""The sizes and shapes of images in a config."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from pe_spatial.engine.nodes import core, leaves, pipelines, steps, type_name
from pe_spatial.engine.summary import encoders
from pe_spatial.errors import ConfigError

_SIZES = ("scale", "scales", "img_scale", "crop_size", "size", "resize_limits", "random_size_range")
_MIXING = ("Mosaic", "CachedMosaic", "MixUp", "CachedMixUp")
_SMALLEST = 96  # of the sizes of images in a pipeline, in pixels; smaller numbers mean something else


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
    preprocessor["pad_size_divisor"] = max(preprocessor.get("pad_size_divisor", 1), image_unit(cfg)[0])
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
    training = Config(dict(train_dataloader=cfg.get("train_dataloader")))
    if training.train_dataloader and not any(map(_sides, pipelines(training))):
        raise ConfigError(
            f"--image-size: the training pipeline of {cfg.filename} has no size to replace, so its images stay as they "
            "are; add dict(type='Resize', scale=(640, 640), keep_ratio=True)"
        )
    unit, what = image_unit(cfg)
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


def image_unit(cfg: Config) -> tuple[int, str]:
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
            if sides := _sides(leaf.get("pipeline") or []):
                return sides[0]
    raise ConfigError(f"--image-size: the pipelines of {cfg.filename} have no size to replace")


def _sides(pipeline: Any) -> list[int]:
    """Return the longer side of each step of a pipeline that has a size."""
    keys = ("scale", "scales", "img_scale", "crop_size", "size")
    longest = (max(_numbers(step.get(key)), default=0) for step in steps(pipeline) for key in keys)
    return [side for side in longest if side >= _SMALLEST]


def _numbers(value: Any) -> Any:
    if isinstance(value, list | tuple):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value
