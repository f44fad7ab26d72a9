"""Plans for training runs: every way to keep weights and activations of a config, for several variants and batches."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config

from pe_spatial.encoder.variants import VARIANTS
from pe_spatial.errors import ConfigError
from pe_spatial.planning.planner import Step, Weights, build_on_meta, measure_step, measure_weights, set_checkpointing
from pe_spatial.planning.registry import read_shape

GB, TERA = 1e9, 1e12


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs of a training run."""

    gpus: int = 8  # in all nodes together
    gpu_memory: float = 80  # of one GPU, in GB (1e9 bytes)
    reserve: float = 4  # memory to leave free on each, in GB
    bfloat16_rate: float = 989  # peak rate of one GPU, in TFLOP/s
    float32_rate: float = 67
    efficiency: float = 0.4  # fraction of the peak rates that a training reaches

    @property
    def usable(self) -> float:
        """Memory of one GPU that a training may take, in bytes."""
        return (self.gpu_memory - self.reserve) * GB

    def seconds(self, step: Step) -> float:
        """Return the time that the computation of a step takes."""
        rates = {torch.float32: self.float32_rate, torch.bfloat16: self.bfloat16_rate}
        return sum(n / (rates[dtype] * TERA * self.efficiency) for dtype, n in step.step_flops.items())


def with_variants(cfg: Config, keys: Sequence[str] = ()) -> dict[str, Config]:
    """Return a config for each variant, by its name; `keys` are names, or sizes of PE-Spatial such as 't16'.

    Without keys only the variant of `cfg` is planned.
    """
    result = {}
    for key in keys or (None,):
        changed = copy.deepcopy(cfg)
        if key is not None:
            names = [name for name in VARIANTS if name == key or name.startswith(f"pe_spatial_{key}_")]
            if len(names) != 1:
                raise ConfigError(f"unknown variant {key!r}; use one of t16, s16, b16, l14, g14, {', '.join(VARIANTS)}")
            changed.merge_from_dict({f"model.{'tracker' if 'tracker' in cfg.model else 'backbone'}.variant": names[0]})
        encoder = changed.model.get("tracker") or changed.model.backbone
        variant = encoder.get("variant", encoder.get("type"))
        result[variant if isinstance(variant, str) else "own"] = changed
    return result


def batch_shape(cfg: Config) -> dict[str, Any]:
    """Return the size (h, w) of the images when they reach the model, in pixels, and frames and objects of clips.

    The size is omitted if neither the preprocessor nor the training pipeline determines it.
    """
    dataset = cfg.train_dataloader.dataset
    while "pipeline" not in dataset:
        dataset = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), dict(pipeline=()))
    shape = read_shape(dataset["pipeline"])
    preprocessor = cfg.model.get("data_preprocessor") or {}
    side = preprocessor.get("pad_size_divisor", 1)
    size = preprocessor.get("size") or (side, side)
    return {**shape, "size": tuple(size)} if min(size) >= 128 else shape  # smaller ones are divisors


def plan(
    cfg: Config, hardware: Hardware, *, images: int, batch_size: int | None = None, size: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Plan one config: a row for each of DDP and FSDP, activations kept and recomputed, in bytes and operations.

    Args:
        cfg, hardware: the config of a training, and the GPUs.
        images: number of images or clips in an epoch.
        batch_size, size: images or clips on one GPU, and (h, w) of the images in pixels; by default the config's.

    Raises ConfigError for configs that do not train, cannot be built, or whose losses need values.
    """
    for name in ("optim_wrapper", "train_dataloader"):
        if not cfg.get(name):
            raise ConfigError(f"{cfg.filename} has no {name}, so there is no training to plan")
    shape = {**batch_shape(cfg), **(dict(size=tuple(size)) if size else {})}
    if "size" not in shape:
        raise ConfigError(f"{cfg.filename} does not say how large the images are; give --size HEIGHT WIDTH")
    batch_size = batch_size or cfg.train_dataloader.batch_size
    bfloat16 = cfg.optim_wrapper.get("type") in ("BFloat16OptimWrapper", "AmpOptimWrapper")
    try:
        model, optimizer = build_on_meta(cfg)
    except ValueError as error:
        raise ConfigError(f"{cfg.filename} cannot be built: {' '.join(str(error).split())}") from error
    buckets = hardware.gpus > 1 and not (cfg.get("model_wrapper_cfg") or {}).get("gradient_as_bucket_view", False)
    weights = {"DDP": measure_weights(model, optimizer, shards=None, buckets=buckets)}
    if hardware.gpus > 1:
        weights["FSDP"] = measure_weights(model, optimizer, shards=hardware.gpus, bfloat16=bfloat16)
    common = dict(**shape, batch=batch_size, bfloat16=bfloat16, number=sum(p.numel() for p in model.parameters()))
    rows = []
    for recomputed in (False, True):
        set_checkpointing(model, recomputed)
        try:
            step, larger = (measure_step(model, b, bfloat16=bfloat16, **shape) for b in (batch_size, batch_size + 1))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{cfg.filename} cannot be planned: {type(model).__name__} or its losses need values to run on "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        hours = images / hardware.gpus * hardware.seconds(step) / batch_size / 3600
        for kind, kept in weights.items():
            row = _row(kept, step, larger, hardware, batch_size, copies=kind == "DDP" or not bfloat16)
            rows.append({**common, "weights": kind, "recomputed": recomputed, **row, "hours": hours})
    return rows


def _row(
    weights: Weights, step: Step, larger: Step, hardware: Hardware, batch_size: int, *, copies: bool
) -> dict[str, Any]:
    """Return the memory and FLOPs of a step, and from one with another image the largest batch that fits."""
    activations, next_activations = (x.activations if copies else x.activations_without_copies for x in (step, larger))
    free = hardware.usable - weights.kept
    fitting = batch_size + (free - activations) // (next_activations - activations)
    return dict(
        counted=step.counted,
        parameters=weights.parameters,
        gradients=weights.gradients,
        optimizer=weights.states,
        extra=weights.extra,
        update=weights.update,
        saved=step.saved,
        activations=activations,
        total=weights.kept + max(activations, weights.update),
        largest_batch=max(int(fitting), 0) if free >= weights.update else 0,
        forward_flops=sum(step.forward_flops.values()) / batch_size,
        step_flops=sum(step.step_flops.values()) / batch_size,
    )
