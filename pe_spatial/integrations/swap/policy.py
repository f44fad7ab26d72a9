"""PE in the place of the backbone of any MMDetection or MMSegmentation config, with neck and heads left alone.

What the rest of the model expects is found out, not looked up: the original backbone runs on the meta device, and the
maps that it gives (how many, strides, channels) are what PE has to give. What cannot work is refused with the reason.
"""

from __future__ import annotations

import copy
import math
import textwrap
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor

from pe_spatial.encoder.variants import VITDET_RECIPES, get_config, preset_options
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.openmmlab import HEAD_OPTIONS, build_encoder
from pe_spatial.integrations.timm import PREFIX

ADAPTERS = ("simple", "fused", "single")
PRESETS = ("release", "timm", "vitdet")  # DETA's needs its own pyramid and statistics
LEARNING_RATE = 1e-4  # ViTDet's and PE's for AdamW
WEIGHT_DECAY = 0.1
_STRIDE = 16  # of the encoder's map; where a released patch differs, its kernel is resized
_IMAGE = 512  # pixels, the side of the image that a probe sees

_REFUSED = {
    "BaseReID": "re-identification embeds crops of one person, of 256x128 pixels and without any map; keep its ResNet",
    "LinearReIDHead": "re-identification embeds crops, without any map; keep its ResNet",
    "TridentFasterRCNN": "its three branches are three dilations of one ResNet stage, and its heads expect three "
    "results; swap faster_rcnn_r50-caffe-c4 or, better, faster_rcnn_r50_fpn",
    "TridentResNet": "its three branches are three dilations of one ResNet stage; swap faster_rcnn_r50_fpn",
    "Detectron2Wrapper": "the model inside is Detectron2's, not MMDetection's; use pe_spatial.integrations.detectron2",
    "MultimodalEncoderDecoder": "its side adapter reads tokens, heads and text of CLIP, which no other encoder has; "
    "swap mask2former or upernet",
    "DPTHead": "it reads the class token of each layer of its ViT beside the map; swap a upernet, segmenter or setr "
    "config (PE has a class token, but a backbone returns maps)",
    "VPD": "the diffusion model is the method itself; swap a upernet config, or use a depth config of this project",
    "CLIPTextContextEncoder": "its decoder is aligned with CLIP's text; swap mask2former or upernet",
}
_TEXT_ALIGNED = ("GLIP", "GroundingDINO")
_HOURGLASS = ("CornerNet", "CentripetalHead", "CornerHead")
_OLD_KEYS = ("backbone", "absolute_pos_embed", "relative_position_bias_table", "pos_block", "pos_embed", "cls_token")
_COMMENT: dict[str, Any] = {"initial_indent": "# ", "subsequent_indent": "# "}
_ADAM = ("Adam", "AdamW", "NAdam", "RAdam")
# Backbones of packages that may be absent: the strides of their stages, which out_indices choose from.
_STAGES = (4, 8, 16, 32)
_ABSENT = {
    "ConvNeXt": _STAGES,
    "ResNet": _STAGES,
    "PoolFormer": (4, 4, 8, 8, 16, 16, 32),  # every second one is a downsampling
    "VAN": _STAGES,
    "EdgeNeXt": _STAGES,
    "TIMMBackbone": (2, *_STAGES),
}
# Heads of two-branch networks, which read several maps in training but, in evaluation, only the one of this place.
_EVALUATES_ONE = {"PIDHead": 1, "DDRHead": 1}


class Level(NamedTuple):
    """One map of a backbone."""

    channels: int
    stride: int  # pixels


class Swap(NamedTuple):
    """What a swap did."""

    cfg: Config
    feature_specs: tuple[Level, ...]  # what backbone and encoder both give
    unused: tuple[int, ...]  # places in the feature_specs that nobody reads
    notes: tuple[str, ...]  # what the user should know; each is one sentence


def swap_backbone(cfg: Config, variant: str | Mapping[str, Any], **options: Any) -> Config:
    """Return `cfg` with PE in the place of its backbone; what `plan_swap` notes becomes a warning."""
    done = plan_swap(cfg, variant, **options)
    for note in done.notes:
        warnings.warn(note, stacklevel=2)
    return done.cfg


def plan_swap(
    cfg: Config,
    variant: str | Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    adapter: str = "simple",
    strides: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    preset: str = "vitdet",
    checkpoint: str | None = "released",
    lr: float | None = None,
    encoder: Mapping[str, Any] | None = None,
) -> Swap:
    """Swap, and tell what was found.

    Raises ConfigError where a swap makes no sense, with what to use instead, and where the backbone cannot be probed.

    Args:
        cfg: a merged config; it stays as it is.
        variant: the encoder, as in `PerceptionEncoderPyramid`.
        layers: blocks to read, 0-based, negatives count from the end; default the last one for 'simple' and 'single',
            four at equal distances for 'fused'.
        adapter: 'simple' (ViTDet's pyramid on one layer), 'fused' (on the sum of several) or 'single' (each level is
            one layer, resampled and projected; one layer, or one for each level).
        strides: of the maps to give, in pixels, if the backbone cannot be probed; with `channels`.
        channels: of the maps to give.
        preset: 'vitdet', 'release' or 'timm'; as in `preset_options`, but 'vitdet' also serves depths that it was
            never published for: the four global blocks end the quarters of the depth. Encoders of timm have only one.
        checkpoint: of the encoder, as in `load_checkpoint`; None starts from random weights.
        lr: learning rate; default the original's, if it belongs to an Adam and is not above 1e-4, or 1e-4.
        encoder: further options of `PerceptionEncoder`, for instance `frozen_stages`.
    """
    new = copy.deepcopy(cfg)
    if "model" not in new:
        raise ConfigError(f"{cfg.filename or 'the config'} has no model, so there is no backbone to swap")
    notes: list[str] = []
    with _scope(new):
        _refuse(new.model)
        node, place = _with_backbone(new.model)
        _replace_rfp(node, notes)
        feature_specs = _feature_specs(node, place, strides, channels)
        unused = _unused(node, feature_specs)
        options = _encoder_options(variant, preset, layers, adapter, len(feature_specs), unused, encoder, notes)
        mean, std = _statistics(variant, preset)
        shared = _shares_images(new.model)
        pads = math.lcm(_STRIDE, *(level.stride for i, level in enumerate(feature_specs) if i not in unused))
        known = _normalise(new.model, mean, std, pads, keep=shared)
        backbone = ConfigDict(
            type="PerceptionEncoderPyramid",
            variant=copy.deepcopy(variant),
            **options,
            any_size=True,
            pyramid=dict(
                strides=[level.stride for level in feature_specs],
                out_channels=[level.channels for level in feature_specs],
                **({"unused": list(unused)} if unused else {}),
            ),
        )
        if shared:
            backbone.renormalize = dict(**known, to_mean=mean, to_std=std)
            notes.append(f"{shared} reads the same images: they stay normalised for it, and PE renormalises its own")
        backbone.init_cfg = None if checkpoint is None else dict(type="Pretrained", checkpoint=checkpoint)
        eval_level = _eval_level(node)
        if eval_level is not None:
            backbone.eval_level = eval_level
        _check_builds(backbone)
        node.backbone = backbone
        _family_notes(node, feature_specs, notes)
    if any("EMAHook" in str(hook.get("type")) for hook in new.get("custom_hooks") or []):
        notes.append("EMAHook keeps a second copy of the model, and so of the encoder, in memory")
    _drop_old_weights(new, notes)
    _set_optimizer(new, variant, lr, notes)
    _set_runtime(new)
    return Swap(new, feature_specs, unused, tuple(notes))


def probe_backbone(cfg: Mapping[str, Any], *, training: bool = False) -> list[Level]:
    """Return the maps that the backbone of `cfg` gives: it is built without weights and sees two images.

    Args:
        cfg: the config of a backbone, or of a model that has one.
        training: ask for the maps of training, where they are not those of evaluation.

    Raises ConfigError if it cannot be built, or gives something else than maps at strides that are powers of two.
    """
    cfg = cfg["backbone"] if "backbone" in cfg else cfg
    bare = _bare(cfg)
    images = bare.get("in_channels", bare.get("in_chans", 3))
    if isinstance(images, int) and images != 3:
        raise ConfigError(f"backbone {_name(cfg)} takes images of {images} channels; PE takes RGB, so keep it")
    side = _side(bare)
    reasons = []
    for device in ("meta", "cpu"):
        try:
            with _on(device), torch.no_grad():
                module = MODELS.build(copy.deepcopy(bare))
                module.train(training)  # returns None in most backbones, which override it
                out = module(torch.zeros(2, 3, side, side))
            return _levels(out, side)
        except ConfigError:
            raise
        except Exception as error:  # whatever a backbone of somebody else may raise
            reasons.append(f"{type(error).__name__}: {' '.join(str(error).split())[:150]}")
    raise ConfigError(
        f"backbone {_name(cfg)} cannot be probed ({reasons[-1]}); say what it gives with strides and channels "
        "(--strides 4,8,16,32 --channels 256,512,1024,2048)"
    )


def _levels(out: Any, side: int) -> list[Level]:
    maps = [out] if isinstance(out, Tensor) else list(out)
    if not maps or not all(isinstance(x, Tensor) and x.ndim == 4 for x in maps):
        raise ConfigError(
            "the backbone gives something else than maps of (B, C, h, w), for instance class tokens, and PE cannot "
            "stand for that; if maps are enough, say which with strides and channels"
        )
    levels = [Level(x.shape[1], round(side / x.shape[2])) for x in maps]
    if any(level.stride < 1 or not math.log2(level.stride).is_integer() for level in levels):
        raise ConfigError(
            f"the backbone's strides {[level.stride for level in levels]} are no powers of two; say with strides and "
            "channels which PE should give"
        )
    return levels


def _bare(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what holds weights, what meta tensors cannot do, and what does not change a map's shape."""
    gone = ("init_cfg", "pretrained", "dcn", "stage_with_dcn", "plugins", "with_cp", "output_img")
    bare = {key: value for key, value in copy.deepcopy(dict(cfg)).items() if key not in gone}
    if isinstance(bare.get("norm_cfg"), Mapping):
        bare["norm_cfg"] = {k: v for k, v in bare["norm_cfg"].items() if k != "eps"}  # nas_fcos' 0 is refused by torch
    for key in ("backbone_cfg", "rfp_backbone"):
        if isinstance(bare.get(key), Mapping):
            bare[key] = {k: v for k, v in bare[key].items() if k not in ("init_cfg", "pretrained")}
    return bare


def _side(bare: Mapping[str, Any]) -> int:
    side = bare.get("img_size", bare.get("pretrain_img_size", _IMAGE))
    side = side if isinstance(side, int) else max(side)
    return side if "img_size" in bare and side % 32 == 0 else _IMAGE


@contextmanager
def _on(device: str) -> Iterator[None]:
    linspace = torch.linspace

    def on_cpu(*args: Any, **kwargs: Any) -> Tensor:  # drop-path rates are read with .item()
        return linspace(*args, **{**kwargs, "device": "cpu"})

    with torch.device(device), mock.patch.object(torch, "linspace", on_cpu):
        yield


def _feature_specs(
    node: ConfigDict, place: str, strides: Sequence[int] | None, channels: Sequence[int] | None
) -> tuple[Level, ...]:
    if (strides is None) != (channels is None):
        raise ConfigError("strides and channels belong together: give both, or neither to have the backbone probed")
    if strides is not None and channels is not None:
        if len(strides) != len(channels) or not strides:
            raise ConfigError(f"strides {list(strides)} and channels {list(channels)} differ in length or are empty")
        return tuple(Level(c, s) for s, c in zip(strides, channels, strict=True))
    backbone = node.backbone
    if _name(backbone) == "PerceptionEncoderPyramid":
        raise ConfigError(f"{place}.backbone is PE already; its variant is one option: {place}.backbone.variant=...")
    declared = _declared(node)
    try:
        levels = probe_backbone(backbone, training=_eval_level(node) is not None)
    except ConfigError:
        absent = str(backbone.get("type")).startswith(("mmpretrain.", "mmcls."))
        stages = _ABSENT.get(_name(backbone)) if absent else None
        indices = backbone.get("out_indices", range(4))
        if stages is None or declared is None or len(indices) != len(declared) or max(indices) >= len(stages):
            raise
        return tuple(Level(c, stages[i]) for c, i in zip(declared, indices, strict=True))
    found = [level.channels for level in levels]
    if declared and declared not in (found, found[::-1], found[: len(declared)], found[-len(declared) :]):
        raise ConfigError(
            f"{place}.backbone gives maps of {found} channels but its neck or head declares {declared}, so one of them "
            "is not what it seems; say what the maps are with strides and channels"
        )
    return tuple(levels)


def _declared(node: Mapping[str, Any]) -> list[int] | None:
    """Return the channels that the neck, or the only head, says that it reads; None where it does not say."""
    for key in ("neck", "panoptic_head"):
        reader = node.get(key)
        reader = reader[0] if isinstance(reader, list | tuple) and reader else reader
        if isinstance(reader, Mapping):
            value = reader.get("in_channels")
            return [value] if isinstance(value, int) else None if value is None else list(value)
    head = node.get("decode_head")
    head = head[0] if isinstance(head, list | tuple) else head
    value = head.get("in_channels") if isinstance(head, Mapping) else None
    whole = isinstance(value, list | tuple) and list(head.get("in_index", range(len(value)))) == list(range(len(value)))
    return list(value) if whole else None


def _unused(node: Mapping[str, Any], feature_specs: Sequence[Level]) -> tuple[int, ...]:
    """Return the places of the maps that nobody reads: neither the neck, nor, without one, any segmentation head."""
    if len(feature_specs) < 2 or _eval_level(node) is not None:
        return ()
    if node.get("neck") is not None:
        return _ignored_by(node["neck"], feature_specs)
    heads = [node[key] for key in ("decode_head", "auxiliary_head") if node.get(key) is not None]
    heads = [head for entry in heads for head in (entry if isinstance(entry, list | tuple) else [entry])]
    if not heads:
        return ()
    read: set[int] = set()
    for head in heads:
        if _name(head) == "EncHead" and not head.get("add_lateral"):  # its in_index names more than it reads
            head = {**head, "in_index": head["in_index"][-1]}
        indices = list(_indices(head)) or (
            [-1] if isinstance(head.get("in_channels"), int) else range(len(feature_specs))
        )
        read |= {i % len(feature_specs) for i in indices}
        if head.get("c1_in_channels"):
            read.add(0)
    return tuple(sorted(set(range(len(feature_specs))) - read))


def _indices(node: Any) -> Iterator[int]:
    """Yield what every `in_index` in a head, or in the heads inside it, names."""
    for key, value in node.items() if isinstance(node, Mapping) else ((None, x) for x in node):
        if key == "in_index":
            yield from [value] if isinstance(value, int) else value
        elif isinstance(value, Mapping | list | tuple):
            yield from _indices(value)


def _ignored_by(neck: Any, feature_specs: Sequence[Level]) -> tuple[int, ...]:
    """Run the neck forwards and backwards and see which maps get no gradient."""
    for device in ("meta", "cpu"):
        try:
            with _on(device):
                module = MODELS.build(copy.deepcopy(neck))
                # batch norm needs two values a channel, also on the levels that the neck adds
                maps = [torch.zeros(2, c, _IMAGE // s, _IMAGE // s, requires_grad=True) for c, s in feature_specs]
                out = module(tuple(maps))
                flat = [out] if isinstance(out, Tensor) else [x for x in out if isinstance(x, Tensor)]
                sum(x.sum() for x in flat).backward()  # type: ignore[union-attr]
            return tuple(i for i, x in enumerate(maps) if x.grad is None)
        except Exception:  # a neck of somebody else, or one without meta kernels
            continue
    return ()


def _encoder_options(
    variant: str | Mapping[str, Any],
    preset: str,
    layers: Sequence[int] | None,
    adapter: str,
    levels: int,
    unused: Sequence[int],
    further: Mapping[str, Any] | None,
    notes: list[str],
) -> dict[str, Any]:
    if adapter not in ADAPTERS:
        raise ConfigError(f"adapter is {adapter!r}; allowed are {', '.join(map(repr, ADAPTERS))}")
    options = _geometry(variant, preset, notes)
    if layers is None and adapter == "fused":
        depth = _shape(variant).depth
        layers = [depth * (k + 1) // 4 - 1 for k in range(4)]
    if layers is not None:
        layers = list(layers)
        if adapter == "simple" and len(layers) != 1:
            raise ConfigError(f"adapter 'simple' reads one layer but layers is {layers}; use 'fused' or 'single'")
        if adapter == "single" and len(layers) not in (1, levels):
            raise ConfigError(f"adapter 'single' reads one layer, or one for each of {levels} levels, not {layers}")
        if adapter == "single" and len(layers) == levels:  # deeper blocks than those read would never train
            read = [layers[i] for i in range(levels) if i not in unused]
            layers = [read[0] if i in unused else layer for i, layer in enumerate(layers)]
        options["out_indices"] = layers
    if adapter != "simple":
        options["adapter"] = adapter
    return {**options, **(further or {})}


def _geometry(variant: str | Mapping[str, Any], preset: str, notes: list[str]) -> dict[str, Any]:
    config = _shape(variant)
    if preset not in PRESETS:
        raise ConfigError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    patch = {} if math.log2(config.patch_size / _STRIDE).is_integer() else {"patch_size": _STRIDE}
    if _of_timm(variant):
        return patch
    if preset != "vitdet":
        return {"preset": preset, **patch}
    if config.depth in VITDET_RECIPES:
        return {"preset": preset}
    blocks = [config.depth * (k + 1) // 4 - 1 for k in range(4)]
    nearest = VITDET_RECIPES[_nearest_depth(config.depth)]
    notes.append(
        f"no ViTDet recipe is published for {config.depth} blocks; the blocks {blocks} get global attention, drop path "
        f"and layer decay are those of {_nearest_depth(config.depth)} blocks"
    )
    known = preset_options("vitdet", {**_fields(config), "depth": _nearest_depth(config.depth)})
    return {
        **known,
        "rope_grid": config.grid_size,
        "global_attn_indexes": [i for i in dict.fromkeys(blocks) if i >= 0],
        "drop_path_rate": nearest.drop_path_rate,
    }


def _of_timm(variant: str | Mapping[str, Any]) -> bool:
    return isinstance(variant, str) and variant.startswith(PREFIX)


def _shape(variant: str | Mapping[str, Any]) -> Any:
    """Return depth, patch size and the like of a variant."""
    if not _of_timm(variant):
        return _checked(get_config, variant)
    with torch.device("meta"):
        return _checked(build_encoder, variant).config


def _fields(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__dataclass_fields__}


def _nearest_depth(depth: int) -> int:
    return min(VITDET_RECIPES, key=lambda known: abs(known - depth))


def _statistics(variant: str | Mapping[str, Any], preset: str) -> tuple[list[float], list[float]]:
    """Return the mean and deviation of R, G, B in 0 to 255 that the encoder wants."""
    if _of_timm(variant):
        with torch.device("meta"):
            encoder = _checked(build_encoder, variant)
        return [round(255.0 * x, 4) for x in encoder.mean], [round(255.0 * x, 4) for x in encoder.std]  # type: ignore[union-attr]
    value = 127.0 if preset == "vitdet" else 127.5  # as Meta's detectors, and as PE's own transform
    return [value] * 3, [value] * 3


def _checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _check_builds(backbone: ConfigDict) -> None:
    with torch.device("meta"):
        _checked(MODELS.build, copy.deepcopy(backbone))


def _normalise(
    model: ConfigDict, mean: list[float], std: list[float], divisor: int, *, keep: str | None
) -> dict[str, Any]:
    """Edit every preprocessor of the images; return the statistics that it had, and whether the channels were BGR."""
    known: dict[str, Any] = dict(mean=[0.0] * 3, std=[1.0] * 3, bgr=True)
    found = [node for key in ("", "detector") for node in _preprocessors(model.get(key) if key else model)]
    for node in found:
        if node.get("mean") is not None:
            known.update(mean=list(node.mean), std=list(node.std))
        known["bgr"] = not node.get("bgr_to_rgb", False)
        if not keep:
            node.update(mean=mean, std=std, bgr_to_rgb=True)
            node.pop("rgb_to_bgr", None)
        if "pad_size_divisor" in node or not str(node.get("type")).endswith("SegDataPreProcessor"):
            node.pad_size_divisor = math.lcm(int(node.get("pad_size_divisor") or 1), divisor)
    return known


def _preprocessors(model: Any) -> list[ConfigDict]:
    node = (model or {}).get("data_preprocessor")
    while isinstance(node, Mapping) and isinstance(node.get("data_preprocessor"), Mapping):
        node = node["data_preprocessor"]  # MultiBranchDataPreprocessor
    return [node] if isinstance(node, ConfigDict) else []


def _shares_images(model: Mapping[str, Any]) -> str | None:
    """Return the part of the model, not swapped, that reads the same normalised images."""
    return next((key for key in model if key.startswith("teacher") or key == "reid"), None)


def _with_backbone(model: ConfigDict) -> tuple[ConfigDict, str]:
    node, place = model, "model"
    while isinstance(node.get("detector"), Mapping):
        node, place = node.detector, f"{place}.detector"
    if not isinstance(node.get("backbone"), Mapping):
        raise ConfigError(f"{place} ({_name(node)}) has no backbone to swap; it has {', '.join(node)}")
    return node, place


def _refuse(model: Mapping[str, Any]) -> None:
    nodes = [model]
    while isinstance(nodes[-1].get("detector"), Mapping):
        nodes.append(nodes[-1]["detector"])
    for node in nodes:
        parts = [node] + [node.get(key) for key in ("backbone", "decode_head", "head", "image_encoder")]
        for part in parts:
            if isinstance(part, Mapping) and (reason := _REFUSED.get(_name(part))):
                raise ConfigError(f"{_name(part)} keeps its own backbone: {reason}")


def _replace_rfp(node: ConfigDict, notes: list[str]) -> None:
    if not isinstance(node.get("neck"), Mapping) or _name(node.neck) != "RFP":
        return
    node.neck = ConfigDict({k: v for k, v in node.neck.items() if not k.startswith(("rfp_", "aspp_"))}, type="FPN")
    notes.append("RFP feeds its levels back into the stages of a second ResNet, so the neck becomes the FPN in it")


def _eval_level(node: Mapping[str, Any]) -> int | None:
    head = node.get("decode_head")
    return _EVALUATES_ONE.get(_name(head)) if isinstance(head, Mapping) else None


def _family_notes(node: Mapping[str, Any], feature_specs: Sequence[Level], notes: list[str]) -> None:
    if _name(node) in _TEXT_ALIGNED:
        notes.append(
            f"{_name(node)} aligns its maps with text, and the old backbone took part in learning that: it has to be "
            "trained again with PE, from the weights of text encoder and decoder, which load_from still loads"
        )
    if _name(node.get("bbox_head") or {}) in _HOURGLASS:
        notes.append(
            "corner heads were made for an hourglass: both of its maps come from PE's last layer at stride 4, which "
            "costs much memory, and nobody has measured the quality"
        )
    if (node.get("roi_head") or {}).get("shared_head"):
        notes.append("the shared head is a ResNet stage whose weights were trained behind the old backbone")
    if min(level.stride for level in feature_specs) < 4:
        notes.append("a level finer than stride 4 is made by deconvolution from stride 16 and costs much memory")


def _drop_old_weights(cfg: Config, notes: list[str]) -> None:
    text = False
    node = cfg.model
    while isinstance(node, Mapping):
        text = text or _name(node) in _TEXT_ALIGNED
        if node.get("init_cfg"):
            notes.append(f"{_name(node)}'s init_cfg loaded a whole model, so it is dropped: neck and heads start anew")
        for key in ("init_cfg", "pretrained"):
            if node.get(key) is not None:
                node[key] = None
        node = node.get("detector")
    if cfg.get("load_from") and not text:
        notes.append(f"load_from {cfg.load_from} belongs to the old backbone and is dropped; give your own if it fits")
        cfg.load_from = None


def _set_optimizer(cfg: Config, variant: str | Mapping[str, Any], lr: float | None, notes: list[str]) -> None:
    old = cfg.get("optim_wrapper")
    if not old or not old.get("optimizer"):
        notes.append("the config has no optim_wrapper, so none was set: it can be tested but not trained")
        return
    optimizer = old.optimizer
    adam = _name(optimizer) in _ADAM
    before = float(optimizer.get("lr", LEARNING_RATE))
    lr = lr or (min(before, LEARNING_RATE) if adam else LEARNING_RATE)
    if adam:
        kept = {k: v for k, v in optimizer.items() if k in ("betas", "eps", "weight_decay")}
    else:
        kept = {"betas": (0.9, 0.999), "weight_decay": WEIGHT_DECAY}
    paramwise = old.get("paramwise_cfg") or {}
    heads = {k: v for k, v in paramwise.items() if k in HEAD_OPTIONS and k != "custom_keys"}
    custom = {k: v for k, v in (paramwise.get("custom_keys") or {}).items() if not k.startswith(_OLD_KEYS)}
    depth = _shape(variant).depth
    rate = "vitdet" if depth in VITDET_RECIPES else VITDET_RECIPES[_nearest_depth(depth)].layer_decay_rate
    cfg.optim_wrapper = ConfigDict(
        {k: v for k, v in old.items() if k not in ("optimizer", "paramwise_cfg", "constructor")},
        optimizer=dict(type="AdamW", lr=lr, **kept),
        constructor="LayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=rate, **heads, **({"custom_keys": custom} if custom else {})),
    )
    schedules = cfg.get("param_scheduler")
    if schedules and before:
        for schedule in schedules if isinstance(schedules, list | tuple) else [schedules]:
            for key in ("eta_min", "eta_max"):  # learning rates, unlike the factors of other schedules
                if schedule.get(key):
                    schedule[key] = float(f"{schedule[key] * lr / before:.6g}")


def _set_runtime(cfg: Config) -> None:
    imports = cfg.get("custom_imports") or {}
    names = [imports["imports"]] if isinstance(imports.get("imports"), str) else list(imports.get("imports", ()))
    if "mmpretrain" not in str(cfg.model) and "mmcls" not in str(cfg.model):
        names = [name for name in names if name.partition(".")[0] not in ("mmpretrain", "mmcls")]
    ours = "pe_spatial.integrations.openmmlab"
    cfg.custom_imports = dict(imports=[*names, *([] if ours in names else [ours])], allow_failed_imports=False)
    hooks = list(cfg.get("custom_hooks") or [])
    if cfg.get("optim_wrapper") and not any(hook.get("type") == "ResumeWithoutPretrained" for hook in hooks):
        cfg.custom_hooks = [*hooks, dict(type="ResumeWithoutPretrained")]


def _name(node: Mapping[str, Any]) -> str:
    """Return the name of a type, without the scope or module before it."""
    kind = node.get("type", "")
    return kind.rpartition(".")[2] if isinstance(kind, str) else getattr(kind, "__name__", str(kind))


@contextmanager
def _scope(cfg: Config) -> Iterator[None]:
    scope = cfg.get("default_scope") or "mmdet"
    with DefaultScope.overwrite_default_scope(scope):
        yield


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config that inherits `before` has to say in order to become `after`.

    Where a mapping loses a key, or becomes another type, it is said whole, with `_delete_`. A key that is lost at the
    top level, where nothing can be deleted, becomes None.
    """
    out: dict[str, Any] = {}
    for key, new in after.items():
        old = before.get(key)
        if key in before and _plain(old) == _plain(new):
            continue
        if not isinstance(new, Mapping) or not isinstance(old, Mapping):
            out[key] = _plain(new)
        elif set(old) - set(new) or old.get("type") != new.get("type"):
            out[key] = {"_delete_": True, **_plain(new)}
        else:
            out[key] = difference(old, new)
    return out | {key: None for key in before if key not in after}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(x) for key, x in value.items() if key != "_scope_"}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value] if isinstance(value, list) else tuple(_plain(x) for x in value)
    return value


def write_swapped(cfg: Config, done: Swap, *, base: str, variant: str) -> str:
    """Return the text of a config that inherits `base`, the file of `cfg`, and states what the swap changed.

    Raises ConfigError for configs with lazy imports, which no other config can inherit by name.
    """
    before, after = cfg.to_dict(), done.cfg.to_dict()
    if not isinstance(cfg.model.get("type"), str) or "<" in repr(cfg.model.get("type")):
        raise ConfigError(f"{base} names classes instead of types, and a config cannot inherit such a file; swap it in "
                          "memory: python tools/train.py CONFIG --swap VARIANT")  # fmt: skip
    maps = ", ".join(f"{c} at stride {s}" for c, s in done.feature_specs)
    unread = f"; nobody reads those at {list(done.unused)}, so they have no parameters" if done.unused else ""
    lines = [
        f"# {base.rpartition('::')[2] if '::' in base else base.rpartition('/')[2]} with {variant} as its backbone."
    ]
    lines += textwrap.wrap(f"Its maps have the channels of those they replace: {maps}{unread}.", 116, **_COMMENT)
    for note in done.notes:
        lines += textwrap.wrap(f"Note: {note}.", 116, **_COMMENT)
    changes = difference(before, after)
    lines += ["", f"_base_ = {base!r}", "", *(f"{key} = {_source(value)}" for key, value in changes.items())]
    return "\n".join(lines) + "\n"


def _source(value: Any, indent: int = 0, room: int = 100) -> str:
    """Return Python source, `dict(...)` and one entry a line where it does not fit on one."""
    if isinstance(value, Mapping) and all(isinstance(key, str) and key.isidentifier() for key in value):
        entries, ends = [f"{key}={_source(x, indent + 4, room - len(key))}" for key, x in value.items()], ("dict(", ")")
    elif isinstance(value, Mapping):
        entries = [f"{key!r}: {_source(x, indent + 4, room - len(repr(key)))}" for key, x in value.items()]
        ends = ("{", "}")
    elif isinstance(value, list | tuple):
        entries = [_source(x, indent + 4) for x in value]
        ends = ("[", "]") if isinstance(value, list) else ("(", ",)" if len(value) == 1 else ")")
    else:
        return repr(value)
    line = ends[0] + ", ".join(entries) + ends[1]
    if len(line) + indent <= room and "\n" not in line:
        return line
    pad = "\n" + " " * (indent + 4)
    return ends[0] + pad + f",{pad}".join(entries) + ends[1]
