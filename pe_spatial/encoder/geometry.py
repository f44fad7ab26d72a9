"""Geometry: how an encoder that was pretrained on one grid of patches reads images of another size.

Learned positions, rotary positions, the patch size and attention windows are one decision: each published checkpoint
was trained with one combination of them, and each combination is a row of `PRESETS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor

from pe_spatial.errors import ConfigError, integer, one_of

from .resize import POS_EMBED_MODES, is_autocast, sizes_of
from .variants import VITDET_RECIPES, EncoderConfig, vitdet_recipe

ROPE_MODES = ("extrapolate", "interpolate")


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Positions, patches and attention windows of a Perception Encoder.

    Args:
        patch_size: side of a patch, in pixels; None keeps the pretrained one. `load_checkpoint` resizes the kernel.
        pos_embed_mode: how learned positions reach another grid: 'bilinear' (as released), 'bicubic',
            'bicubic_antialias' (as timm) or 'tile'.
        pos_grid: side of the table of learned positions, in tokens; None is the pretraining grid. `load_checkpoint`
            resizes the released table.
        rope_mode: rotary positions. 'extrapolate' counts on beyond the pretraining grid: token i has position i.
            'interpolate' compresses them: token i of n along an axis has position `i / n * rope_grid`. n is the side of
            the window in windowed blocks and of the grid in global ones: with rope_grid 32, token 48 of 64 is at 24.
            With a class token, i counts from 1.
        rope_grid: side of the grid to which 'interpolate' maps, in tokens: one number, or (windows, global); None is
            the pretraining grid.
        window_size: side of the attention windows, in tokens; 'pretraining' is the pretraining grid, and None means
            global attention in every block. A class token is copied into every window, and the copies are
            averaged before the next global block.
        global_attn_indexes: blocks that keep global attention (with `window_size`), negatives count from the end; None
            takes those of the recipe for the depth (`vitdet_recipe`).
        mask_window_padding: exclude the padding of windows that do not divide the grid from the attention. The released
            detectors let it take part as keys.
    """

    patch_size: int | None = None
    pos_embed_mode: str = "bilinear"
    pos_grid: int | None = None
    rope_mode: str = "extrapolate"
    rope_grid: int | Sequence[int] | None = None
    window_size: int | str | None = None
    global_attn_indexes: Sequence[int] | None = None
    mask_window_padding: bool = False

    def resolve(self, config: EncoderConfig) -> ResolvedGeometry:
        """Return the geometry in numbers for an encoder of `config`.

        Raises ValueError for a value that is not allowed, and for a field that has no effect beside the others.
        """
        window = config.grid_size if self.window_size == "pretraining" else self.window_size
        if window is None and (self.global_attn_indexes or self.mask_window_padding):
            raise ValueError("global_attn_indexes and mask_window_padding need window_size; set it too")
        if window is not None and (isinstance(window, str) or integer("window_size", window) < 1):
            raise ValueError(
                f"window_size is {window!r}; allowed are a number of tokens from 1, 'pretraining' and None (no windows)"
            )
        blocks = self.global_attn_indexes
        if window is not None and blocks is None:
            blocks = vitdet_recipe(config.depth).global_attn_indexes
        return ResolvedGeometry(
            patch_size=_at_least_one("patch_size", self.patch_size, config.patch_size, "pixels"),
            pos_embed_mode=one_of("pos_embed_mode", self.pos_embed_mode, POS_EMBED_MODES),
            pos_grid=_at_least_one("pos_grid", self.pos_grid, config.grid_size, "tokens"),
            rope_mode=one_of("rope_mode", self.rope_mode, ROPE_MODES),
            rope_grid=_rope_grid(self.rope_grid, self.rope_mode, config.grid_size),
            window_size=window,
            global_attn_indexes=() if window is None else block_indices("global_attn_indexes", blocks, config.depth),
            mask_window_padding=self.mask_window_padding,
        )


@dataclass(frozen=True, kw_only=True)
class ResolvedGeometry(Geometry):
    """A geometry in numbers: what `Geometry.resolve` returns. None means "no windows", or "no rotary interpolation"."""

    patch_size: int
    pos_grid: int
    rope_grid: tuple[int, int] | None
    window_size: int | None
    global_attn_indexes: tuple[int, ...]


PRESETS: dict[str, Geometry] = {
    # The released encoder: perception_models@3e352cc:core/vision_encoder/pe.py.
    "release": Geometry(),
    # timm 1.0. Equal to the release only at the pretraining size.
    "timm": Geometry(pos_embed_mode="bicubic_antialias", rope_mode="interpolate"),
    # The released Mask R-CNN detectors: perception_models@3e352cc:apps/detection/detectron2_pe.
    "vitdet": Geometry(patch_size=16, pos_embed_mode="tile", rope_mode="interpolate", window_size="pretraining"),
    # The released DETA: perception_models@3e352cc:apps/detection/DETA_pe/models/pev1.py, 'Gwin384'. Its rotary
    # positions are compressed into a range of 16, whatever the pretraining grid: the weights were trained with that.
    "deta": Geometry(
        patch_size=16, pos_embed_mode="tile", pos_grid=24, rope_mode="interpolate", rope_grid=16, window_size=24
    ),
}
"""Name -> geometry. Each row belongs to published weights."""

_FIELDS = tuple(field.name for field in fields(Geometry))


def get_geometry(geometry: str | Geometry | Mapping[str, Any], **overrides: Any) -> Geometry:
    """Return the geometry of a preset's name, a mapping of fields, or itself, with single fields overridden.

    Raises ValueError for an unknown preset, and TypeError for a field that `Geometry` does not have.
    """
    if isinstance(geometry, str):
        geometry = PRESETS[one_of("geometry", geometry, tuple(PRESETS))]
    elif isinstance(geometry, Mapping):
        overrides, geometry = {**geometry, **overrides}, Geometry()
    elif not isinstance(geometry, Geometry):
        raise ValueError(f"geometry is {geometry!r}; allowed are a Geometry, its fields and {', '.join(PRESETS)}")
    unknown = [name for name in overrides if name not in _FIELDS]
    if unknown:
        raise TypeError(f"unknown option {', '.join(unknown)}; the fields of a geometry are {', '.join(_FIELDS)}")
    return replace(geometry, **overrides)


def preset_name(geometry: ResolvedGeometry, config: EncoderConfig) -> str | None:
    """Return the preset that gives `geometry` for an encoder of `config`, whatever its patch size, or None."""
    for name, preset in PRESETS.items():
        resolvable = preset.window_size is None or preset.global_attn_indexes or config.depth in VITDET_RECIPES
        if resolvable and replace(preset, patch_size=geometry.patch_size).resolve(config) == geometry:
            return name
    return None


def block_indices(
    name: str, indices: int | Iterable[int] | None, depth: int, *, allow_none: bool = True
) -> tuple[int, ...]:
    """Return one index or several, counted from 0.

    Raises TypeError for what is not an integer, ConfigError if one is not a block of `depth`, or for none unless
    allowed.
    """
    several = isinstance(indices, Iterable) and not isinstance(indices, str)
    try:
        indices = tuple(integer(name, i) for i in (indices if several else (indices,)))  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(f"{name} is {indices!r}; give block numbers, such as 3 or (2, 5)") from None
    if not (indices or allow_none):
        raise ConfigError(f"{name} is empty; name at least one block, for instance (-1,) for the last")
    if any(not -depth <= i < depth for i in indices):
        raise ConfigError(f"{name} is {indices}, out of range for {depth} blocks; {-depth} to {depth - 1} are allowed")
    return tuple(i % depth for i in indices)


def check_frozen_stages(frozen_stages: int, depth: int) -> int:
    """Return `frozen_stages`; ConfigError unless it is -1 to `depth`."""
    if not -1 <= integer("frozen_stages", frozen_stages) <= depth:
        raise ConfigError(f"frozen_stages is {frozen_stages}; -1 (none) to {depth} (all blocks) are allowed")
    return frozen_stages


def check_images(images: Tensor, weights: Tensor) -> None:
    """Raise TypeError unless `images` is a tensor of floating-point numbers that the weights of an encoder can take."""
    if not isinstance(images, Tensor):
        raise TypeError(f"images are a {type(images).__name__}; pass a tensor (B, 3, H, W)")
    kinds = [str(tensor.dtype).removeprefix("torch.") for tensor in (images, weights)]
    if not images.is_floating_point():
        raise TypeError(
            f"images are {kinds[0]}; convert them to float and normalize them with config.mean and config.std"
        )
    if images.dtype != weights.dtype and not is_autocast(images.device.type):
        raise TypeError(
            f"images are {kinds[0]} and the weights {kinds[1]}; convert either with .to(torch.{kinds[1]}) or "
            f".to(torch.{kinds[0]}), or use torch.autocast"
        )


def patch_grid(images: Tensor, patch_size: int, in_chans: int = 3) -> tuple[int, int]:
    """Return (h, w), the grid of patches of `images` (B, in_chans, H, W); ValueError for other shapes and sizes."""
    shape = sizes_of(images)
    if len(shape) != 4 or shape[1] != in_chans:
        last = (
            "; if channels come last, use images.permute(0, 3, 1, 2)"
            if len(shape) == 4 and shape[3] == in_chans
            else ""
        )
        raise ValueError(f"images are {shape}; expected (B, {in_chans}, H, W){last}")
    (h, w), p = shape[2:], patch_size
    if h % p or w % p or not h or not w:
        raise ValueError(
            f"image size {h}x{w} is not a multiple of patch_size {p}; "
            f"pad or resize to {max(-(-h // p), 1) * p}x{max(-(-w // p), 1) * p}"
        )
    return h // p, w // p


def _rope_grid(rope_grid: int | Sequence[int] | None, rope_mode: str, default: int) -> tuple[int, int] | None:
    if rope_mode == "extrapolate":
        if rope_grid is not None:
            raise ValueError("rope_grid has no effect with rope_mode='extrapolate'; use rope_mode='interpolate'")
        return None
    if rope_grid is None:
        rope_grid = default
    several = rope_grid if isinstance(rope_grid, Iterable) and not isinstance(rope_grid, str) else (rope_grid,) * 2
    pair = [integer("rope_grid", side) for side in several]
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"rope_grid is {rope_grid}; give one positive number, or two: (windows, global)")
    return pair[0], pair[1]


def _at_least_one(name: str, value: int | None, default: int, unit: str) -> int:
    if value is not None and integer(name, value) < 1:
        raise ValueError(f"{name} is {value} {unit}; give at least 1, or None for the pretrained value")
    return default if value is None else value
