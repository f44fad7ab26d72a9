"""The change of a config that makes its training fit into a GPU's memory and costs least."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from mmengine.config import Config

from pe_spatial.engine.image_size import image_unit, set_image_size
from pe_spatial.engine.options import set_options
from pe_spatial.engine.recipe import use_bfloat16
from pe_spatial.errors import ConfigError
from pe_spatial.planning.search import GB, SIZES, Hardware, batch_shape, plan, with_variants

_LORA = "dict(rank=8)"
Change = tuple[tuple[str, ...], tuple[str, ...], Config]
"""Arguments of `pe-spatial train`, its --cfg-options, and the config that they make."""
_SIDES = 4  # image sizes that are tried, each a unit smaller


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A training that was planned: the options of `pe-spatial train` that it needs, and its row of the plan."""

    arguments: tuple[str, ...]
    config_options: tuple[str, ...]
    config: Config  # with arguments and adapters, before the other options
    row: dict[str, Any]
    batch: int  # images on each GPU in a step
    accumulated: int

    @property
    def seconds(self) -> float:
        """Time of the computation for one image."""
        return self.row["seconds"] / self.row["batch"]

    def __str__(self) -> str:
        quoted = [f"'{option}'" if "(" in option else option for option in self.config_options]
        return " ".join([*self.arguments, *(["--cfg-options", *quoted] if quoted else [])])


def fit(cfg: Config, hardware: Hardware, *, images: int, dataset: Any = None) -> Fit:
    """Return the config itself if its training fits, else the fastest change with as many images in an update.

    Recomputing, bfloat16, smaller batches whose gradients accumulate, and sharding over several GPUs come first; then
    LoRA (rank 8), then smaller images.

    Args:
        cfg: config of a training.
        hardware: the GPUs.
        images: number of images in an epoch.
        dataset: the training set, for the size of its images where the config does not determine it.

    Raises ConfigError if none fits; it names the smallest of them, and the largest PE-Spatial that fits.
    """
    smallest: list[Fit] = []
    for changes in _changes(cfg):
        tried = _plan(changes, hardware, images, dataset)
        fits = [one for one in tried if one.row["largest_batch"]]
        if fits:
            best = min(fits, key=lambda one: (bool(str(one)), one.seconds, -one.batch, len(str(one))))
            return _with_row(best, hardware, images, dataset)
        smallest += tried
    least = _with_row(min(smallest, key=lambda one: one.row["total"]), hardware, images, dataset)
    raise ConfigError(
        f"{cfg.filename} does not fit into {hardware.gpu_memory:g} GB: the smallest training that was tried "
        f"({str(least) or 'the config itself'}) needs {least.row['total'] / GB:.2g} GB, and "
        f"{hardware.reserve:g} GB stay free. {_nearest(cfg, hardware, images, dataset)}"
    )


def _with_row(one: Fit, hardware: Hardware, images: int, dataset: Any) -> Fit:
    """Return a training with the row of its own batch instead of the config's."""
    rows = plan(one.config, hardware, images=images, batch_size=one.batch, dataset=dataset)
    kind = ("weights", "recomputed")
    return replace(one, row=next(row for row in rows if all(row[key] == one.row[key] for key in kind)))


def _plan(changes: Sequence[Change], hardware: Hardware, images: int, dataset: Any) -> list[Fit]:
    """Return the trainings of some changes, in all ways to keep weights and activations."""
    return [
        _fit(changed, arguments, options, row)
        for arguments, options, changed in changes
        for row in plan(changed, hardware, images=images, dataset=dataset)
        if row["option"] or not row["recomputed"]
    ]


def _changes(cfg: Config) -> Iterator[list[Change]]:
    """Yield changes of a config, as arguments and options, in the order in which they are tried."""
    half = copy.deepcopy(cfg)
    use_bfloat16(half)
    already = cfg.optim_wrapper.get("type") == half.optim_wrapper["type"]
    amp = () if already else ("--amp",)
    yield [((), (), cfg), *([] if already else [(amp, (), half)])]
    place = _encoder_place(cfg)
    lora = (f"{place}.lora={_LORA}",) if place else ()
    adapted = copy.deepcopy(half)
    if place:
        set_options(adapted, {f"{place}.lora": _LORA})
        yield [(amp, lora, adapted)]
    for side in _smaller_sides(cfg):
        small = copy.deepcopy(adapted)
        with suppress(ConfigError):
            set_image_size(small, side)
            yield [((*amp, "--image-size", str(side)), lora, small)]


def _fit(cfg: Config, arguments: Sequence[str], options: Sequence[str], row: dict[str, Any]) -> Fit:
    """Return the training of a row, with the batch of the config in as few steps as fit."""
    total = cfg.train_dataloader.batch_size
    batch = next((b for b in range(min(total, max(1, row["largest_batch"])), 0, -1) if total % b == 0), 1)
    accumulated = total // batch
    extra = []
    if accumulated > 1:
        already = cfg.optim_wrapper.get("accumulative_counts", 1)
        extra += [f"train_dataloader.batch_size={batch}", f"optim_wrapper.accumulative_counts={already * accumulated}"]
    if row["recomputed"]:
        extra.append(f"model.{row['option']}={row['recomputed']}")
    if row["weights"] == "FSDP":
        extra.append("runner_type=ShardedRunner")
    chosen = dict(config=cfg, row=row, batch=batch, accumulated=accumulated)
    return Fit(arguments=tuple(arguments), config_options=(*options, *extra), **chosen)


def _encoder_place(cfg: Config) -> str | None:
    """Return where the options of the encoder are, unless it has adapters or is not ours."""
    for key, node in cfg.model.items():
        if isinstance(node, dict) and "variant" in node and not str(node["variant"]).startswith("timm:"):
            inside = "" if "type" in node else ".encoder_options"
            options = node if not inside else node.get("encoder_options") or {}
            return None if options.get("lora") else f"model.{key}{inside}"
    return None


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
    for size in reversed(SIZES[:position]):
        ((name, smaller),) = with_variants(cfg, [size]).items()
        for changes in _changes(smaller):
            fits = [one for one in _plan(changes, hardware, images, dataset) if one.row["largest_batch"]]
            if fits:
                best = min(fits, key=lambda one: one.seconds)
                return f"{name} fits, with {str(best) or 'no other option'}."
    return "No smaller PE-Spatial fits either; use smaller images, or a GPU with more memory."
