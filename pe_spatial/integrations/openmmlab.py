"""The encoder, its pyramids and its recipe under OpenMMLab's names. Registers and translates, never computes.

Everything goes once into mmengine's root registry, where MMDetection, MMSegmentation and the others all look. In a
config: `custom_imports = dict(imports=['pe_spatial.integrations.openmmlab'])`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from mmengine.runner import Runner, find_latest_checkpoint
from torch import Tensor, nn

from pe_spatial.encoder import pyramid as core
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.encoder.layer_decay import is_norm_or_bias, lr_factor
from pe_spatial.encoder.variants import EncoderConfig, preset_options, vitdet_recipe
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError

core.ChannelLayerNorm._abbr_ = "ln"  # type: ignore[attr-defined]  # the name that mmcv gives the layer in a ConvModule
MODELS.register_module(module=core.ChannelLayerNorm)


@MODELS.register_module(name="PerceptionEncoder")
class Backbone(PerceptionEncoder):
    """`PerceptionEncoder` as a backbone: a tuple of single-scale maps.

    Args:
        variant: as in `PerceptionEncoder`.
        preset: 'release', 'timm' or 'vitdet': the geometry (see `preset_options`); None leaves it to `options`.
        init_cfg: None for random weights, or `dict(type='Pretrained', checkpoint=...)` with what `load_checkpoint`
            takes: 'released', 'hf://owner/repo', or a local file. Loading is strict.
        options: those of `PerceptionEncoder`; they override the preset.
    """

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        preset: str | None = None,
        init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}):
            raise ConfigError(f"init_cfg is {init_cfg}; allowed are None and dict(type='Pretrained', checkpoint=...)")
        super().__init__(variant, **{**(preset_options(preset, variant) if preset else {}), **options})
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
        """As in the core, but always float32 and contiguous."""
        levels = super().forward(maps)  # type: ignore[misc]
        return tuple(level.to(torch.float32, memory_format=torch.contiguous_format) for level in levels)


@MODELS.register_module()
class SimpleFeaturePyramid(_Float32Levels, core.SimpleFeaturePyramid):
    """The core's `SimpleFeaturePyramid` as a neck."""


@MODELS.register_module()
class FusedFeaturePyramid(_Float32Levels, core.FusedFeaturePyramid):
    """The core's `FusedFeaturePyramid` as a neck."""


@MODELS.register_module()
class PerceptionEncoderPyramid(nn.Module):
    """Encoder and pyramid in one: outputs with the strides and channels of the backbone that it replaces.

    Widths follow from the variant, so that the variant is a single option: `model.backbone.variant=...`.

    Args:
        variant: as in `PerceptionEncoder`.
        pyramid: options of `SimpleFeaturePyramid`, or of `FusedFeaturePyramid` if `out_indices` names several blocks.
        options: those of `Backbone`.
    """

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        pyramid: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.encoder = Backbone(variant, **options)
        maps = len(self.encoder.out_indices)
        sizes = {"in_stride": self.encoder.patch_size, **(pyramid or {})}
        self.pyramid: nn.Module
        if maps == 1:
            self.pyramid = SimpleFeaturePyramid(self.encoder.embed_dim, **sizes)
        else:
            self.pyramid = FusedFeaturePyramid([self.encoder.embed_dim] * maps, **sizes)

    def init_weights(self) -> None:
        """Load the encoder's pretrained weights, if any."""
        self.encoder.init_weights()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W), normalised -> one map for each stride of the pyramid."""
        return self.pyramid(self.encoder(images))


@HOOKS.register_module()
class ResumeWithoutPretrained(Hook):
    """Let a run that resumes start without the released weights: its checkpoint overwrites them anyway."""

    def before_run(self, runner: Runner) -> None:
        """Mark encoders as initialised if a checkpoint is going to be resumed; mmengine initialises weights next."""
        if runner.cfg.get("resume") and (runner.cfg.get("load_from") or find_latest_checkpoint(runner.work_dir)):
            for module in runner.model.modules():
                if isinstance(module, Backbone):
                    module.is_init = True


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for every PerceptionEncoder in the model.

    `paramwise_cfg` takes `layer_decay_rate`, a number or 'vitdet' (the published rate for the encoder's depth), and
    `decay_norm_bias` (default True: norms, biases and learned positions decay like the rest, as released).
    """

    def _validate_cfg(self) -> None:
        options = self.paramwise_cfg
        unknown = set(options) - {"layer_decay_rate", "decay_norm_bias"}
        if unknown or "layer_decay_rate" not in options:
            raise ConfigError(
                f"paramwise_cfg is {options}; it needs layer_decay_rate (a number or 'vitdet') and allows "
                "decay_norm_bias"
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
            if isinstance(child, PerceptionEncoder)
        }
        if not encoders:
            raise ConfigError("the model holds no PerceptionEncoder, so there are no layers to decay the rate over")
        groups: dict[tuple[float, bool], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr = self.base_lr
            prefix = next((p for p in encoders if name.startswith(p)), None)
            if prefix is not None:
                encoder = encoders[prefix]
                lr *= lr_factor(name.removeprefix(prefix), depth=encoder.depth, rate=self._rate(encoder))
            exempt = not self.paramwise_cfg.get("decay_norm_bias", True) and is_norm_or_bias(name, parameter)
            # Without weight_decay in a group, the optimizer's own holds.
            new = {"params": [], "lr": lr, **({"weight_decay": 0.0} if exempt else {})}
            groups.setdefault((lr, exempt), new)["params"].append(parameter)
        params.extend(groups.values())

    def _rate(self, encoder: PerceptionEncoder) -> float:
        rate = self.paramwise_cfg["layer_decay_rate"]
        return vitdet_recipe(encoder.config.depth).layer_decay_rate if rate == "vitdet" else float(rate)


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Mixed precision in bfloat16 on any device; mmengine's AmpOptimWrapper refuses CPUs. Needs no loss scale."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Run the forward pass of a training step under autocast."""
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, torch.bfloat16):
            yield
