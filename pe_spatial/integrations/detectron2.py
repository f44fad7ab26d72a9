"""The encoder, its pyramids and its recipe under Detectron2's names. Registers and translates, never computes.

Importing this module registers `build_pe_spatial_backbone` for yacs configs; a LazyConfig names the class itself.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from torch import Tensor, nn

from pe_spatial.encoder import backbone as core
from pe_spatial.encoder.checkpoint import load_checkpoint, to_timm_names
from pe_spatial.encoder.files import CheckpointError, join_names, locate, read_state_dict
from pe_spatial.encoder.layer_decay import lr_factors
from pe_spatial.encoder.variants import DETECTOR_PIXELS, EncoderConfig
from pe_spatial.errors import ConfigError

_CONV = {2: 4, 3: 1, 4: 0, 5: 1}  # of the released level `simfp_{k}`: the index of its first convolution


class PerceptionEncoderPyramid(core.PerceptionEncoderPyramid, Backbone):
    """The core's `PerceptionEncoderPyramid` with Detectron2's levels 'p2' to 'p6' (the logarithms of the strides).

    State dicts of the released detectors load too, also through Detectron2's checkpointer.

    Args:
        variant: as in `PerceptionEncoder`.
        weights: None for random weights, or what `load_checkpoint` takes: 'released', 'hf://owner/repo', a local file.
        size_divisibility: Detectron2 pads the sides of a batch to multiples of it, in pixels; None for what patches and
            levels need. Complete windows are `window_size * patch_size`.
        square_size: side of the square to which Detectron2 pads every image, in pixels, as the released detectors do;
            0 for none. Detectron2 crops a single image that is larger without a warning, so resize to fit.
        options: those of the core's class.
    """

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        weights: str | Path | None = None,
        size_divisibility: int | None = None,
        square_size: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(variant, **options)
        strides = dict(zip(_names(self.strides), self.strides, strict=True))
        self._out_features = list(strides)
        self._out_feature_strides = strides
        self._out_feature_channels = dict(zip(strides, self.out_channels, strict=True))
        needed = 1 if self.any_size else _needed_divisor(self.strides, self.out_channels, self.encoder.patch_size)
        self._size_divisibility = _multiple("size_divisibility", size_divisibility or needed, needed)
        self._square_size = _multiple("square_size", square_size, self._size_divisibility)
        if weights is not None:
            load_checkpoint(self.encoder, weights)

    @property
    def size_divisibility(self) -> int:
        """Detectron2 pads the sides of a batch to multiples of it, in pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """`size_divisibility` and `square_size` under the keys that `ImageList.from_tensors` reads.

        detectron2@02b5c4e:detectron2/modeling/backbone/vit.py misspells the first one, so that only its square counts.
        """
        return {"size_divisibility": self._size_divisibility, "square_size": self._square_size}

    def forward(self, images: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
        """(B, 3, H, W), normalized -> name -> level, always float32, because RoIAlign casts the boxes to its dtype."""
        levels = super().forward(images)
        if isinstance(levels, Tensor):
            assert self.eval_level is not None
            return {self._out_features[self.eval_level]: levels}
        return dict(zip(self._out_features, levels, strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        marks = (f"{prefix}net.", f"{prefix}simfp_")
        released = {name: state_dict.pop(name) for name in list(state_dict) if name.startswith(marks)}
        ours = from_released_names({name.removeprefix(prefix): value for name, value in released.items()})
        state_dict.update({prefix + name: value for name, value in ours.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)


def from_released_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Bring the state dict of a released detector's backbone ('net.' and 'simfp_2.' to 'simfp_5.') to our names.

    Unknown names stay as they are, so that the load reports them; rotary constants are omitted and computed.
    """
    encoder = {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}
    out = {f"encoder.{name}": value for name, value in to_timm_names(encoder)[0].items()}
    for name, value in state.items():
        if not name.startswith("net."):
            out[re.sub(r"^simfp_([2-5])\.(\d+)(\.norm)?", _level_name, name)] = value
    return out


def _level_name(match: re.Match[str]) -> str:
    # Detectron2's convolutions contain their norms; in our levels a norm is the layer after its convolution.
    level, layer = int(match[1]), int(match[2])
    layer += max(layer - _CONV[level], 0) + bool(match[3])
    return f"pyramid.levels.{level - 2}.{layer}"


def load_released_detector(model: nn.Module, source: str | Path) -> None:
    """Load a released detector, or one that you trained, strictly, into a Detectron2 model on our backbone.

    `source` is a local file or 'hf://owner/repo/file'; pickled code never runs.
    Raises CheckpointError if the file is missing, cannot be read without running code, or does not match.
    """
    path = locate(source)
    try:
        keys = model.load_state_dict(read_state_dict(path), strict=False)
    except RuntimeError as error:
        shapes = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"{path} has tensors of other shapes than this model: {shapes}") from None
    if keys.missing_keys or keys.unexpected_keys:
        raise CheckpointError(
            f"{path} does not hold the weights of this model; only in the file: {join_names(keys.unexpected_keys)}; "
            f"missing in it: {join_names(keys.missing_keys)}; build the model that the file belongs to"
        )


def layer_decay(model: nn.Module, rate: float | str = "vitdet") -> Callable[[str], float]:
    """Return `lr_factors` (1 outside encoders) as `lr_factor_func` of Detectron2's `get_default_optimizer_params`."""
    factors = lr_factors(model, rate)
    # Detectron2 writes a dot before the parameters of the model itself.
    return lambda name: factors.get(name.removeprefix("."), 1.0)


def layer_decay_params(
    model: nn.Module, *, base_lr: float, layer_decay_rate: float | str = "vitdet", **options: Any
) -> list[dict[str, Any]]:
    """Return the parameter groups of an optimizer in a LazyConfig; its trainer fills in `model`.

    `base_lr` is the learning rate of the heads. `options` are those of `get_default_optimizer_params`; without any,
    norms and biases decay too, as released.
    """
    return get_default_optimizer_params(
        model, base_lr=base_lr, lr_factor_func=layer_decay(model, layer_decay_rate), **options
    )


def add_pe_spatial_config(cfg: CfgNode) -> None:
    """Add `MODEL.PE_SPATIAL` to a yacs config, and set the normalization and the channel order that PE expects."""
    cfg.MODEL.PIXEL_MEAN = [DETECTOR_PIXELS] * 3
    cfg.MODEL.PIXEL_STD = [DETECTOR_PIXELS] * 3
    cfg.INPUT.FORMAT = "RGB"
    cfg.MODEL.PE_SPATIAL = node = CfgNode()
    node.VARIANT = ""  # must be given: 'pe_spatial_b16_512', ...
    node.GEOMETRY = "vitdet"
    node.WEIGHTS = None  # 'released', 'hf://owner/repo', a file; MODEL.WEIGHTS is for complete detectors
    node.OUT_INDICES = (-1,)
    node.STRIDES = (4, 8, 16, 32, 64)
    node.OUT_CHANNELS = 256
    node.SIZE_DIVISIBILITY = None
    node.SQUARE_SIZE = 0
    node.FROZEN_STAGES = -1
    node.GRAD_CHECKPOINTING = False
    node.PATCH_SIZE = None  # that of the geometry
    node.DROP_PATH_RATE = None  # this and the next: a number, or None for the published one ('vitdet')
    node.LAYER_DECAY_RATE = None  # read by `build_optimizer`


@BACKBONE_REGISTRY.register()
def build_pe_spatial_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> PerceptionEncoderPyramid:
    """Build the backbone of a yacs config.

    Raises ConfigError where the config would feed the encoder anything but RGB pixels in [-1, 1].
    """
    node = cfg.MODEL.get("PE_SPATIAL") or CfgNode()
    if not node.get("VARIANT"):
        raise ConfigError(
            "MODEL.PE_SPATIAL.VARIANT is missing; call add_pe_spatial_config(cfg) before merging files, and set it to "
            "pe_spatial_b16_512 or the like"
        )
    _check_pixels(cfg)
    given = {name.lower(): value for name, value in node.items() if value is not None and name != "LAYER_DECAY_RATE"}
    pyramid = {name: given.pop(name) for name in ("strides", "out_channels")}
    backbone = PerceptionEncoderPyramid(**{"drop_path_rate": "vitdet", **given}, pyramid=pyramid)
    if input_shape.channels != backbone.encoder.config.in_chans:
        raise ConfigError(f"the input has {input_shape.channels} channels; {node.VARIANT} takes RGB")
    return backbone


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Build AdamW with layer-wise decay from `SOLVER` and `MODEL.PE_SPATIAL.LAYER_DECAY_RATE` of a yacs config.

    It replaces the SGD of `DefaultTrainer.build_optimizer`, with which PE was never fine-tuned.
    """
    solver = cfg.SOLVER
    if solver.BIAS_LR_FACTOR != 1.0:
        raise ConfigError(f"SOLVER.BIAS_LR_FACTOR is {solver.BIAS_LR_FACTOR}; layer-wise decay allows only 1.0")
    rate = cfg.MODEL.PE_SPATIAL.LAYER_DECAY_RATE
    params = layer_decay_params(
        model,
        base_lr=solver.BASE_LR,
        layer_decay_rate="vitdet" if rate is None else rate,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    optimizer = torch.optim.AdamW(params, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY)
    return maybe_add_gradient_clipping(cfg, optimizer)


def _check_pixels(cfg: CfgNode) -> None:
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    ends = [(pixel - m) / s for pixel in (0, 255) for m, s in zip(mean, std, strict=True)]
    if cfg.INPUT.FORMAT != "RGB" or any(abs(abs(end) - 1) > 0.05 for end in ends):
        raise ConfigError(
            f"INPUT.FORMAT is {cfg.INPUT.FORMAT}, MODEL.PIXEL_MEAN {list(mean)} and PIXEL_STD {list(std)}; "
            "PE takes RGB in [-1, 1]: set RGB and 127.0 (released detectors) or 127.5 (released encoders) throughout"
        )


def _names(strides: tuple[int, ...]) -> list[str]:
    names = [f"p{math.log2(stride):g}" for stride in strides]
    if len(set(names)) != len(names) or any("." in name for name in names):
        raise ConfigError(f"strides {strides} make the levels {names}; Detectron2 takes different powers of two")
    return names


def _needed_divisor(strides: tuple[int, ...], channels: tuple[int, ...], patch: int) -> int:
    # The coarsest levels subsample the one before them, and for that any number of cells will do.
    alike = len(set(channels)) == 1
    return math.lcm(patch, *(s for s in strides if s <= 2 * patch or s // 2 not in strides or not alike))


def _multiple(option: str, value: int, divisor: int) -> int:
    if value < 0 or value % divisor:
        raise ConfigError(f"{option} is {value} pixels; patches and levels need a multiple of {divisor}")
    return value
