"""The encoder, its pyramids and its recipe under OpenMMLab's names. Registers and translates, never computes.

Everything goes once into mmengine's root registry, where MMDetection, MMSegmentation and the others all look. In a
config: `custom_imports = dict(imports=['pe_spatial.integrations.openmmlab'])`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.hooks import Hook
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import Runner, find_latest_checkpoint
from mmengine.utils import is_installed
from torch import Tensor, nn

from pe_spatial.encoder import pyramid as core
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.encoder.layer_decay import is_norm_or_bias, lr_factor
from pe_spatial.encoder.variants import EncoderConfig, recipe_rate
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.timm import PREFIX, TimmEncoder, check_init_cfg

# So that `_base_ = 'pe_spatial::_base_/...'` is found once this module is imported, and `mmseg::...` where
# MMSegmentation was installed under another name than its own.
MODULE2PACKAGE.setdefault("pe_spatial", "pe_spatial")
if is_installed("mmseg") and not is_installed("mmsegmentation"):
    MODULE2PACKAGE["mmseg"] = "mmseg"

core.ChannelLayerNorm._abbr_ = "ln"  # type: ignore[attr-defined]  # the name that mmcv gives the layer in a ConvModule
MODELS.register_module(module=core.ChannelLayerNorm)


class Backbone(PerceptionEncoder):
    """`PerceptionEncoder` as a backbone: a tuple of single-scale maps.

    Args:
        variant: as in `PerceptionEncoder`.
        init_cfg: None for random weights, or `dict(type='Pretrained', checkpoint=...)` with what `load_checkpoint`
            takes: 'released', 'hf://owner/repo', or a local file. Loading is strict.
        options: those of `PerceptionEncoder`, such as `geometry`.
    """

    loads_released_weights = True

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        check_init_cfg(init_cfg)
        super().__init__(variant, **options)
        self.init_cfg = init_cfg
        self.is_init = False

    def init_weights(self) -> None:
        """Load the pretrained weights, if any; mmengine calls this before training, and only the first call counts."""
        if self.init_cfg is not None and not self.is_init:
            load_checkpoint(self, self.init_cfg["checkpoint"])
        self.is_init = True


class _Float32Levels:
    # Under bfloat16 autocast torch's layer norm gives float32 on CUDA but bfloat16 on CPU, and mmdet's RoI extractors
    # cast the boxes to the type of the levels: in bfloat16 a coordinate near 1000 moves by up to 4 pixels. And each of
    # up to six RoIAlign calls would bring the channels-last levels that the norms leave to contiguous ones again.
    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        """As in the core, but always float32 and contiguous; levels that nobody reads stay views of one zero."""
        levels = super().forward(maps)  # type: ignore[misc]
        return tuple(
            level.float() if not any(level.stride()) else level.to(torch.float32, memory_format=torch.contiguous_format)
            for level in levels
        )


@MODELS.register_module()
class SimpleFeaturePyramid(_Float32Levels, core.SimpleFeaturePyramid):
    """The core's `SimpleFeaturePyramid` as a neck."""


@MODELS.register_module()
class FusedFeaturePyramid(_Float32Levels, core.FusedFeaturePyramid):
    """The core's `FusedFeaturePyramid` as a neck."""


@MODELS.register_module()
class PlainFeaturePyramid(_Float32Levels, core.PlainFeaturePyramid):
    """The core's `PlainFeaturePyramid` as a neck."""


@MODELS.register_module()
class DETAFeaturePyramid(_Float32Levels, core.DETAFeaturePyramid):
    """The core's `DETAFeaturePyramid` as a neck."""


_ADAPTERS = {
    "simple": SimpleFeaturePyramid,
    "fused": FusedFeaturePyramid,
    "single": PlainFeaturePyramid,
    "deta": DETAFeaturePyramid,
}
_OF_ONE_MAP = ("simple", "deta")


@MODELS.register_module(name="PerceptionEncoder")
def build_encoder(variant: str | EncoderConfig | Mapping[str, Any], **options: Any) -> Backbone | TimmEncoder:
    """Return the encoder of `variant`: a `Backbone`, or for 'timm:NAME' a `TimmEncoder`, each with its own options.

    To go from the one to the other by a single option, options that the other does not have may be None.
    """
    encoder = TimmEncoder if isinstance(variant, str) and variant.startswith(PREFIX) else Backbone
    if encoder is TimmEncoder:
        known = list(inspect.signature(TimmEncoder).parameters)
        unknown = [key for key, value in options.items() if key not in known and value is not None]
        if unknown:
            raise ConfigError(
                f"{variant} has no {', '.join(unknown)}, unlike a Perception Encoder; leave it out or set it to None "
                f"(allowed are {', '.join(known[1:])})"
            )
        options = {key: value for key, value in options.items() if key in known}
    return encoder(variant, **options)


@MODELS.register_module()
class PerceptionEncoderPyramid(nn.Module):
    """Encoder and pyramid in one: outputs with the strides and channels of the backbone that it replaces.

    Widths follow from the variant, so that the variant is a single option: `model.backbone.variant=...`.

    Args:
        variant: as in `build_encoder`.
        pyramid: options of the adapter.
        adapter: 'simple' (`SimpleFeaturePyramid`), 'fused' (`FusedFeaturePyramid`), 'single' (`PlainFeaturePyramid`) or
            'deta' (`DETAFeaturePyramid`); None takes the first for one block in `out_indices` and the second for
            several.
        any_size: take images of any size: zeros at the right and at the bottom fill them up to whole cells of the
            coarsest level, and every level is cut to ceil(H / stride), as convolutional backbones leave it.
        renormalize: `dict(mean=, std=, bgr=, to_mean=, to_std=)`: the statistics that the images came normalised with,
            whether their channels are B, G, R, and the ones that this encoder wants, in R, G, B. For models in which
            something else, a teacher for instance, reads the same images.
        eval_level: in evaluation return this level alone, not a tuple, as real-time segmentation backbones do.
        options: those of `Backbone`.
    """

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        pyramid: Mapping[str, Any] | None = None,
        adapter: str | None = None,
        any_size: bool = False,
        renormalize: Mapping[str, Any] | None = None,
        eval_level: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.encoder = build_encoder(variant, **options)
        maps = len(self.encoder.out_indices)
        adapter = adapter or ("simple" if maps == 1 else "fused")
        if adapter not in _ADAPTERS:
            raise ConfigError(f"adapter is {adapter!r}; allowed are {', '.join(map(repr, _ADAPTERS))}")
        if adapter in _OF_ONE_MAP and maps > 1:
            raise ConfigError(
                f"adapter {adapter!r} reads one layer but out_indices names {maps}; use 'fused' or 'single'"
            )
        self.any_size = any_size
        self.eval_level = eval_level
        self.pyramid: nn.Module = _ADAPTERS[adapter](
            self.encoder.embed_dim if adapter in _OF_ONE_MAP else [self.encoder.embed_dim] * maps,  # type: ignore[arg-type]
            **{"in_stride": self.encoder.patch_size, **(pyramid or {})},
        )
        self._renormalize = renormalize is not None
        if renormalize is not None:
            scale, shift = _affine(**renormalize)
            self._bgr = bool(renormalize["bgr"])
            self.register_buffer("_scale", scale, persistent=False)
            self.register_buffer("_shift", shift, persistent=False)

    def init_weights(self) -> None:
        """Load the encoder's pretrained weights, if any."""
        self.encoder.init_weights()

    def forward(self, images: Tensor) -> tuple[Tensor, ...] | Tensor:
        """(B, 3, H, W), normalised -> one map for each stride of the pyramid."""
        images = self.normalised(images)
        h, w = images.shape[-2:]
        if self.any_size:
            cell = math.lcm(self.encoder.patch_size, *self._strides())
            images = F.pad(images, (0, -w % cell, 0, -h % cell))
        levels = self.pyramid(self.encoder(images))
        if self.any_size:
            strides = self._strides()
            levels = tuple(_cut(x, -(-h // s), -(-w // s)) for x, s in zip(levels, strides, strict=True))
        return levels if self.training or self.eval_level is None else levels[self.eval_level]

    def normalised(self, images: Tensor) -> Tensor:
        """Bring `images` (B, 3, H, W) to the encoder's own normalisation, if they came with another."""
        if not self._renormalize:
            return images
        return (images.flip(1) if self._bgr else images) * self._scale + self._shift

    def _strides(self) -> tuple[int, ...]:
        pyramid = self.pyramid.pyramid if isinstance(self.pyramid, FusedFeaturePyramid) else self.pyramid
        return pyramid.strides  # type: ignore[return-value, union-attr]


def _cut(level: Tensor, h: int, w: int) -> Tensor:
    level = level[..., :h, :w]
    return level.contiguous() if any(level.stride()) else level


def _affine(
    *, mean: Sequence[float], std: Sequence[float], bgr: bool, to_mean: Sequence[float], to_std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Return (scale, shift), (3, 1, 1) each and in R, G, B, from one normalisation to another."""
    values = [torch.tensor(list(v), dtype=torch.float32)[:, None, None] for v in (mean, std, to_mean, to_std)]
    if bgr:
        values[:2] = [v.flip(0) for v in values[:2]]
    return values[1] / values[3], (values[0] - values[2]) / values[3]


@HOOKS.register_module()
class ResumeWithoutPretrained(Hook):
    """Let a run that resumes start without the released weights: its checkpoint overwrites them anyway."""

    def before_run(self, runner: Runner) -> None:
        """Mark what loads released weights as initialised if a checkpoint is going to be resumed; that happens next."""
        if runner.cfg.get("resume") and (runner.cfg.get("load_from") or find_latest_checkpoint(runner.work_dir)):
            for module in runner.model.modules():
                if getattr(module, "loads_released_weights", False):
                    module.is_init = True


HEAD_OPTIONS = (
    "custom_keys",
    "bias_lr_mult",
    "bias_decay_mult",
    "norm_decay_mult",
    "flat_decay_mult",
    "dwconv_decay_mult",
    "dcn_offset_lr_mult",
)
"""Options of mmengine's own constructor that `LayerDecayOptimWrapperConstructor` takes for what is not the encoder."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for every PerceptionEncoder in the model.

    `paramwise_cfg` takes `layer_decay_rate`, a number or 'vitdet' (the published rate for the encoder's depth),
    `decay_norm_bias` (default True: norms, biases and learned positions decay like the rest, as released), and for
    what is not the encoder the `HEAD_OPTIONS`, which mean what they mean in mmengine.
    """

    def _validate_cfg(self) -> None:
        options = self.paramwise_cfg
        unknown = set(options) - {"layer_decay_rate", "decay_norm_bias", *HEAD_OPTIONS}
        if unknown or "layer_decay_rate" not in options:
            raise ConfigError(
                f"paramwise_cfg is {options}; it needs layer_decay_rate (a number or 'vitdet') and allows "
                f"decay_norm_bias and {', '.join(HEAD_OPTIONS)}"
            )
        if self.base_lr is None:
            raise ConfigError(
                f"the optimizer {self.optimizer_cfg} has no lr, so there is none to decay over the layers"
            )

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append one group for each pair of learning rate and weight decay; frozen parameters are left out."""
        encoders = {
            f"{name}." if name else "": child
            for name, child in module.named_modules()
            if isinstance(child, PerceptionEncoder | TimmEncoder)
        }
        if not encoders:
            raise ConfigError("the model holds no PerceptionEncoder, so there are no layers to decay the rate over")
        outside = self._outside(module)
        groups: dict[tuple[float, float | None], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            prefix = next((p for p in encoders if name.startswith(p)), None)
            if prefix is None:
                lr, decay = outside.get(id(parameter), (self.base_lr, None))
            else:
                encoder = encoders[prefix]
                lr, decay = self.base_lr, None
                lr *= _lr_factor(encoder, name.removeprefix(prefix), self._rate(encoder))
            if not self.paramwise_cfg.get("decay_norm_bias", True) and is_norm_or_bias(name, parameter):
                decay = 0.0
            # Without weight_decay in a group, the optimizer's own holds.
            new = {"params": [], "lr": lr, **({} if decay is None else {"weight_decay": decay})}
            groups.setdefault((lr, decay), new)["params"].append(parameter)
        params.extend(groups.values())

    def _outside(self, module: nn.Module) -> dict[int, tuple[float, float | None]]:
        """Return (learning rate, weight decay) by mmengine's rules, by the id of the parameter."""
        options = {key: value for key, value in self.paramwise_cfg.items() if key in HEAD_OPTIONS}
        if not options:
            return {}
        rules = DefaultOptimWrapperConstructor(dict(optimizer=self.optimizer_cfg), options)
        groups: list[dict[str, Any]] = []
        rules.add_params(groups, module)
        return {id(g["params"][0]): (g.get("lr", self.base_lr), g.get("weight_decay")) for g in groups}

    def _rate(self, encoder: PerceptionEncoder | TimmEncoder) -> float:
        return recipe_rate("layer_decay_rate", self.paramwise_cfg["layer_decay_rate"], encoder.config.depth)


def _lr_factor(encoder: PerceptionEncoder | TimmEncoder, name: str, rate: float) -> float:
    if isinstance(encoder, TimmEncoder):
        return encoder.lr_factor(name, rate)
    return lr_factor(name, depth=encoder.depth, rate=rate)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on any device; mmengine's AmpOptimWrapper refuses CPUs. Needs no loss scale."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of a training step under autocast."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
