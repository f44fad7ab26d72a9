"""SAM 2.1 with a Perception Encoder as its image encoder: the trunk, its neck, and the model around them.

Everything but the image encoder is built from unmodified classes of the package `sam2`. It is imported when the first
model is built, because importing it initializes hydra.

A grid of g x g tokens counts as stride 16 for every encoder: the model works on images of 16 g pixels per side, and the
trunk resizes them to g patches per side. Models of patch size 14 and 16 differ in the encoder alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.encoder.checkpoint import load_checkpoint, mismatch
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint, read_state_dict
from pe_spatial.encoder.geometry import PRESETS, Geometry
from pe_spatial.encoder.lora_files import add_base
from pe_spatial.encoder.pyramid import SimpleFeaturePyramid
from pe_spatial.encoder.variants import EncoderConfig, get_config
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError

if TYPE_CHECKING:
    from sam2.modeling.memory_attention import MemoryAttention
    from sam2.modeling.sam2_base import SAM2Base

STRIDE = 16
"""Pixels of the model's image per token, for every patch size of the encoder."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Statistics of R, G, B in the range 0 to 1 with which sam2 normalizes images."""

_ON = """
    use_mask_input_as_output_without_sam directly_add_no_mem_embed no_obj_embed_spatial use_high_res_features_in_sam
    multimask_output_in_sam iou_prediction_use_sigmoid use_obj_ptrs_in_encoder add_tpos_enc_to_obj_ptrs
    proj_tpos_enc_in_obj_ptrs use_signed_tpos_enc_to_obj_ptrs only_obj_ptrs_in_the_past_for_eval pred_obj_scores
    pred_obj_scores_mlp fixed_no_obj_ptr multimask_output_for_tracking use_multimask_token_for_obj_ptr
    use_mlp_for_obj_ptr_proj
"""
RELEASE_FLAGS: dict[str, Any] = dict.fromkeys(_ON.split(), True) | {
    "num_maskmem": 7,
    "sigmoid_scale_for_mem_enc": 20.0,
    "sigmoid_bias_for_mem_enc": -10.0,
    "multimask_min_pt_num": 0,
    "multimask_max_pt_num": 1,
}
"""SAM 2.1's options that differ from `SAM2Base`'s (facebookresearch/sam2@2b90b9f:sam2/configs/sam2.1/*.yaml)."""

_log = logging.getLogger(__name__)


class PETrunk(nn.Module):
    """A Perception Encoder as the trunk of sam2's `ImageEncoder`.

    Up to the pretraining grid it runs as released. Above it most blocks attend in windows of the pretraining grid, with
    learned positions tiled and rotary positions compressed, because the released geometry gets worse on larger images.

    Args:
        variant: as in `PerceptionEncoder`.
        grid: tokens per side.
        image_size: pixels per side of the input images, which are normalized with ImageNet's statistics; None takes one
            patch of the encoder per token.
        out_index: block whose output is returned.
        frozen: run in evaluation mode and without autograd (up to `frozen_stages` if `options` contain it), but for the
            adapters if `options` contain `lora`.
        options: options of `PerceptionEncoder`. `geometry` or `window_size` among them replaces the geometry above:
            `dict(geometry='release')` is the released one at every grid.

    Raises ConfigError for a grid above the pretraining grid if the encoder has no published global blocks.
    """

    _scale: Tensor
    _shift: Tensor

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        grid: int,
        image_size: int | None = None,
        out_index: int = -1,
        frozen: bool = True,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = get_config(variant)
        options = dict(options or {})
        if frozen and not options.get("lora"):
            options.setdefault("frozen_stages", out_index % config.depth + 1)
        if "window_size" not in options:
            options.setdefault("geometry", _geometry(config, grid))
        self.encoder = PerceptionEncoder(variant, out_indices=(out_index,), **options)
        self.input_size = grid * self.encoder.patch_size
        self.image_size = image_size or self.input_size
        self.channel_list = [self.encoder.embed_dim]
        mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        pe_mean, pe_std = (torch.tensor(values)[:, None, None] / 255 for values in (config.mean, config.std))
        self.register_buffer("_scale", std / pe_std, persistent=False)
        self.register_buffer("_shift", (mean - pe_mean) / pe_std, persistent=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, S, S), S = `image_size`, normalized with ImageNet's statistics -> [(B, C, grid, grid)]."""
        if images.shape[-2:] != (self.image_size, self.image_size):
            side = self.image_size
            raise ValueError(f"images are {tuple(images.shape)}; resize to {side}x{side}, or build with another grid")
        images = images * self._scale + self._shift
        if self.input_size != self.image_size:
            size = (self.input_size, self.input_size)
            images = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        return list(self.encoder(images))


def _geometry(config: EncoderConfig, grid: int) -> Geometry:
    native = config.grid_size
    if grid <= native:
        return PRESETS["release"]
    # The released detectors let padding take part as keys; a frozen encoder has never seen any.
    return replace(PRESETS["vitdet"], patch_size=None, mask_window_padding=grid % native != 0)


class PENeck(nn.Module):
    """The simple feature pyramid as the neck of sam2's `ImageEncoder`: strides 4, 8 and 16 from the trunk's map.

    `position_encoding` maps (B, C, h, w) to encodings of its positions, as sam2's `PositionEmbeddingSine` does; levels
    have `d_model` channels, and `backbone_channel_list` holds the channels of the trunk's map.
    """

    def __init__(self, position_encoding: nn.Module, *, d_model: int, backbone_channel_list: Sequence[int]) -> None:
        super().__init__()
        self.d_model = d_model
        self.backbone_channel_list = list(backbone_channel_list)
        (channels,) = self.backbone_channel_list
        self.pyramid = SimpleFeaturePyramid(channels, out_channels=d_model, strides=(4, 8, 16), in_stride=STRIDE)
        self.position_encoding = position_encoding

    def forward(self, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """[(B, C, g, g)] -> levels (B, d_model, 4g, 4g), (.., 2g, 2g), (.., g, g) and encodings of their positions."""
        levels = list(self.pyramid(maps))
        return levels, [self.position_encoding(level).to(level.dtype) for level in levels]


class ResizingMaskDownSampler(nn.Module):
    """sam2's `MaskDownSampler`, which divides by 16, after a resize to 16 `grid` pixels; for images of other sizes."""

    def __init__(self, downsampler: nn.Module, grid: int) -> None:
        super().__init__()
        self.encoder = downsampler.get_submodule("encoder")
        self.size = (STRIDE * grid, STRIDE * grid)

    def forward(self, masks: Tensor) -> Tensor:
        """(B, 1, S, S) -> (B, C, g, g)."""
        return self.encoder(F.interpolate(masks, self.size, mode="bilinear", align_corners=False, antialias=True))


def build_pe_sam2(  # noqa: PLR0913  (options of encoder and model, and the dimensions that tests make small)
    variant: str | EncoderConfig | Mapping[str, Any],
    grid: int,
    *,
    out_index: int = -1,
    frozen: bool = True,
    encoder_options: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    cls: str | type[SAM2Base] = "base",
    flags: Mapping[str, Any] | None = None,
    true_stride: bool = False,
    d_model: int = 256,
    mem_dim: int = 64,
    layers: int = 4,
    feedforward: int = 2048,
) -> SAM2Base:
    """Return SAM 2.1 on a Perception Encoder, in evaluation mode.

    Args:
        variant, out_index, frozen: as in `PETrunk`; the neck is always trained.
        grid: tokens per side: 32 is the pretraining grid of every PE-Spatial, 64 SAM 2.1's, 72 SAM 3's; any is allowed.
        encoder_options: `options` of `PETrunk`.
        checkpoint: weights of the encoder, as in `load_checkpoint`; None leaves them random. `load_sam2_weights` loads
            the other weights, `load_tracker_weights` all of them.
        cls: 'base' (`SAM2Base`), 'video' (`SAM2VideoPredictor`), or a subclass of `SAM2Base`.
        flags: options of `cls`; they override `RELEASE_FLAGS`.
        true_stride: work on images and masks of `grid * patch_size` pixels instead of `16 * grid`. Patch 14 then needs
            SAM 3's way to downsample masks (`ResizingMaskDownSampler`). The parameters stay the same.
        d_model: width, a multiple of 8.
        mem_dim: channels of a memory, a multiple of 4 that divides `d_model`.
        layers, feedforward: number of layers of the memory attention, and their hidden width.

    Raises ConfigError if sam2 is not installed and for sizes that do not fit together.
    """
    if isinstance(grid, bool) or not isinstance(grid, int) or grid < 1:
        raise ConfigError(f"grid is {grid!r}; it is the number of tokens per side, for example 32 or 64")
    if d_model % 8 or mem_dim % 4 or d_model % mem_dim:
        raise ConfigError(f"d_model {d_model} must be a multiple of 8, and mem_dim {mem_dim} one of 4 that divides it")
    try:
        from sam2.modeling.backbones.image_encoder import ImageEncoder
        from sam2.modeling.position_encoding import PositionEmbeddingSine
    except ModuleNotFoundError as error:
        raise ConfigError(f"the tracker needs sam2 ({error}); {_how_to_get_sam2(error)}") from error

    image_size = None if true_stride else STRIDE * grid
    options: dict[str, Any] = dict(out_index=out_index, frozen=frozen, options=encoder_options)
    trunk = PETrunk(variant, grid=grid, image_size=image_size, **options)
    stride = trunk.image_size // grid
    if checkpoint is not None:
        load_checkpoint(trunk.encoder, checkpoint)
    neck = PENeck(PositionEmbeddingSine(d_model), d_model=d_model, backbone_channel_list=trunk.channel_list)
    model: SAM2Base = _tracker_class(cls)(
        image_encoder=ImageEncoder(trunk, neck),
        memory_attention=_memory_attention(grid, d_model, mem_dim, layers, feedforward),
        memory_encoder=_memory_encoder(grid, d_model, mem_dim, resize_masks=stride != STRIDE),
        image_size=trunk.image_size,
        backbone_stride=stride,
        **{**RELEASE_FLAGS, **(flags or {})},
    )
    return model.eval()


def _how_to_get_sam2(error: ModuleNotFoundError) -> str:
    remedy, spec = "pip install --no-build-isolation sam2==1.1.0", find_spec("sam2")
    if spec is None or not (error.name or "").startswith("sam2."):
        return remedy
    places = ", ".join(spec.submodule_search_locations or ())
    return f"{remedy}, and rename the folder {places} if it hides the package"


def _memory_attention(grid: int, d_model: int, mem_dim: int, layers: int, feedforward: int) -> MemoryAttention:
    from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
    from sam2.modeling.sam.transformer import RoPEAttention

    rope = dict(embedding_dim=d_model, num_heads=1, dropout=0.1, feat_sizes=(grid, grid))
    layer = MemoryAttentionLayer(
        activation="relu",
        self_attention=RoPEAttention(**rope),
        cross_attention=RoPEAttention(**rope, rope_k_repeat=True, kv_in_dim=mem_dim),
        d_model=d_model,
        dim_feedforward=feedforward,
        dropout=0.1,
        pos_enc_at_attn=False,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
    )
    attention = MemoryAttention(d_model=d_model, pos_enc_at_input=True, layer=layer, num_layers=layers)
    # This initialization is ours: each position reads the same position of each memory, because rotary positions turn
    # constants in queries and keys into a preference for what is near. With random weights attention reads all
    # positions alike, and learns very late that masks move little between frames. Trained weights overwrite it.
    with torch.no_grad():
        for layer in attention.layers:
            for projection in (layer.cross_attn_image.q_proj, layer.cross_attn_image.k_proj):
                projection.bias.zero_()
                projection.bias[0::2] = 2.0  # real parts; a logit of about 4 / sqrt(d) for each rotary frequency
    return attention


def _memory_encoder(grid: int, d_model: int, mem_dim: int, *, resize_masks: bool) -> nn.Module:
    from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine

    downsampler: nn.Module = MaskDownSampler(embed_dim=d_model, kernel_size=3, stride=2, padding=1)
    return MemoryEncoder(
        out_dim=mem_dim,
        in_dim=d_model,
        mask_downsampler=ResizingMaskDownSampler(downsampler, grid) if resize_masks else downsampler,
        fuser=Fuser(CXBlock(d_model), num_layers=2),
        position_encoding=PositionEmbeddingSine(mem_dim),
    )


def _tracker_class(cls: str | type[SAM2Base]) -> type[SAM2Base]:
    from sam2.modeling.sam2_base import SAM2Base
    from sam2.sam2_video_predictor import SAM2VideoPredictor

    chosen = {"base": SAM2Base, "video": SAM2VideoPredictor}.get(cls) if isinstance(cls, str) else cls
    if not (isinstance(chosen, type) and issubclass(chosen, SAM2Base)):
        raise ConfigError(f"cls is {cls!r}; allowed are 'base', 'video' and subclasses of SAM2Base")
    return chosen


def load_sam2_weights(model: SAM2Base, source: str | Path) -> None:
    """Load a SAM 2.1 checkpoint into all of `model` but its image encoder, strictly.

    No tensor depends on the grid, so the files of facebook/sam2.1-hiera-* fit every grid of a model with the default
    dimensions. They were trained at grid 64: a smaller grid uses the first of the trained rotary positions, a larger
    one extrapolates.

    `source` is as in `load_checkpoint`; weights of its image encoder are ignored. Raises CheckpointError, listing both
    sides, if the rest does not map one to one.
    """
    path = locate(source)
    encoder = "image_encoder."
    state = {name: value for name, value in read_state_dict(path).items() if not name.startswith(encoder)}
    _load(model, state, path, [name for name in model.state_dict() if not name.startswith(encoder)])


def load_tracker_weights(model: SAM2Base, source: str | Path) -> None:
    """Load a complete trained tracker, including the encoder, strictly.

    `source` is as in `load_checkpoint`; it may hold a larger model that contains the tracker. Raises CheckpointError,
    listing both sides, if it does not map one to one.
    """
    path = locate(source)
    file = read_checkpoint(path)
    state = dict(file.state)
    mark = "maskmem_tpos_enc"
    prefix = next((name.removesuffix(mark) for name in state if name.endswith(mark)), "")
    add_base(model, file.rest.get("meta"), {"": state}, path, inside=prefix)
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    _load(model, state, path, list(model.state_dict()))


def _load(model: SAM2Base, state: Mapping[str, Tensor], path: Path, names: Sequence[str]) -> None:
    ours = model.state_dict()
    problems = mismatch(state, {name: ours[name] for name in names})
    if problems:
        raise CheckpointError(f"{path} does not hold the weights of this tracker. {problems}. Give a matching file")
    model.load_state_dict({**ours, **state})
    _log.info("%s: loaded %d tensors of a tracker", path, len(state))
