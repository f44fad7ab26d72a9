"""Load released weights into `PerceptionEncoder`, strictly; one error lists the names of both sides."""

import ctypes
import hashlib
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import SUFFIXES, CheckpointError, join_names, locate, read_state_dict, split_entry, weights_in
from .geometry import Geometry, get_geometry, preset_name
from .lora import is_adapter
from .resize import resize_patch_kernel, resize_pos_embed
from .variants import DEMO_VARIANTS, RELEASED_NAMES, VARIANTS, EncoderConfig, variant_key
from .vit import PerceptionEncoder

_log = logging.getLogger(__name__)

# released name -> ours (timm's); `{}` is the number of the block, `*` is weight and bias
_NAMES = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.*": "norm_pre.*",
    "transformer.resblocks.{}.ln_1.*": "blocks.{}.norm1.*",
    "transformer.resblocks.{}.attn.in_proj_*": "blocks.{}.attn.qkv.*",
    "transformer.resblocks.{}.attn.out_proj.*": "blocks.{}.attn.proj.*",
    "transformer.resblocks.{}.ls_1.gamma": "blocks.{}.gamma_1",
    "transformer.resblocks.{}.ln_2.*": "blocks.{}.norm2.*",
    "transformer.resblocks.{}.mlp.c_fc.*": "blocks.{}.mlp.fc1.*",
    "transformer.resblocks.{}.mlp.c_proj.*": "blocks.{}.mlp.fc2.*",
    "transformer.resblocks.{}.ls_2.gamma": "blocks.{}.gamma_2",
}
RELEASED_TO_OURS: dict[str, str] = {
    theirs.replace("*", tensor): ours.replace("*", tensor)
    for theirs, ours in _NAMES.items()
    for tensor in ("weight", "bias")
}

_KERNEL, _POSITIONS = "patch_embed.proj.weight", "pos_embed"

# what a checkpoint may contain beside the encoder, and why it is omitted
OMITTED: dict[str, str] = {
    r"proj": "projection into the text space",
    r"ln_post\.(weight|bias)": "norm before the attention pooling",
    r"attn_pool\..+": "attention pooling",
    r"(fc_)?norm\.(weight|bias)": "norm before the attention pooling (timm)",
    r"head\.(weight|bias)": "projection into the text space (timm)",
    r"fpn1\.0\.(weight|bias)": "pyramid of a released DETA",
    r"(.+\.)?rope(_win|_glb)?(\.rope)?\.(freqs|freqs_cos|freqs_sin|cached_freqs)": "rotary constants, computed here",
}


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Args:
        path: the file that was read.
        layout: 'release' or 'timm' (which is ours).
        omitted: tensors of the file that the encoder does not need, each with the reason.
        resized: tensors that were resized, each with 'shape -> shape'.
    """

    path: str | Path
    layout: str
    omitted: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)


def load_checkpoint(model: PerceptionEncoder, source: str | Path) -> LoadReport:
    """Load released (or timm's, or our own) weights into `model`, strictly.

    Args:
        model: the encoder. Blocks that it did not build are omitted; a patch kernel of the released size is resized to
            `model.patch_size`, learned positions of the released grid to `model.geometry.pos_grid`.
        source: 'released' for the published weights of the variant (a demonstration's are in this package), or what
            `files.locate` takes: a local .pt, .pth or .safetensors file, 'hf://owner/repo', ...

    Raises CheckpointError if the file is missing, cannot be read without running code, or does not map one to one.
    """
    path = locate(released_source(model.variant, model.config) if str(source) == "released" else source)
    report = load_state(model, read_state_dict(path), path=path)
    if model.lora is not None:
        model.base_source, model.base_hash = str(source), base_hash(model)
    return report


def from_pretrained(
    source: str | Path,
    *,
    variant: str | EncoderConfig | Mapping[str, Any] | None = None,
    geometry: str | Geometry | Mapping[str, Any] = "release",
    dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> PerceptionEncoder:
    """Build an encoder, load its weights, and return it in evaluation mode.

    Args:
        source: a released name ('PE-Spatial-B16-512' or 'pe_spatial_b16_512': from the hub, through its cache); a local
            folder that contains its weights; or what `load_checkpoint` takes. A detector's file gives its encoder.
        variant: as in `PerceptionEncoder`; None takes it from the name or else from the shapes in the file.
        geometry: as in `PerceptionEncoder`. Where it sets no patch size or grid of learned positions, those of the file
            are kept.
        dtype: dtype of the weights; None keeps that of the file. They are copied, so that the file may be overwritten.
        options: the other options of `PerceptionEncoder`, such as `out_indices`.

    Raises CheckpointError as `load_checkpoint` does, and for weights of no released variant where `variant` is None.
    """
    path, _ = split_entry(source)
    if path.is_dir():
        key = variant_key(variant) if isinstance(variant, str) else ""
        path = weights_in(path, RELEASED_NAMES.get(key, key))
    elif "://" in str(source) or path.is_file() or len(path.parts) > 1 or re.fullmatch(r"\.\w{2,11}", path.suffix):
        path = locate(source)
    else:
        try:
            key = variant_key(str(source))
        except ValueError as error:
            raise CheckpointError(f"{error}; or give a folder, or a file that ends in {', '.join(SUFFIXES)}") from None
        path, variant = locate(released_source(key, str(source))), variant or key
    state = to_timm_names(read_state_dict(path))[0]
    pos_grid = None
    if variant is None:
        variant, pos_grid = _variant_of(state, path)
    kernel = state.get(_KERNEL)
    patch_size = None if kernel is None else kernel.shape[-1]  # the detectors' is 16, not 14
    overrides = {field.name: options.pop(field.name) for field in fields(Geometry) if field.name in options}
    geometry = get_geometry(geometry, **overrides)
    geometry = replace(geometry, patch_size=geometry.patch_size or patch_size, pos_grid=geometry.pos_grid or pos_grid)
    with torch.device("meta"):
        model = PerceptionEncoder(variant, geometry=geometry, **options)
    load_state(model, state, path=path, dtype=dtype)
    return model.eval()


def released_source(variant: str | None, config: object) -> str:
    """Return the address of a variant's weights; CheckpointError, which names `config`, if there are none."""
    if variant is None:
        raise CheckpointError(
            f"no weights were released for {config}; give a file, or start from random weights on purpose"
        )
    if variant in DEMO_VARIANTS:
        return f"package://pe_spatial/synthetic/{variant}.safetensors"
    return f"hf://facebook/{RELEASED_NAMES[variant]}"


def _variant_of(state: Mapping[str, Tensor], path: Path) -> tuple[str, int | None]:
    """Return the variant, and the grid of learned positions where it differs from the variant's."""
    by_name = {name: variant for variant, name in RELEASED_NAMES.items()} | {name: name for name in DEMO_VARIANTS}
    if path.stem in by_name:
        return by_name[path.stem], None
    shapes = {name: value.shape for name, value in state.items() if name != _KERNEL}
    positions = shapes.get(_POSITIONS)
    other_grid: dict[EncoderConfig, tuple[str, int]] = {}
    with torch.device("meta"):
        for variant, config in VARIANTS.items():  # those of the same shapes have the same configuration
            expected = {name: value.shape for name, value in PerceptionEncoder(variant).state_dict().items()}
            del expected[_KERNEL]
            if expected == shapes:
                return variant, None
            if positions is not None and {**expected, _POSITIONS: positions} == shapes:
                other_grid.setdefault(config, (variant, math.isqrt(positions[1] - config.class_token)))
    if len(other_grid) == 1:  # a Core and a Spatial encoder may differ in the grid alone, and then it is ambiguous
        return other_grid.popitem()[1]
    raise CheckpointError(f"{path} holds no released variant; give variant={_implied_config(state)}")


def _implied_config(state: Mapping[str, Tensor]) -> str:
    """Write down what the shapes tell of an `EncoderConfig`, for an error."""
    hidden, positions, kernel = (state.get(name) for name in ("blocks.0.mlp.fc1.bias", _POSITIONS, _KERNEL))
    if hidden is None or positions is None or kernel is None or kernel.ndim != 4:
        return "dict(img_size=..., patch_size=..., ...)"
    token, width, patch = "cls_token" in state, kernel.shape[0], kernel.shape[-1]
    fields = dict(
        img_size=math.isqrt(positions.numel() // width - token) * patch,
        patch_size=patch,
        embed_dim=width,
        depth=len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        mlp_ratio=hidden.numel() / width,
        in_chans=kernel.shape[1],
        class_token=token,
        init_values=0.1 if "blocks.0.gamma_1" in state else None,
    )
    return (
        f"dict({', '.join(f'{name}={value}' for name, value in fields.items())}), which its shapes imply, with "
        f"num_heads, which they do not tell ({max(width // 64, 1)} if a head has 64 channels)"
    )


def load_state(
    model: PerceptionEncoder,
    state: Mapping[str, Tensor],
    *,
    path: str | Path = "state dict",
    dtype: torch.dtype | None = None,
) -> LoadReport:
    """Load a state dict of the released or timm's layout into `model`, as `load_checkpoint` does with a file.

    Args:
        model: the encoder; one on the meta device gets memory of its own.
        state: name -> tensor.
        path: where it came from, for errors and the report.
        dtype: dtype of a model that was on the meta device; None keeps those of `state`.
    """
    state, layout, omitted = to_timm_names(state)
    for name in list(state):
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and model.depth <= int(block[1]) < model.config.depth:
            del state[name]
            omitted[name] = f"block after the last of out_indices ({model.depth - 1})"
    resized = _resize_kernel(state, model) | _resize_positions(state, model)
    problems = mismatch(state, {name: value for name, value in model.state_dict().items() if not is_adapter(name)})
    if problems:
        raise CheckpointError(
            f"{path} does not hold the weights of this encoder ({model.config}). {problems}. "
            "Build the variant that the file belongs to"
        )
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if on_meta:  # one tensor at a time: the pages of a mapped file are cache, which the system takes back when needed
        state = {name: value.to(dtype or value.dtype, copy=True) for name, value in state.items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.load_state_dict(state, assign=on_meta)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)  # torch 2.2 forgets what was frozen on the meta device
    _log.info(
        "%s: %s layout, geometry %s, omitted %s",
        path, layout, preset_name(model.geometry, model.config) or model.geometry, sorted(set(omitted.values())),
    )  # fmt: skip
    return LoadReport(path, layout, omitted, resized)


def base_hash(encoder: PerceptionEncoder) -> str:
    """Return the SHA-256 of the parameters in the encoder's `base_names`; with sharded ones, all ranks must call this.

    Positions and the patch kernel do not count: resizing them when they are loaded may change their last bits.
    """
    digest, parameters = hashlib.sha256(), dict(encoder.named_parameters())
    for name in sorted(set(encoder.base_names) - {_KERNEL, _POSITIONS}):
        value: Any = parameters[name].detach()
        value = (value.full_tensor() if hasattr(value, "full_tensor") else value).cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
    return digest.hexdigest()


def to_timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """Bring the encoder in a state dict of the released or timm's layout to our names.

    The encoder may be a part of the model, such as a detector's backbone: the rest is omitted. Returns the state dict,
    the layout of the file ('release' or 'timm'), and what was omitted with the reason.
    """
    if any(map(is_adapter, state)):
        raise CheckpointError("this file holds LoRA adapters; merge them first: pe-spatial merge_lora FILE MERGED")
    prefix = encoder_prefix(state)
    reason = "text tower" if prefix.endswith("visual.") else "not the encoder"
    omitted = {name: reason for name in state if not name.startswith(prefix)}
    state = {name.removeprefix(prefix): value for name, value in state.items() if name not in omitted}
    layout = "release" if "conv1.weight" in state else "timm"
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        why = next((why for pattern, why in OMITTED.items() if re.fullmatch(pattern, name)), None)
        if why:
            omitted[name] = why
        elif layout == "release":
            renamed = rename(name, RELEASED_TO_OURS)  # unknown names fail in the strict load
            out[renamed] = value.reshape(1, -1, value.shape[-1]) if renamed in ("cls_token", "pos_embed") else value
        else:
            out[name] = value
    return out, layout, omitted


def encoder_prefix(state: Mapping[str, Tensor]) -> str:
    """Return how the names of the only encoder in `state` begin; CheckpointError for several, '' for none."""
    marks = {"conv1.weight": "transformer.resblocks.0.ln_1.weight", "patch_embed.proj.weight": "blocks.0.norm1.weight"}
    prefixes = [
        name.removesuffix(stem)
        for stem, block in marks.items()
        for name in state
        if name.endswith(stem) and name.removesuffix(stem) + block in state
    ]
    if len(prefixes) > 1:
        raise CheckpointError(f"this file has several encoders, at {', '.join(prefixes)}; save one of them")
    return prefixes[0] if prefixes else ""


def rename(name: str, table: Mapping[str, str]) -> str:
    """Look up `name` in `table`, where `{}` stands for the number of the block; unknown names stay as they are."""
    number = re.search(r"blocks\.(\d+)\.", name)
    general = name.replace(number[0], "blocks.{}.", 1) if number else name
    return table.get(general, name).replace("{}", number[1] if number else "")


def _resize_kernel(state: dict[str, Tensor], model: PerceptionEncoder) -> dict[str, str]:
    kernel, size = state.get(_KERNEL), model.patch_size
    if kernel is None or kernel.ndim != 4 or kernel.shape[-1] != model.config.patch_size or kernel.shape[-1] == size:
        return {}
    state[_KERNEL] = resize_patch_kernel(kernel, size)
    return {_KERNEL: f"{tuple(kernel.shape)} -> {tuple(state[_KERNEL].shape)}"}


def _resize_positions(state: dict[str, Tensor], model: PerceptionEncoder) -> dict[str, str]:
    """Bring the released table to `pos_grid`, as perception_models@3e352cc:apps/detection/tools/convert_d2.py."""
    table, side, grid = state.get(_POSITIONS), model.config.grid_size, model.geometry.pos_grid
    prefix = model.num_prefix_tokens
    if table is None or side == grid or table.ndim != 3 or table.shape[1] != prefix + side**2:
        return {}
    patches = table[:, prefix:].float().unflatten(1, (side, side))
    patches = resize_pos_embed(patches, (grid, grid), mode="bicubic").flatten(1, 2).to(table.dtype)
    state[_POSITIONS] = torch.cat((table[:, :prefix], patches), dim=1)
    return {_POSITIONS: f"{tuple(table.shape)} -> {tuple(state[_POSITIONS].shape)}"}


def mismatch(state: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> str:
    """Describe how the tensors of a file differ from a model's: names on both sides, shapes; '' if they do not."""
    problems = {
        "missing in the file": sorted(ours.keys() - state.keys()),
        "unknown to the model": sorted(state.keys() - ours.keys()),
        "other shapes": [
            f"{name} {tuple(state[name].shape)} in the file, {tuple(ours[name].shape)} in the model"
            for name in sorted(ours.keys() & state.keys())
            if state[name].shape != ours[name].shape
        ],
    }
    return ". ".join(f"{title}: {join_names(names)}" for title, names in problems.items() if names)
