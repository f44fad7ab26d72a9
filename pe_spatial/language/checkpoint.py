"""Weights of a PE-Core: released, open_clip's and timm's names <-> ours, strictly and in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pe_spatial.atomic import atomic_write
from pe_spatial.encoder.checkpoint import RELEASED_TO_OURS, load_state, mismatch, rename
from pe_spatial.encoder.files import CheckpointError, locate, read_checkpoint, weights_in
from pe_spatial.encoder.variants import RELEASED_NAMES
from pe_spatial.errors import ConfigError

from .image_tower import ImageTower
from .model import PECore
from .variants import CORES, CoreConfig, core_key

CONFIG_ENTRY = "pe_core"
"""Entry of a file's metadata with the fields of its `CoreConfig`."""

_ENCODER = "visual.encoder."


def _both(*rows: tuple[str, str]) -> dict[str, str]:
    """Expand '*' to weight and bias."""
    return {theirs.replace("*", t): ours.replace("*", t) for theirs, ours in rows for t in ("weight", "bias")}


# `{}` is the number of the block
_TEXT = {
    "token_embedding.weight": "text.token_embed.weight",
    "positional_embedding": "text.pos_embed",
    "text_projection": "text.head.weight",
} | _both(
    ("transformer.resblocks.{}.ln_1.*", "text.blocks.{}.norm1.*"),
    ("transformer.resblocks.{}.attn.in_proj_*", "text.blocks.{}.attn.qkv.*"),
    ("transformer.resblocks.{}.attn.out_proj.*", "text.blocks.{}.attn.proj.*"),
    ("transformer.resblocks.{}.ln_2.*", "text.blocks.{}.norm2.*"),
    ("transformer.resblocks.{}.mlp.c_fc.*", "text.blocks.{}.mlp.fc1.*"),
    ("transformer.resblocks.{}.mlp.c_proj.*", "text.blocks.{}.mlp.fc2.*"),
    ("ln_final.*", "text.norm.*"),
)
_RELEASED_VISION = {theirs: f"encoder.{ours}" for theirs, ours in RELEASED_TO_OURS.items()} | {
    "attn_pool.probe": "attn_pool.latent",
    "proj": "head.weight",
} | _both(
    ("ln_post.*", "norm.*"),
    ("attn_pool.attn.out_proj.*", "attn_pool.proj.*"),
    ("attn_pool.layernorm.*", "attn_pool.norm.*"),
    ("attn_pool.mlp.c_fc.*", "attn_pool.mlp.fc1.*"),
    ("attn_pool.mlp.c_proj.*", "attn_pool.mlp.fc2.*"),
)  # fmt: skip
_TIMM_VISION = {ours: f"encoder.{ours}" for ours in RELEASED_TO_OURS.values()} | {
    name: name for name in _RELEASED_VISION.values() if not name.startswith("encoder.")
} | _both(("attn_pool.q.*", "attn_pool.q.*"), ("attn_pool.kv.*", "attn_pool.kv.*"))  # fmt: skip


class Layout(NamedTuple):
    """Their names -> ours, and a name that only this layout has."""

    names: dict[str, str]
    mark: str


def _prefixed(vision: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {prefix + theirs: f"visual.{ours}" for theirs, ours in vision.items()}


LAYOUTS: dict[str, Layout] = {
    "release": Layout(_prefixed(_RELEASED_VISION, "visual.") | _TEXT, "visual.conv1.weight"),
    "open_clip": Layout(
        _prefixed(_TIMM_VISION, "visual.trunk.") | {f"text.{theirs}": ours for theirs, ours in _TEXT.items()},
        "visual.trunk.patch_embed.proj.weight",
    ),
    "timm": Layout(_prefixed(_TIMM_VISION, ""), "patch_embed.proj.weight"),
}
"""Layout -> its table. timm's has the image tower alone. 'pe_spatial' is ours."""

# open_clip and timm write a bias of zeros, because their linear layer wants one
_BIAS = {"open_clip": "visual.trunk.head.bias", "timm": "head.bias"}
_TRANSPOSED = ("visual.head.weight", "text.head.weight")  # matrices in the release
_FUSED = "visual.attn_pool.attn.in_proj_"  # queries, keys and values in the release
_POOL = "visual.attn_pool."


def to_ours(state: Mapping[str, Tensor], path: str | Path = "state dict") -> tuple[dict[str, Tensor], str]:
    """Bring a state dict to our names; return it and its layout. Names of no layout stay, and fail in the strict load.

    Raises CheckpointError for a projection with a bias, which PE-Core does not have.
    """
    layout = next((name for name, layout in LAYOUTS.items() if layout.mark in state), "pe_spatial")
    if layout == "pe_spatial":
        return dict(state), layout
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        ours = rename(name, LAYOUTS[layout].names)
        if name == _BIAS.get(layout):
            if not value.is_meta and bool(value.any()):
                raise CheckpointError(f"{path} projects with a bias ({name}), and PE-Core has none; train it without")
        elif layout == "release" and name.startswith(_FUSED):
            kind, width = name.removeprefix(_FUSED), len(value) // 3
            out[f"{_POOL}q.{kind}"], out[f"{_POOL}kv.{kind}"] = value[:width], value[width:]
        else:
            out[ours] = _released_shape(ours, value) if layout == "release" else value
            if layout == "open_clip" and ours == "text.head.weight":
                out[ours] = value.T
    return out, layout


def _released_shape(ours: str, value: Tensor) -> Tensor:
    if ours in _TRANSPOSED:
        return value.T
    if ours in (f"{_ENCODER}cls_token", f"{_ENCODER}pos_embed"):
        return value.reshape(1, -1, value.shape[-1])
    return value


def from_ours(state: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Return a state dict of `PECore` in another layout: 'release', 'open_clip', or 'timm' (the image tower)."""
    theirs = {ours: name for name, ours in LAYOUTS[layout].names.items()}
    kept = {name: value for name, value in state.items() if layout != "timm" or name.startswith("visual.")}
    out: dict[str, Tensor] = {}
    for name, value in kept.items():
        new = rename(name, theirs)
        if layout == "release":
            out[new] = _as_released(name, value)
        else:
            out[new] = value.T.contiguous() if name == "text.head.weight" else value
    if layout == "release":
        for kind in ("weight", "bias"):
            parts = [out.pop(f"{_POOL}{part}.{kind}") for part in ("q", "kv")]
            out[_FUSED + kind] = torch.cat(parts)
    else:
        head = state["visual.head.weight"]
        out[_BIAS[layout]] = head.new_zeros(len(head))
    return out


def _as_released(name: str, value: Tensor) -> Tensor:
    if name in _TRANSPOSED:
        return value.T.contiguous()
    if name == f"{_ENCODER}cls_token":
        return value.flatten()
    return value[0] if name == f"{_ENCODER}pos_embed" else value


def load_core(
    source: str | Path, *, variant: str | CoreConfig | Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = torch.float32, **options: Any,
) -> PECore:  # fmt: skip
    """Build a PE-Core and load its weights; see `PECore.from_pretrained`."""
    path, by_name = _find(source)
    file = read_checkpoint(path)
    state, _ = to_ours(file.state, path)
    if variant is None:
        variant = by_name or _config_in(file.rest) or _variant_of(state, path)
    with torch.device("meta"):
        model = PECore(variant, **options)
    load_core_state(model, state, path=path, dtype=dtype)
    return model


def load_core_state(
    model: PECore | ImageTower,
    state: Mapping[str, Tensor],
    *,
    path: str | Path = "state dict",
    dtype: torch.dtype | None = None,
) -> None:
    """Load a state dict of any layout into `model`, strictly.

    Patch kernel and learned positions are resized as in `encoder.checkpoint.load_checkpoint`.

    Args:
        model: a PE-Core, or the image tower of one; what is on the meta device gets memory of its own.
        state: name -> tensor.
        path: where it came from, for errors.
        dtype: dtype of a model that was on the meta device; None keeps those of `state`.

    Raises CheckpointError, which lists the names of both sides, for weights that do not map one to one.
    """
    state, _ = to_ours(state, path)
    whole = isinstance(model, PECore)
    prefix = "" if whole else "visual."
    own = {prefix + name: value for name, value in model.state_dict().items()}
    if not whole:
        state = {name: value for name, value in state.items() if name.startswith(prefix)}
    encoder = {n.removeprefix(_ENCODER): value for n, value in state.items() if n.startswith(_ENCODER)}
    rest = {name: value for name, value in state.items() if not name.startswith(_ENCODER)}
    problems = mismatch(rest, {name: value for name, value in own.items() if not name.startswith(_ENCODER)})
    if problems:
        raise CheckpointError(f"{path} does not hold the weights of this PE-Core. {problems}")
    visual = model.visual if isinstance(model, PECore) else model
    load_state(visual.encoder, encoder, path=path, dtype=dtype)
    on_meta = visual.norm.weight.is_meta
    if on_meta:
        rest = {name: value.to(dtype or value.dtype, copy=True).contiguous() for name, value in rest.items()}
    model.load_state_dict({n.removeprefix(prefix): value for n, value in rest.items()}, strict=False, assign=on_meta)


def save_core(model: PECore, path: str | Path, *, layout: str = "pe_spatial") -> None:
    """Write the weights of a PE-Core as .safetensors, with its configuration among the metadata, so that
    `PECore.from_pretrained(path)` builds it again; as .pt with the names alone.

    Raises ConfigError for another suffix.
    """
    path = Path(path)
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    if layout != "pe_spatial":
        state = from_ours(state, layout)
    writers: dict[str, Callable[[Path], None]] = {
        ".safetensors": lambda to: _save_safetensors(state, to, model.config),
        ".pt": lambda to: torch.save(state, to),
    }
    if path.suffix not in writers:
        raise ConfigError(f"{path} should end in {' or '.join(writers)}")
    with atomic_write(path) as unfinished:
        writers[path.suffix](unfinished)


def _save_safetensors(state: dict[str, Tensor], path: Path, config: CoreConfig) -> None:
    from safetensors.torch import save_file

    separate = {name: value.clone() for name, value in state.items()}  # parts of one tensor cannot be written
    save_file(separate, path, {"format": "pt", CONFIG_ENTRY: json.dumps(config.fields())})


def _find(source: str | Path) -> tuple[Path, str | None]:
    """Return the file of a source, and the variant if the source is a name or the file is called by one."""
    text = str(source)
    path = Path(text)
    if path.is_dir():
        path = weights_in(path)
    elif "://" in text or path.is_file() or len(path.parts) > 1 or path.suffix in (".pt", ".pth", ".safetensors"):
        path = locate(text)
    else:
        key = core_key(text)
        return locate(f"hf://facebook/{RELEASED_NAMES[key]}"), key
    by_name = {RELEASED_NAMES[key]: key for key in CORES}
    return path, by_name.get(path.stem)


def _config_in(rest: Mapping[str, Any]) -> CoreConfig | None:
    fields = rest.get(CONFIG_ENTRY)
    return None if fields is None else CoreConfig(**json.loads(fields))


def _variant_of(state: Mapping[str, Tensor], path: Path) -> str:
    if not any(name.startswith("text.") for name in state):
        raise ConfigError(
            f"{path} has no text tower: it is an encoder of images alone, such as PE-Spatial, whose training leaves "
            f"PE-Core's text space. Give one of {', '.join(RELEASED_NAMES[key] for key in CORES)}"
        )
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    for key in CORES:
        with torch.device("meta"):
            own = PECore(key).state_dict()
        if {name: tuple(value.shape) for name, value in own.items()} == shapes:
            return key
    raise CheckpointError(f"{path} holds no released PE-Core; give its CoreConfig, or the fields of it, as variant")
