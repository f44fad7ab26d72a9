"""Find which maps the backbone of a config gives (the feature specs), and which of them nobody reads."""

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from mmengine.registry import MODELS
from torch import Tensor

from pe_spatial.errors import ConfigError

_IMAGE_SIZE = 512  # side of the images that a probe sees, in pixels
# Backbones of packages that may be absent: the strides of their stages, from which out_indices choose.
_STAGES = (4, 8, 16, 32)
_ABSENT = {
    "ConvNeXt": _STAGES,
    "ResNet": _STAGES,
    "PoolFormer": (4, 4, 8, 8, 16, 16, 32),  # every second stage only downsamples
    "VAN": _STAGES,
    "EdgeNeXt": _STAGES,
    "TIMMBackbone": (2, *_STAGES),
}
# Heads of two-branch networks, which read several maps in training but only the one at this index in evaluation.
_EVALUATION_LEVELS = {"PIDHead": 1, "DDRHead": 1}


class Level(NamedTuple):
    """One map of a backbone."""

    channels: int
    stride: int  # pixels


def type_name(node: Mapping[str, Any]) -> str:
    """Return the type of a config node, without the scope or module before it."""
    kind = node.get("type", "")
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


def probe_backbone(cfg: Mapping[str, Any], *, training: bool = False) -> list[Level]:
    """Return the maps that the backbone of `cfg` gives; it is built without weights and runs on two images.

    Args:
        cfg: the config of a backbone, or of a model that has one.
        training: return the maps given in training, where they differ from those in evaluation.

    Raises ConfigError if it cannot be built, or does not give maps at strides that are powers of two.
    """
    cfg = cfg["backbone"] if "backbone" in cfg else cfg
    bare = _bare(cfg)
    channels = bare.get("in_channels", bare.get("in_chans", 3))
    if isinstance(channels, int) and channels != 3:
        raise ConfigError(f"backbone {type_name(cfg)} takes images of {channels} channels; PE takes RGB, so keep it")
    side = _probe_size(bare)
    reason = ""
    for device in ("meta", "cpu"):
        try:
            with _on(device), torch.no_grad():
                module = MODELS.build(copy.deepcopy(bare))
                module.train(training)  # returns None in most backbones, which override it
                out = module(torch.zeros(2, 3, side, side))
            return _levels(out, side)
        except ConfigError:
            raise
        except Exception as error:  # a third-party backbone may raise anything
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:150]}"
    raise ConfigError(
        f"backbone {type_name(cfg)} cannot be probed ({reason}); give its strides and channels "
        "(--strides 4,8,16,32 --channels 256,512,1024,2048)"
    )


def _levels(out: Any, side: int) -> list[Level]:
    maps = [out] if isinstance(out, Tensor) else list(out)
    if not maps or not all(isinstance(x, Tensor) and x.ndim == 4 for x in maps):
        raise ConfigError(
            "the backbone gives more than maps of (B, C, h, w), for instance class tokens, which PE cannot replace; if "
            "maps are enough for the heads, give strides and channels"
        )
    levels = [Level(x.shape[1], round(side / x.shape[2])) for x in maps]
    if any(level.stride < 1 or not math.log2(level.stride).is_integer() for level in levels):
        raise ConfigError(
            f"the backbone has strides {[level.stride for level in levels]}, and PE supports powers of two; give the "
            "strides and channels that it should have"
        )
    return levels


def _bare(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Remove what loads weights, what does not work on meta tensors, and what does not change the shapes of maps."""
    removed = ("init_cfg", "pretrained", "dcn", "stage_with_dcn", "plugins", "with_cp", "output_img")
    bare = {key: value for key, value in copy.deepcopy(dict(cfg)).items() if key not in removed}
    if isinstance(bare.get("norm_cfg"), Mapping):
        bare["norm_cfg"] = {k: v for k, v in bare["norm_cfg"].items() if k != "eps"}  # torch refuses the 0 of nas_fcos
    for key in ("backbone_cfg", "rfp_backbone"):
        if isinstance(bare.get(key), Mapping):
            bare[key] = {k: v for k, v in bare[key].items() if k not in ("init_cfg", "pretrained")}
    return bare


def _probe_size(bare: Mapping[str, Any]) -> int:
    side = bare.get("img_size", bare.get("pretrain_img_size", _IMAGE_SIZE))
    side = side if isinstance(side, int) else max(side)
    return side if "img_size" in bare and side % 32 == 0 else _IMAGE_SIZE


@contextmanager
def _on(device: str) -> Iterator[None]:
    linspace = torch.linspace

    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:  # drop-path rates are read with .item()
        return linspace(*args, **{**kwargs, "device": "cpu"})

    with torch.device(device), mock.patch.object(torch, "linspace", on_cpu):
        yield


def find_feature_specs(
    node: Mapping[str, Any], place: str, strides: Sequence[int] | None, channels: Sequence[int] | None
) -> tuple[Level, ...]:
    """Return the maps that the model expects: `strides` and `channels` if given, or else those of its backbone.

    Raises ConfigError if the backbone cannot be probed, or contradicts what the neck or head declares.
    """
    if (strides is None) != (channels is None):
        raise ConfigError("strides and channels belong together: give both, or neither to have the backbone probed")
    if strides is not None and channels is not None:
        if len(strides) != len(channels) or not strides:
            raise ConfigError(f"strides {list(strides)} and channels {list(channels)} differ in length or are empty")
        return tuple(Level(c, s) for s, c in zip(strides, channels, strict=True))
    backbone = node["backbone"]
    if type_name(backbone) == "PerceptionEncoderPyramid":
        raise ConfigError(f"{place}.backbone is PE already; change its variant with {place}.backbone.variant=...")
    declared = _declared(node)
    try:
        levels = probe_backbone(backbone, training=evaluation_level(node) is not None)
    except ConfigError:
        absent = str(backbone.get("type")).startswith(("mmpretrain.", "mmcls."))
        stages = _ABSENT.get(type_name(backbone)) if absent else None
        indices = backbone.get("out_indices", range(4))
        if stages is None or declared is None or len(indices) != len(declared) or max(indices) >= len(stages):
            raise
        return tuple(Level(c, stages[i]) for c, i in zip(declared, indices, strict=True))
    probed = [level.channels for level in levels]
    if declared and declared not in (probed, probed[::-1], probed[: len(declared)], probed[-len(declared) :]):
        raise ConfigError(
            f"{place}.backbone gives maps of {probed} channels but its neck or head declares {declared}; give the "
            "strides and channels that the model needs"
        )
    return tuple(levels)


def _declared(node: Mapping[str, Any]) -> list[int] | None:
    """Return the input channels that the neck or the only head declares; None where there is no such list."""
    for key in ("neck", "panoptic_head", "decode_head"):
        reader = node.get(key)
        reader = reader[0] if isinstance(reader, list | tuple) and reader else reader
        if isinstance(reader, Mapping):
            value = reader.get("in_channels")
            if isinstance(value, int) and key != "decode_head":  # a head chooses one of the maps
                return [value]
            if not isinstance(value, list | tuple):
                return None
            indices = list(range(len(value)))
            return list(value) if list(reader.get("in_index", indices)) == indices else None
    return None


def evaluation_level(node: Mapping[str, Any]) -> int | None:
    """Return the index of the only map that the head of a two-branch network reads in evaluation, or None."""
    head = node.get("decode_head")
    return _EVALUATION_LEVELS.get(type_name(head)) if isinstance(head, Mapping) else None


def find_unused(node: Mapping[str, Any], feature_specs: Sequence[Level]) -> tuple[int, ...]:
    """Return the indices of maps that nobody reads: neither the neck nor, without one, any segmentation head."""
    if len(feature_specs) < 2 or evaluation_level(node) is not None:
        return ()
    if node.get("neck") is not None:
        return _ignored_by(node["neck"], feature_specs)
    heads = [node[key] for key in ("decode_head", "auxiliary_head") if node.get(key) is not None]
    heads = [head for entry in heads for head in (entry if isinstance(entry, list | tuple) else [entry])]
    if not heads:
        return ()
    read: set[int] = set()
    for head in heads:
        if type_name(head) == "EncHead" and not head.get("add_lateral"):  # its in_index names more than it reads
            head = {**head, "in_index": head["in_index"][-1]}
        default = [-1] if isinstance(head.get("in_channels"), int) else range(len(feature_specs))
        indices = list(_indices(head)) or default
        read |= {i % len(feature_specs) for i in indices}
        if head.get("c1_in_channels"):
            read.add(0)
    return tuple(sorted(set(range(len(feature_specs))) - read))


def _indices(node: Any) -> Iterator[int]:
    """Yield the indices in every `in_index` of a head and of the heads inside it."""
    for key, value in node.items() if isinstance(node, Mapping) else ((None, x) for x in node):
        if key == "in_index":
            yield from [value] if isinstance(value, int) else value
        elif isinstance(value, Mapping | list | tuple):
            yield from _indices(value)


def _ignored_by(neck: Any, feature_specs: Sequence[Level]) -> tuple[int, ...]:
    """Run the neck forwards and backwards and return the maps that get no gradient."""
    for device in ("meta", "cpu"):
        try:
            with _on(device):
                module = MODELS.build(copy.deepcopy(neck))
                # batch norm needs two values per channel, also on the levels that the neck adds
                shapes = [(2, c, _IMAGE_SIZE // s, _IMAGE_SIZE // s) for c, s in feature_specs]
                maps = [torch.zeros(shape, requires_grad=True) for shape in shapes]
                out = module(tuple(maps))
                flat = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
                sum(x.sum() for x in flat).backward()  # type: ignore[union-attr]
            return tuple(i for i, x in enumerate(maps) if x.grad is None)
        except Exception:  # a third-party neck may raise anything, and some have no meta kernels
            continue
    return ()
