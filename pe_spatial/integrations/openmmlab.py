"""The encoder, its pyramids and its recipe under OpenMMLab's names. Registers and translates, never computes.

Everything goes once into mmengine's root registry, where MMDetection, MMSegmentation and the others all look. In a
config: `custom_imports = dict(imports=['pe_spatial.integrations.openmmlab'])`.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import MODELS, OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.utils import is_installed
from torch import Tensor, nn

from pe_spatial.encoder import backbone
from pe_spatial.encoder import pyramid as core
from pe_spatial.encoder.checkpoint import load_checkpoint
from pe_spatial.encoder.layer_decay import is_norm_or_bias, lr_factors
from pe_spatial.encoder.variants import EncoderConfig
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.integrations.environment import warn_of_conflicts
from pe_spatial.integrations.timm import PREFIX, PretrainedMixin, TimmEncoder

# So that `_base_ = 'pe_spatial::_base_/...'` is found once this module is imported, and `mmseg::...` where
# MMSegmentation was installed under another name than its own.
MODULE2PACKAGE.setdefault("pe_spatial", "pe_spatial")
if is_installed("mmseg") and not is_installed("mmsegmentation"):
    MODULE2PACKAGE["mmseg"] = "mmseg"

warn_of_conflicts()
core.ChannelLayerNorm._abbr_ = "ln"  # type: ignore[attr-defined]  # the name that mmcv gives the layer in a ConvModule
MODELS.register_module(module=core.ChannelLayerNorm)


class Backbone(PretrainedMixin, PerceptionEncoder):
    """`PerceptionEncoder` as a backbone: a tuple of single-scale maps.

    Args:
        variant: as in `PerceptionEncoder`.
        init_cfg: None for random weights, or `dict(type='Pretrained', checkpoint=...)` with what `load_checkpoint`
            takes: 'released', 'hf://owner/repo', or a local file. Loading is strict.
        options: those of `PerceptionEncoder`, such as `geometry`.
    """

    def __init__(
        self, variant: str | EncoderConfig | Mapping[str, Any], *, init_cfg: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(variant, **options)
        self.set_init_cfg(init_cfg)
        self.base_source = init_cfg["checkpoint"] if init_cfg else None

    def load_weights(self, source: str) -> None:
        """Load a checkpoint as `load_checkpoint` does."""
        load_checkpoint(self, source)


class _Float32Levels:
    def forward(self, maps: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
        return core.as_float32(super().forward(maps))  # type: ignore[misc]


for _pyramid in backbone.ADAPTERS.values():  # the core's pyramids as necks under their names, with levels in float32
    MODELS.register_module(module=type(_pyramid.__name__, (_Float32Levels, _pyramid), {}))


@MODELS.register_module(name="PerceptionEncoder")
def build_encoder(variant: str | EncoderConfig | Mapping[str, Any], **options: Any) -> Backbone | TimmEncoder:
    """Return the encoder of `variant`: a `Backbone`, or for 'timm:NAME' a `TimmEncoder`, each with its own options.

    Options that a `TimmEncoder` does not have may be None, so that a config changes the encoder by `variant` alone.
    """
    if isinstance(variant, str) and variant.startswith(PREFIX):
        allowed = list(inspect.signature(TimmEncoder).parameters)[1:]
        unknown = [key for key, value in options.items() if key not in allowed and value is not None]
        if unknown:
            raise ConfigError(
                f"{variant} has no {', '.join(unknown)}, unlike a Perception Encoder; omit it or set it to None "
                f"(allowed are {', '.join(allowed)})"
            )
        return TimmEncoder(variant, **{key: value for key, value in options.items() if key in allowed})
    return Backbone(variant, **options)


@MODELS.register_module()
class PerceptionEncoderPyramid(backbone.PerceptionEncoderPyramid):
    """The core's `PerceptionEncoderPyramid`, whose encoder comes from `build_encoder`: `init_cfg` loads its weights."""

    def build_encoder(self, variant: str | EncoderConfig | Mapping[str, Any], **options: Any) -> Any:
        """Return a `Backbone` or a `TimmEncoder`."""
        return build_encoder(variant, **options)

    def init_weights(self) -> None:
        """Load the encoder's pretrained weights, if any."""
        self.encoder.init_weights()


HEAD_OPTIONS = (
    "custom_keys", "bias_lr_mult", "bias_decay_mult", "norm_decay_mult", "flat_decay_mult", "dwconv_decay_mult",
    "dcn_offset_lr_mult",
)  # fmt: skip
"""Options of mmengine's own constructor that `LayerDecayOptimWrapperConstructor` takes for what is not the encoder."""


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Layer-wise learning-rate decay for every encoder in the model.

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
            raise ConfigError(f"the optimizer {self.optimizer_cfg} has no lr that could decay over the layers; set lr")

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, **_: Any) -> None:
        """Append one group for each pair of learning rate and weight decay; frozen parameters are omitted."""
        factors = lr_factors(module, self.paramwise_cfg["layer_decay_rate"])
        outside = self._outside(module)
        groups: dict[tuple[float, float | None], dict[str, Any]] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            if name in factors:
                lr, decay = self.base_lr * factors[name], None
            else:
                lr, decay = outside.get(id(parameter), (self.base_lr, None))
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
        base_lr: Any = self.base_lr
        return {id(g["params"][0]): (g.get("lr", base_lr), g.get("weight_decay")) for g in groups}
