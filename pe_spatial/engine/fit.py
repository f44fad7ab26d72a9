"""The change of a config that makes its training fit into a GPU's memory and costs least."""

import copy
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mmengine.config import Config

from pe_spatial.engine.image_size import image_unit, set_image_size
from pe_spatial.engine.micro_batch import divisors, micro_batch_place, options_at, set_micro_batch
from pe_spatial.engine.options import set_options
from pe_spatial.engine.recipe import use_bfloat16
from pe_spatial.errors import ConfigError
from pe_spatial.planning.search import (
    GB,
    SIZES,
    Hardware,
    batch_shape,
    check_trains,
    encoder_place,
    plan,
    weights_fit,
    with_variants,
)

_LORA = "dict(rank=8)"
_8_BIT = {"optim_wrapper.optimizer.type": "AdamW8bit"}
Change = tuple[tuple[str, ...], dict[str, str], Config]
"""Arguments of `pe-spatial train`, its --cfg-options, and the config that they make."""
_SIDES = 4  # image sizes that are tried, each a unit smaller


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A training that was planned: the options of `pe-spatial train` that it needs, and its row of the plan."""

    arguments: tuple[str, ...]
    config_options: dict[str, str]
    config: Config  # before its batch, recomputing and sharding are set
    row: dict[str, Any]
    batch: int  # images on each GPU in a step
    accumulated: int

    @property
    def seconds(self) -> float:
        """Time of the computation for one image."""
        return self.row["seconds"] / self.row["batch"]

    def __str__(self) -> str:
        options = [f"{key}={value}" for key, value in self.config_options.items()]
        quoted = [f"'{option}'" if "(" in option else option for option in options]
        return " ".join([*self.arguments, *(["--cfg-options", *quoted] if quoted else [])])


def fit(cfg: Config, hardware: Hardware, *, images: int, dataset: Any = None) -> Fit:
    """Return the config itself if its training fits, else the fastest change with as many images in an update.

    Recomputing, bfloat16 and sharding over several GPUs come first; then fewer images at a time in the encoder, which
    changes no loss either; then smaller batches whose losses are averaged. If nothing of it fits, the same with AdamW's
    moments in 8 bits, if torchao is installed, then with LoRA (rank 8), then with smaller images.

    Args:
        cfg: config of a training.
        hardware: the GPUs.
        images: number of images in an epoch.
        dataset: the training set, for the size of its images where the config does not determine it.

    Raises ConfigError if none fits; it names the smallest of them, and the largest PE-Spatial that fits.
    """
    check_trains(cfg)
    stages = list(_changes(cfg))
    least = _least(stages[-1], hardware, images, dataset)
    if _is_within(least, hardware):
        for stage in stages:
            fits = _try(_possible(stage, hardware, images, dataset), hardware, images, dataset)
            if fits:
                best = min(fits, key=lambda one: (bool(str(one)), one.seconds, -one.batch, len(str(one))))
                return _with_row(best, hardware, images, dataset)
    raise ConfigError(
        f"{cfg.filename} does not fit into {hardware.gpu_memory:g} GB: the smallest training that was tried "
        f"({str(least) or 'the config itself'}) needs {least.row['total'] / GB:.2g} GB, and "
        f"{hardware.reserve:g} GB stay free (--reserve). {_nearest(cfg, hardware, images, dataset)}"
    )


def _least(changes: Sequence[Change], hardware: Hardware, images: int, dataset: Any) -> Fit:
    """Return the training that needs the least memory: one image in a step, and all recomputed.

    Where it does not fit, no other training of these changes does; so this one is planned first.
    """
    tried = [
        one
        for change in changes
        for one in _plan([change], hardware, images, dataset, kinds=[bool(encoder_place(change[-1].model))], batch=1)
    ]
    return min(tried, key=lambda one: one.row["total"])


def _is_within(one: Fit, hardware: Hardware) -> bool:
    return one.row["total"] <= hardware.usable


def _possible(changes: Sequence[Change], hardware: Hardware, images: int, dataset: Any) -> list[Change]:
    """Return those changes with which one image fits."""
    return [
        change
        for change in changes
        if weights_fit(change[-1], hardware) and _is_within(_least([change], hardware, images, dataset), hardware)
    ]


def _try(changes: Sequence[Change], hardware: Hardware, images: int, dataset: Any) -> list[Fit]:
    """Return the trainings of some changes that fit in the first of three ways in which any does."""
    tried = _plan(changes, hardware, images, dataset)
    fits = [one for one in tried if one.accumulated == 1 and one.row["largest_batch"]]
    fits = fits or list(filter(None, (_in_micro_batches(change, hardware, images, dataset) for change in changes)))
    return fits or [one for one in tried if one.row["largest_batch"]]


def _in_micro_batches(change: Change, hardware: Hardware, images: int, dataset: Any) -> Fit | None:
    """Return the training with the most images at a time in the encoder that fit, but not all; None if not one does."""
    arguments, options, cfg = change
    place = micro_batch_place(cfg)
    if place is None:
        return None

    def planned(size: int, kind: bool) -> Fit | None:
        changed = copy.deepcopy(cfg)
        added = set_micro_batch(changed, place, size)
        (row,) = plan(changed, hardware, images=images, dataset=dataset, kinds=[kind])
        fits = row["largest_batch"] >= row["batch"]
        return _fit(changed, arguments, {**options, **added}, row) if fits else None

    sizes = divisors(cfg.train_dataloader.batch_size)[1:]
    if not sizes or not planned(1, True):
        return None
    kind = not planned(1, False)
    return next(filter(None, (planned(size, kind) for size in sizes)))


def _with_row(one: Fit, hardware: Hardware, images: int, dataset: Any) -> Fit:
    """Return a training with the row of its own batch instead of the config's."""
    kinds = [one.row["recomputed"]]
    rows = plan(one.config, hardware, images=images, batch_size=one.batch, dataset=dataset, kinds=kinds)
    return replace(one, row=next(row for row in rows if row["weights"] == one.row["weights"]))


def _plan(
    changes: Sequence[Change], hardware: Hardware, images: int, dataset: Any, kinds: Sequence[bool] = (),
    batch: int | None = None,
) -> list[Fit]:  # fmt: skip
    """Return the trainings of some changes, in all ways to keep weights and activations."""
    return [
        _fit(changed, arguments, options, row)
        for arguments, options, changed in changes
        for row in plan(changed, hardware, images=images, batch_size=batch, dataset=dataset, kinds=kinds)
        if row["option"] or not row["recomputed"]
    ]


def _changes(cfg: Config) -> Iterator[list[Change]]:
    """Yield changes of a config, as arguments and options, in the order in which they are tried."""
    half = copy.deepcopy(cfg)
    use_bfloat16(half)
    already = cfg.optim_wrapper.get("type") == half.optim_wrapper["type"]
    amp = () if already else ("--amp",)
    yield [((), {}, cfg), *([] if already else [(amp, {}, half)])]
    if (cfg.optim_wrapper.get("optimizer") or {}).get("type") == "AdamW" and importlib.util.find_spec("torchao"):
        small_states = copy.deepcopy(half)
        set_options(small_states, _8_BIT)
        yield [(amp, _8_BIT, small_states)]
    place = encoder_place(cfg.model)
    lora = {f"{place}.lora": _LORA} if place and _takes_adapters(options_at(cfg, place)) else {}
    adapted = copy.deepcopy(half)
    if lora:
        set_options(adapted, lora)
        yield [(amp, lora, adapted)]
    for side in _smaller_sides(cfg):
        small = copy.deepcopy(adapted)
        with suppress(ConfigError):
            set_image_size(small, side)
            yield [((*amp, "--image-size", str(side)), lora, small)]


def _fit(cfg: Config, arguments: Sequence[str], options: dict[str, str], row: dict[str, Any]) -> Fit:
    """Return the training of a row, with the batch of the config in as few steps as fit."""
    total = cfg.train_dataloader.batch_size
    batch = next((size for size in divisors(total) if size <= row["largest_batch"]), 1)
    accumulated = total // batch
    extra = {}
    if accumulated > 1:
        counts = cfg.optim_wrapper.get("accumulative_counts", 1) * accumulated
        extra = {"train_dataloader.batch_size": str(batch), "optim_wrapper.accumulative_counts": str(counts)}
    place = encoder_place(cfg.model)
    if place and row["recomputed"] != options_at(cfg, place).get("grad_checkpointing", False):
        extra[row["option"]] = str(row["recomputed"])
    if row["weights"] == "FSDP":
        extra["runner_type"] = "ShardedRunner"
    chosen = dict(config=cfg, row=row, batch=batch, accumulated=accumulated)
    return Fit(arguments=tuple(arguments), config_options={**options, **extra}, **chosen)


def _takes_adapters(encoder: Any) -> bool:
    return not encoder.get("lora") and not str(encoder.get("variant")).startswith("timm:")


def _smaller_sides(cfg: Config) -> list[int]:
    with suppress(ConfigError):
        unit, longest = image_unit(cfg)[0], max(batch_shape(cfg).get("size") or (0,))
        return [side for side in range(longest - unit, 0, -unit) if side >= longest // 3][:_SIDES]
    return []


def _nearest(cfg: Config, hardware: Hardware, images: int, dataset: Any) -> str:
    """Say which smaller PE-Spatial fits."""
    nodes = [node for node in cfg.model.values() if isinstance(node, dict) and "variant" in node]
    variant = str(nodes[0]["variant"]) if nodes else ""
    position = next((i for i, size in enumerate(SIZES) if variant.startswith(f"pe_spatial_{size}_")), 0)
    smallest = "use smaller images, or a GPU with more memory."
    for size in reversed(SIZES[:position]):
        ((name, smaller),) = with_variants(cfg, [size]).items()
        stages = list(_changes(smaller))
        least = _least(stages[-1], hardware, images, dataset)
        smallest = f"{name} needs {least.row['total'] / GB:.2g} GB beside that, with {least}."
        if not _is_within(least, hardware):
            continue
        for stage in stages:
            changes = _possible(stage, hardware, images, dataset)
            fits = [one for one in _plan(changes, hardware, images, dataset) if one.row["largest_batch"]]
            if fits:
                best = min(fits, key=lambda one: one.seconds)
                return f"{name} fits, with {str(best) or 'no other option'}."
    return f"No smaller PE-Spatial fits either: {smallest}"
