"""Put PE in place of the backbone of any MMDetection or MMSegmentation config; neck and heads stay as they are.

PE has to give the maps that the original backbone gives (see probe.py). What cannot work is refused with the reason.
"""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope

from pe_spatial.encoder.variants import DETECTOR_PIXELS, VITDET_RECIPES, get_config, nearest_recipe, quarters
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.integrations.openmmlab import HEAD_OPTIONS, build_encoder
from pe_spatial.integrations.swap.probe import Level, evaluation_level, find_feature_specs, find_unused, type_name
from pe_spatial.integrations.timm import PREFIX

ADAPTERS = ("simple", "fused", "single")
GEOMETRIES = ("release", "timm", "vitdet")  # DETA's needs its own pyramid and statistics
LEARNING_RATE = 1e-4  # ViTDet's and PE's for AdamW
WEIGHT_DECAY = 0.1
_STRIDE = 16  # of the encoder's map; where a released patch differs, its kernel is resized
_HIDDEN = 256  # width of the 3x3 convolutions in wide levels, from which necks read 256 channels again

_REFUSED = {
    "BaseReID": "re-identification embeds crops of one person (256x128 pixels) and uses no maps; keep its ResNet",
    "LinearReIDHead": "re-identification embeds crops and uses no maps; keep its ResNet",
    "TridentFasterRCNN": "its three branches are three dilations of one ResNet stage, and its heads expect three "
    "results; swap faster_rcnn_r50-caffe-c4 or, better, faster_rcnn_r50_fpn",
    "TridentResNet": "its three branches are three dilations of one ResNet stage; swap faster_rcnn_r50_fpn",
    "Detectron2Wrapper": "the model inside is Detectron2's, not MMDetection's; use pe_spatial.integrations.detectron2",
    "MultimodalEncoderDecoder": "its side adapter reads tokens, heads and text of CLIP; swap mask2former or upernet",
    "DPTHead": "it reads the class token of each layer in addition to the map; swap a upernet, segmenter or setr "
    "config (PE has a class token, but a backbone returns maps)",
    "VPD": "the diffusion model is the method itself; swap a upernet config, or use a depth config of this project",
    "CLIPTextContextEncoder": "its decoder is aligned with CLIP's text; swap mask2former or upernet",
}
_TEXT_ALIGNED = ("GLIP", "GroundingDINO")
_HOURGLASS = ("CornerNet", "CentripetalHead", "CornerHead")
_OLD_KEYS = ("backbone", "absolute_pos_embed", "relative_position_bias_table", "pos_block", "pos_embed", "cls_token")
_ADAM = ("Adam", "AdamW", "NAdam", "RAdam")


class Swap(NamedTuple):
    """The result of a swap."""

    cfg: Config
    feature_specs: tuple[Level, ...]  # the maps that both backbones give
    unused: tuple[int, ...]  # indices of maps that nobody reads
    notes: tuple[str, ...]  # sentences that the user should read


def swap_backbone(cfg: Config, variant: str | Mapping[str, Any], **options: Any) -> Config:
    """Return `cfg` with PE in place of its backbone; the notes of `plan_swap` become warnings."""
    swap = plan_swap(cfg, variant, **options)
    for note in swap.notes:
        warnings.warn(note, stacklevel=2)
    return swap.cfg


def plan_swap(
    cfg: Config,
    variant: str | Mapping[str, Any],
    *,
    layers: Sequence[int] | None = None,
    adapter: str = "simple",
    strides: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    geometry: str = "vitdet",
    checkpoint: str | None = "released",
    lr: float | None = None,
    encoder: Mapping[str, Any] | None = None,
) -> Swap:
    """Put PE in place of the backbone of `cfg`, and note the consequences.

    Raises ConfigError where a swap cannot work, with what to use instead, and where the backbone cannot be probed.

    Args:
        cfg: a merged config; it is not changed.
        variant: the encoder, as in `PerceptionEncoderPyramid`.
        layers: blocks to read, 0-based, negatives count from the end; by default the last one for 'simple' and
            'single', four at equal distances for 'fused'.
        adapter: 'simple' (ViTDet's pyramid on one layer), 'fused' (on the sum of several) or 'single' (each level is
            one layer, resampled and projected; one layer, or one for each level).
        strides, channels: strides (in pixels) and channels of the maps, if the backbone cannot be probed.
        geometry: 'vitdet', 'release' or 'timm', as in `PerceptionEncoder`; but 'vitdet' also supports depths without
            published global blocks: it takes the last blocks of four equal parts. Encoders of timm ignore it.
        checkpoint: checkpoint of the encoder, as in `load_checkpoint`; None starts from random weights.
        lr: learning rate; by default 1e-4, or the original one if it belongs to an Adam and is lower.
        encoder: further options of `PerceptionEncoder`, for instance `frozen_stages`.
    """
    new = copy.deepcopy(cfg)
    notes: list[str] = []
    with DefaultScope.overwrite_default_scope(new.get("default_scope") or "mmdet"):
        _refuse(new)
        node, place = _find_backbone(new.model)
        _replace_rfp(node, notes)
        feature_specs = find_feature_specs(node, place, strides, channels)
        unused = find_unused(node, feature_specs)
        divisor = math.lcm(_STRIDE, *(level.stride for i, level in enumerate(feature_specs) if i not in unused))
        eval_level = evaluation_level(node)
        backbone = ConfigDict(
            type="PerceptionEncoderPyramid",
            variant=copy.deepcopy(variant),
            **_encoder_options(variant, geometry, layers, adapter, len(feature_specs), unused, encoder, notes),
            any_size=True,
            pyramid=_pyramid(feature_specs, unused, adapter),
            **_set_preprocessors(new.model, *_statistics(variant, geometry), divisor, notes),
            init_cfg=None if checkpoint is None else dict(type="Pretrained", checkpoint=checkpoint),
            **({} if eval_level is None else {"eval_level": eval_level}),
        )
        with torch.device("meta"):  # raises for options that do not fit together
            _checked(MODELS.build, copy.deepcopy(backbone))
        node.backbone = backbone
        _add_model_notes(node, feature_specs, notes)
    _drop_old_weights(new, notes)
    _set_optimizer(new, variant, lr, notes)
    _set_runtime(new, notes)
    return Swap(new, feature_specs, unused, tuple(notes))


def _models(model: ConfigDict) -> list[ConfigDict]:
    """Return `model`, its detector if it has one, the detector's own, ...; the last one has the backbone."""
    models = [model]
    while isinstance(models[-1].get("detector"), Mapping):
        models.append(models[-1].detector)
    return models


def _find_backbone(model: ConfigDict) -> tuple[ConfigDict, str]:
    models = _models(model)
    node, place = models[-1], "model" + ".detector" * (len(models) - 1)
    if not isinstance(node.get("backbone"), Mapping):
        raise ConfigError(f"{place} ({type_name(node)}) has no backbone to swap; its keys are {', '.join(node)}")
    return node, place


def _replace_rfp(node: ConfigDict, notes: list[str]) -> None:
    if isinstance(node.get("neck"), Mapping) and type_name(node.neck) == "RFP":
        kept = {k: v for k, v in node.neck.items() if not k.startswith(("rfp_", "aspp_"))}
        node.neck = ConfigDict(kept, type="FPN")
        notes.append("RFP feeds its levels back into a second ResNet, so the neck becomes the FPN that it contains")


def _pyramid(feature_specs: Sequence[Level], unused: Sequence[int], adapter: str) -> dict[str, Any]:
    channels, strides = zip(*feature_specs, strict=True)
    wide = adapter != "single" and max(channels) > _HIDDEN
    options = ({"unused": list(unused)} if unused else {}) | ({"hidden_channels": _HIDDEN} if wide else {})
    return dict(strides=list(strides), out_channels=list(channels), **options)


def count_parameters(cfg: Config) -> dict[str, int]:
    """Return the number of parameters of a swapped model's encoder, pyramid, neck and heads."""
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope") or "mmdet"), torch.device("meta"):
        model = _checked(MODELS.build, copy.deepcopy(cfg.model))
    counts = dict.fromkeys(("encoder", "pyramid", "neck", "heads"), 0)
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("detector.").split(".")
        backbone = "encoder" if parts[1:2] == ["encoder"] else "pyramid"
        part = {"backbone": backbone, "neck": "neck"}.get(parts[0], "heads")
        counts[part] += parameter.numel()
    return counts


def _encoder_options(
    variant: str | Mapping[str, Any], geometry: str, layers: Sequence[int] | None, adapter: str, levels: int,
    unused: Sequence[int], more: Mapping[str, Any] | None, notes: list[str],
) -> dict[str, Any]:  # fmt: skip
    one_of("adapter", adapter, ADAPTERS)
    options = _geometry(variant, geometry, notes)
    if layers is None and adapter == "fused":
        depth = _shape(variant).depth
        layers = quarters(depth)
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
    return {**options, **(more or {})}


def _geometry(variant: str | Mapping[str, Any], geometry: str, notes: list[str]) -> dict[str, Any]:
    """Return the options of the encoder that set its geometry, and the drop path that belongs to it."""
    config = _shape(variant)
    one_of("geometry", geometry, GEOMETRIES)
    patch = {} if math.log2(config.patch_size / _STRIDE).is_integer() else {"patch_size": _STRIDE}
    if _of_timm(variant):
        return patch
    if geometry != "vitdet":
        return {"geometry": geometry, **patch}
    recipe, note = nearest_recipe(config.depth)
    if not note:
        return {"geometry": geometry, "drop_path_rate": "vitdet"}
    notes.append(note)
    blocks = list(recipe.global_attn_indexes)
    return {"geometry": geometry, "global_attn_indexes": blocks, "drop_path_rate": recipe.drop_path_rate}


def _of_timm(variant: str | Mapping[str, Any]) -> bool:
    return isinstance(variant, str) and variant.startswith(PREFIX)


def _shape(variant: str | Mapping[str, Any]) -> Any:
    """Return the encoder's config."""
    if not _of_timm(variant):
        return _checked(get_config, variant)
    with torch.device("meta"):
        return _checked(build_encoder, variant).config


def _statistics(variant: str | Mapping[str, Any], geometry: str) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of R, G, B, in 0 to 255, that the encoder is trained with."""
    if geometry == "vitdet" and not _of_timm(variant):
        return [DETECTOR_PIXELS] * 3, [DETECTOR_PIXELS] * 3
    config = _shape(variant)
    return list(config.mean), list(config.std)


def _checked(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return function(*args, **kwargs)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def _set_preprocessors(
    model: ConfigDict, mean: list[float], std: list[float], divisor: int, notes: list[str]
) -> dict[str, Any]:
    """Let every preprocessor normalize and pad the images as PE needs them; return an option of the backbone.

    If another network reads the same images, their normalization stays, and the option renormalizes them for PE.
    """
    shared = next((key for key in model if key.startswith("teacher") or key == "reid"), None)
    before: dict[str, Any] = dict(mean=[0.0] * 3, std=[1.0] * 3, bgr=True)
    for node in map(_preprocessor, _models(model)):
        if node is None:
            continue
        if node.get("mean") is not None:
            before.update(mean=list(node.mean), std=list(node.std))
        before["bgr"] = not node.get("bgr_to_rgb", False)
        if not shared:
            node.update(mean=mean, std=std, bgr_to_rgb=True)
            node.pop("rgb_to_bgr", None)
        if "pad_size_divisor" in node or not str(node.get("type")).endswith("SegDataPreProcessor"):
            node.pad_size_divisor = math.lcm(int(node.get("pad_size_divisor") or 1), divisor)
    if not shared:
        return {}
    notes.append(f"{shared} reads the same images: their normalization stays, and PE renormalizes its own copy")
    return {"renormalize": dict(**before, to_mean=mean, to_std=std)}


def _preprocessor(model: ConfigDict) -> ConfigDict | None:
    node = model.get("data_preprocessor")
    while isinstance(node, Mapping) and isinstance(node.get("data_preprocessor"), Mapping):
        node = node["data_preprocessor"]  # MultiBranchDataPreprocessor
    return node if isinstance(node, ConfigDict) else None


def _refuse(cfg: Config) -> None:
    if "model" not in cfg:
        raise ConfigError(f"{cfg.filename or 'the config'} has no model, so there is no backbone to swap")
    for node in _models(cfg.model):
        for part in (node, *map(node.get, ("backbone", "decode_head", "head", "image_encoder"))):
            if isinstance(part, Mapping) and (reason := _REFUSED.get(type_name(part))):
                raise ConfigError(f"{type_name(part)} cannot be swapped: {reason}")


def _add_model_notes(node: Mapping[str, Any], feature_specs: Sequence[Level], notes: list[str]) -> None:
    if type_name(node) in _TEXT_ALIGNED:
        notes.append(
            f"{type_name(node)} was aligned with text through its old backbone: train it again with PE, from the "
            "weights of text encoder and decoder, which load_from still loads"
        )
    if type_name(node.get("bbox_head") or {}) in _HOURGLASS:
        notes.append(
            "corner heads were designed for an hourglass: both maps come from PE's last layer at stride 4, which takes "
            "much memory; the accuracy is not known"
        )
    if (node.get("roi_head") or {}).get("shared_head"):
        notes.append("the shared head is a ResNet stage that was trained with the old backbone")
    if min(level.stride for level in feature_specs) < 4:
        notes.append("a level finer than stride 4 is computed by deconvolution from stride 16 and takes much memory")


def _drop_old_weights(cfg: Config, notes: list[str]) -> None:
    models = _models(cfg.model)
    for node in models:
        if node.get("init_cfg"):
            notes.append(f"init_cfg of {type_name(node)} loaded a complete model and is removed, so the heads are new")
        for key in ("init_cfg", "pretrained"):
            if node.get(key) is not None:
                node[key] = None
    if cfg.get("load_from") and not any(type_name(node) in _TEXT_ALIGNED for node in models):
        notes.append(f"load_from {cfg.load_from} belongs to the old backbone and is removed; set another one that fits")
        cfg.load_from = None


def _set_optimizer(cfg: Config, variant: str | Mapping[str, Any], lr: float | None, notes: list[str]) -> None:
    old = cfg.get("optim_wrapper")
    if not old or not old.get("optimizer"):
        notes.append("the config has no optim_wrapper, and the swap adds none: it can be tested but not trained")
        return
    optimizer = old.optimizer
    adam = type_name(optimizer) in _ADAM
    before = float(optimizer.get("lr", LEARNING_RATE))
    lr = lr or (min(before, LEARNING_RATE) if adam else LEARNING_RATE)
    kept = {"betas": (0.9, 0.999), "weight_decay": WEIGHT_DECAY}
    if adam:
        kept = {k: v for k, v in optimizer.items() if k in ("betas", "eps", "weight_decay")}
    paramwise = old.get("paramwise_cfg") or {}
    heads = {k: v for k, v in paramwise.items() if k in HEAD_OPTIONS and k != "custom_keys"}
    custom = {k: v for k, v in (paramwise.get("custom_keys") or {}).items() if not k.startswith(_OLD_KEYS)}
    depth = _shape(variant).depth
    rate = "vitdet" if depth in VITDET_RECIPES else nearest_recipe(depth)[0].layer_decay_rate
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


def _set_runtime(cfg: Config, notes: list[str]) -> None:
    imports = cfg.get("custom_imports") or {}
    names = [imports["imports"]] if isinstance(imports.get("imports"), str) else list(imports.get("imports", ()))
    if "mmpretrain" not in str(cfg.model) and "mmcls" not in str(cfg.model):
        names = [name for name in names if name.partition(".")[0] not in ("mmpretrain", "mmcls")]
    imports = list(dict.fromkeys([*names, "pe_spatial.integrations.openmmlab"]))
    cfg.custom_imports = dict(imports=imports, allow_failed_imports=False)
    if any("EMAHook" in str(hook.get("type")) for hook in cfg.get("custom_hooks") or []):
        notes.append("EMAHook keeps a second copy of the model, and so of the encoder, in memory")
