"""Plans for training runs: every way to keep weights and activations of a config, for several variants and batches."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from torch import nn
from torch.optim import Optimizer

from pe_spatial.encoder.variants import DEMO_VARIANTS, VARIANTS
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import read_size
from pe_spatial.planning.planner import (
    Step,
    Weights,
    build_on_meta,
    can_be_sharded,
    measure_step,
    measure_weights,
    recomputing_kinds,
    set_checkpointing,
)
from pe_spatial.planning.registry import read_shape

GB, TERA = 1e9, 1e12
SIZES = ("t16", "s16", "b16", "l14", "g14")
"""Short names of the PE-Spatial variants."""
COCO_IMAGES = 117266
"""Training images of COCO with objects: assumed where a dataset cannot be read."""


class Rates(NamedTuple):
    """Peak rates of a GPU without sparsity, in TFLOP/s, from its data sheet."""

    memory: float  # GB
    name: str
    bfloat16: float
    float32: float


GPUS = (
    Rates(16, "T4", 65, 8.1),
    Rates(24, "A10", 125, 31.2),
    Rates(48, "A40", 149.7, 37.4),
    Rates(80, "H100", 989, 67),
)
"""What is assumed of a GPU by its memory; T4 computes float16 instead of bfloat16. The largest has any more memory."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """The GPUs of a training run."""

    gpus: int = 8  # in all nodes together
    gpu_memory: float = 80  # of one GPU, in GB (1e9 bytes)
    reserve: float = 4  # memory to leave free on each, in GB
    bfloat16_rate: float | None = None  # peak rate of one GPU, in TFLOP/s; None takes that of `assumed`
    float32_rate: float | None = None
    efficiency: float = 0.4  # fraction of the peak rates that a training reaches

    @property
    def usable(self) -> float:
        """Memory of one GPU that a training may take, in bytes."""
        return (self.gpu_memory - self.reserve) * GB

    @property
    def assumed(self) -> Rates:
        """The row of `GPUS` with this memory, with the rates that were given instead of its own."""
        row = next((row for row in GPUS if self.gpu_memory <= row.memory), GPUS[-1])
        bfloat16, float32 = self.bfloat16_rate, self.float32_rate
        name = row.name if bfloat16 is None or float32 is None else "as given"
        return row._replace(name=name, bfloat16=bfloat16 or row.bfloat16, float32=float32 or row.float32)

    def seconds(self, step: Step) -> float:
        """Return the time that the computation of a step takes."""
        rates = {torch.float32: self.assumed.float32, torch.bfloat16: self.assumed.bfloat16}
        return sum(n / (rates[dtype] * TERA * self.efficiency) for dtype, n in step.step_flops.items())


def with_variants(cfg: Config, keys: Sequence[str] = ()) -> dict[str, Config]:
    """Return a config for each variant, by its name; `keys` are names, or sizes of PE-Spatial such as 't16'.

    Without keys only the variant of `cfg` is planned.
    """
    result = {}
    for key in keys or (None,):
        changed = copy.deepcopy(cfg)
        if key is not None:
            ours, all_names = key.strip().lower().replace("-", "_"), [*VARIANTS, *DEMO_VARIANTS]
            names = [name for name in all_names if name == ours or name.startswith(f"pe_spatial_{ours}_")]
            if len(names) != 1:
                raise ConfigError(f"unknown variant {key!r}; use one of {', '.join(SIZES)}, {', '.join(all_names)}")
            changed.merge_from_dict({f"model.{'tracker' if 'tracker' in cfg.model else 'backbone'}.variant": names[0]})
        encoder = changed.model.get("tracker") or changed.model.backbone
        variant = encoder.get("variant", encoder.get("type"))
        result[variant if isinstance(variant, str) else "own"] = changed
    return result


def encoder_place(model: Any, place: str = "model") -> str | None:
    """Return where a config has the options of its encoder, such as 'model.backbone'; None without such an encoder."""
    if not isinstance(model, Mapping):
        return None
    if "variant" in model:
        return place if "type" in model else f"{place}.encoder_options"
    inner = (encoder_place(value, f"{place}.{key}") for key, value in model.items())
    return next(filter(None, inner), None)


def batch_shape(cfg: Config, images: Any = None) -> dict[str, Any]:
    """Return the size (h, w) of the images when they reach the model, in pixels, and frames and objects of clips.

    The size is that of the preprocessor, of the training pipeline, or of the first image of the dataset; it is omitted
    if none of them determines it.
    """
    dataset = cfg.train_dataloader.dataset
    while "pipeline" not in dataset:
        dataset = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), dict(pipeline=()))
    shape = read_shape(dataset["pipeline"])
    preprocessor = cfg.model.get("data_preprocessor") or {}
    side = preprocessor.get("pad_size_divisor") or 1
    size = preprocessor.get("size") or (side, side)
    if min(size) >= 128:  # smaller ones are divisors
        return {**shape, "size": tuple(size)}
    if "size" not in shape and images is not None:
        with suppress(DatasetError, KeyError, IndexError, TypeError):
            shape["size"] = read_size(images.get_data_info(0)["img_path"])
    if "size" in shape:
        shape["size"] = tuple(-(-n // side) * side for n in shape["size"])
    return shape


def build_dataset(cfg: Config) -> tuple[Any, str]:
    """Return the training set and "", or None and why it cannot be read."""
    init_default_scope(cfg.get("default_scope", "mmengine"))
    try:
        return DATASETS.build(copy.deepcopy(cfg.train_dataloader.dataset)), ""
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        return None, " ".join(str(error).split())[:200]


def run_length(cfg: Config) -> tuple[str, int] | None:
    """Return ('epochs' or 'iterations', number) of a training, or None if its loop says neither."""
    loop = cfg.get("train_cfg") or {}
    keys = {"epochs": "max_epochs", "iterations": "max_iters"}
    return next(((unit, loop[key]) for unit, key in keys.items() if loop.get(key)), None)


def check_trains(cfg: Config) -> None:
    """Raise ConfigError for a config without a training."""
    for name in ("optim_wrapper", "train_dataloader"):
        if not cfg.get(name):
            raise ConfigError(f"{cfg.filename} has no {name}, so there is no training to plan")


def plan(
    cfg: Config, hardware: Hardware, *, images: int, batch_size: int | None = None, size: Sequence[int] | None = None,
    dataset: Any = None, kinds: Sequence[bool | str | None] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Plan one config: a row for each of DDP and FSDP, and each kind of recomputing, in bytes and operations.

    FSDP is not planned where `ShardedRunner` refuses it: with `micro_batch` and with `AdamW8bit`.

    Args:
        cfg, hardware: the config of a training, and the GPUs.
        images: number of images or clips in an epoch.
        batch_size, size: images or clips on one GPU, and (h, w) of the images in pixels; by default the config's.
        dataset: the training set, for the size of its images where the config does not determine it.
        kinds: those of recomputing, as `grad_checkpointing` takes them, None for the config's; () for all there are.

    Raises ConfigError for configs that do not train, cannot be built, or whose losses need values.
    """
    check_trains(cfg)
    shape = {**batch_shape(cfg, dataset), **(dict(size=tuple(size)) if size else {})}
    if "size" not in shape:
        raise ConfigError(
            f"{cfg.filename} does not determine how large the images are, and there is no image of its dataset to "
            "look at; give --size HEIGHT WIDTH, or create the dataset first"
        )
    batch_size = batch_size or cfg.train_dataloader.batch_size
    bfloat16 = _is_bfloat16(cfg)
    model, weights = _weights(cfg, hardware)
    place = encoder_place(cfg.model)
    option = place and f"{place}.grad_checkpointing"
    common = dict(
        **shape, option=option, batch=batch_size, bfloat16=bfloat16, number=sum(p.numel() for p in model.parameters())
    )
    rows = []
    for recomputed in kinds or recomputing_kinds(model):
        if recomputed is not None:
            set_checkpointing(model, recomputed)
        try:
            step, larger = (measure_step(model, b, bfloat16=bfloat16, **shape) for b in (batch_size, batch_size + 1))
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"{cfg.filename} cannot be planned: {type(model).__name__} or its losses need values to run on "
                f"({' '.join(str(error).split())[:200]})"
            ) from error
        seconds = hardware.seconds(step)
        hours = images / hardware.gpus * seconds / batch_size / 3600
        unit, number = run_length(cfg) or ("epochs", 0)
        times: dict[str, Any] = dict(seconds=seconds, hours=hours)
        times["run_hours"] = number * (hours if unit == "epochs" else seconds / 3600) or None
        for kind, kept in weights.items():
            row = _row(kept, step, larger, hardware, batch_size, copies=kind == "DDP" or not bfloat16)
            rows.append({**common, "weights": kind, "recomputed": recomputed, **row, **times})
    return rows


def weights_fit(cfg: Config, hardware: Hardware) -> bool:
    """Return whether weights, gradients and states fit into a GPU: quick to know, and needed whatever else changes."""
    model = _build(cfg)[0]
    least = sum(p.nbytes * (1 + p.requires_grad) for p in model.parameters()) / hardware.gpus
    if least > hardware.usable:  # before the optimizer's states, which take seconds to know
        return False
    return any(kept.kept <= hardware.usable for kept in _weights(cfg, hardware)[1].values())


def _is_bfloat16(cfg: Config) -> bool:
    return cfg.optim_wrapper.get("type") in ("BFloat16OptimWrapper", "AmpOptimWrapper")


def _build(cfg: Config) -> tuple[nn.Module, Optimizer]:
    try:
        return build_on_meta(cfg)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{cfg.filename} cannot be built: {' '.join(str(error).split())}") from error


def _weights(cfg: Config, hardware: Hardware) -> tuple[nn.Module, dict[str, Weights]]:
    """Return the model of a config, and what its weights take with DDP, and with FSDP where that is possible."""
    model, optimizer = _build(cfg)
    buckets = hardware.gpus > 1 and not (cfg.get("model_wrapper_cfg") or {}).get("gradient_as_bucket_view", False)
    weights = {"DDP": measure_weights(model, optimizer, shards=None, buckets=buckets)}
    if hardware.gpus > 1 and can_be_sharded(model, optimizer):
        weights["FSDP"] = measure_weights(model, optimizer, shards=hardware.gpus, bfloat16=_is_bfloat16(cfg))
    return model, weights


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
