"""Released weights into `PerceptionEncoder`: names as a table, strict, one error that lists both sides."""

from __future__ import annotations

import logging
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .resize import resize_patch_kernel
from .variants import RELEASED_NAMES
from .vit import PerceptionEncoder

_log = logging.getLogger(__name__)

# released name -> ours (timm's); `{}` is the number of the block
RELEASED_TO_OURS: dict[str, str] = {
    "class_embedding": "cls_token",
    "positional_embedding": "pos_embed",
    "conv1.weight": "patch_embed.proj.weight",
    "ln_pre.weight": "norm_pre.weight",
    "ln_pre.bias": "norm_pre.bias",
    "transformer.resblocks.{}.ln_1.weight": "blocks.{}.norm1.weight",
    "transformer.resblocks.{}.ln_1.bias": "blocks.{}.norm1.bias",
    "transformer.resblocks.{}.attn.in_proj_weight": "blocks.{}.attn.qkv.weight",
    "transformer.resblocks.{}.attn.in_proj_bias": "blocks.{}.attn.qkv.bias",
    "transformer.resblocks.{}.attn.out_proj.weight": "blocks.{}.attn.proj.weight",
    "transformer.resblocks.{}.attn.out_proj.bias": "blocks.{}.attn.proj.bias",
    "transformer.resblocks.{}.ls_1.gamma": "blocks.{}.gamma_1",
    "transformer.resblocks.{}.ln_2.weight": "blocks.{}.norm2.weight",
    "transformer.resblocks.{}.ln_2.bias": "blocks.{}.norm2.bias",
    "transformer.resblocks.{}.mlp.c_fc.weight": "blocks.{}.mlp.fc1.weight",
    "transformer.resblocks.{}.mlp.c_fc.bias": "blocks.{}.mlp.fc1.bias",
    "transformer.resblocks.{}.mlp.c_proj.weight": "blocks.{}.mlp.fc2.weight",
    "transformer.resblocks.{}.mlp.c_proj.bias": "blocks.{}.mlp.fc2.bias",
    "transformer.resblocks.{}.ls_2.gamma": "blocks.{}.gamma_2",
}

# what a checkpoint may hold beyond the encoder, and why it is left out
LEFT_OUT: dict[str, str] = {
    r"proj": "projection into the text space",
    r"ln_post\.(weight|bias)": "norm before the attention pooling",
    r"attn_pool\..+": "attention pooling",
    r"(fc_)?norm\.(weight|bias)": "norm before the attention pooling (timm)",
    r"head\.(weight|bias)": "projection into the text space (timm)",
    r"(.+\.)?rope(_win|_glb)?(\.rope)?\.(freqs|freqs_cos|freqs_sin|cached_freqs)": "rotary constants, computed here",
}

_CONTAINERS = ("state_dict", "weights", "model")


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or mapped; its message says what came and what to do."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Args:
        path: the file that was read.
        layout: 'release' or 'timm' (which is ours).
        left_out: tensors of the file that the encoder has no use for, each with the reason.
        resized: tensors that were resized, each with 'shape -> shape'.
    """

    path: str | Path
    layout: str
    left_out: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)


def load_checkpoint(model: PerceptionEncoder, source: str | Path) -> LoadReport:
    """Load released (or timm's, or our own) weights into `model`, strictly.

    Args:
        model: the encoder. Blocks that it did not build are left out; a patch kernel of the released size is resized to
            `model.patch_size`.
        source: a local .pt, .pth or .safetensors file; 'hf://owner/repo', 'hf://owner/repo/file' or (as Meta writes it)
            'hf://owner/repo:file' for the hub, through its cache, so that it works offline afterwards; 'released', the
            published weights of the variant; or 'package://module/file', a file that an installed package ships.

    Raises CheckpointError if the file is missing, cannot be read without running code, or does not map one to one.
    """
    path = _locate(source, model)
    report = load_state(model, read_state_dict(path), path=path)
    _log.info("%s: %s layout, left out %s", path, report.layout, sorted(set(report.left_out.values())))
    return report


def load_state(model: PerceptionEncoder, state: Mapping[str, Tensor], *, path: str | Path = "state dict") -> LoadReport:
    """Load a state dict of the released or timm's layout into `model`, as `load_checkpoint` does with a file.

    Args:
        model: the encoder; one on the meta device takes the tensors over as they are.
        state: name -> tensor.
        path: where it came from, for errors and the report.
    """
    state, layout, left_out = to_timm_names(state)
    for name in list(state):
        block = re.match(r"blocks\.(\d+)\.", name)
        if block and model.depth <= int(block[1]) < model.config.depth:
            del state[name]
            left_out[name] = f"block after the last of out_indices ({model.depth - 1})"
    resized = _resize_kernel(state, model)
    _load_strictly(model, state, path)
    return LoadReport(path, layout, left_out, resized)


def to_timm_names(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str, dict[str, str]]:
    """Bring a state dict of the released or timm's layout to our names.

    Returns the state dict, the layout found ('release' or 'timm'), and what was left out with the reason.
    """
    state = {name.removeprefix("module."): value for name, value in state.items()}
    left_out: dict[str, str] = {}
    if any(name.startswith("visual.") for name in state):
        left_out = {name: "text tower" for name in state if not name.startswith("visual.")}
        state = {name.removeprefix("visual."): value for name, value in state.items() if name not in left_out}
    layout = "release" if "conv1.weight" in state else "timm"
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        reason = next((why for pattern, why in LEFT_OUT.items() if re.fullmatch(pattern, name)), None)
        if reason:
            left_out[name] = reason
        elif layout == "release":
            renamed = _rename(name)
            out[renamed] = value.reshape(1, -1, value.shape[-1]) if renamed in ("cls_token", "pos_embed") else value
        else:
            out[name] = value
    return out, layout, left_out


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .pt, .pth or .safetensors file; pickled code never runs.

    Raises CheckpointError for a file that is missing, truncated, holds anything but plain data, or no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; download it, or give the path of a .pt or .safetensors file")
    content: Any
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))  # torch's own words advise to read it nevertheless
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and plain data ({code[1]}), so it is not read: it could run code. "
                "Save its state dict alone and load that"
            ) from None
        raise CheckpointError(
            f"{path} is truncated or not written by torch.save; download it again, or save its state dict anew"
        ) from None
    except Exception as error:
        # safetensors and torch raise a dozen types for broken files: RuntimeError, EOFError, SafetensorError, ...
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or no checkpoint ({reason}); download it again") from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; give the encoder's weights")
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path} holds no tensors, only {sorted(map(str, content))}; give the encoder's weights")
    return tensors


def _rename(name: str) -> str:
    number = re.search(r"\.(\d+)\.", name)
    general = name.replace(f".{number[1]}.", ".{}.", 1) if number else name
    # An unknown name stays as it is, and is listed as unexpected by the strict load.
    return RELEASED_TO_OURS.get(general, name).replace("{}", number[1] if number else "")


def _resize_kernel(state: dict[str, Tensor], model: PerceptionEncoder) -> dict[str, str]:
    name = "patch_embed.proj.weight"
    kernel, size = state.get(name), model.patch_size
    if kernel is None or kernel.ndim != 4 or kernel.shape[-1] != model.config.patch_size or kernel.shape[-1] == size:
        return {}
    state[name] = resize_patch_kernel(kernel, size)
    return {name: f"{tuple(kernel.shape)} -> {tuple(state[name].shape)}"}


def _load_strictly(model: PerceptionEncoder, state: Mapping[str, Tensor], path: str | Path) -> None:
    ours = model.state_dict()
    missing = sorted(ours.keys() - state.keys())
    unexpected = sorted(state.keys() - ours.keys())
    shapes = [
        f"{name} {tuple(state[name].shape)} in the file, {tuple(ours[name].shape)} in the model"
        for name in sorted(ours.keys() & state.keys())
        if state[name].shape != ours[name].shape
    ]
    problems = [
        f"{title}: {', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''}"
        for title, names in (
            ("missing in the file", missing),
            ("unknown to the model", unexpected),
            ("other shapes", shapes),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{path} does not hold the weights of this encoder ({model.config}). " + ". ".join(problems) + ". "
            "Build the variant that the file belongs to"
        )
    assign = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(dict(state), strict=True, assign=assign)


def _locate(source: str | Path, model: PerceptionEncoder) -> Path:
    text = str(source)
    if text == "released":
        if model.variant is None:
            raise CheckpointError(
                f"no weights were released for {model.config}; give a file, or start from random weights on purpose"
            )
        text = f"hf://facebook/{RELEASED_NAMES[model.variant]}"
    if text.startswith("package://"):
        module, _, filename = text.removeprefix("package://").partition("/")
        try:
            return Path(str(resources.files(module) / filename))
        except ModuleNotFoundError:
            raise CheckpointError(f"{text!r} names no installed package; write package://module/file") from None
    if not text.startswith("hf://"):
        return Path(text)
    owner, repo, filename = [*text.removeprefix("hf://").replace(":", "/", 1).split("/", 2), "", ""][:3]
    if not owner or not repo:
        raise CheckpointError(f"{text!r} is no address on the hub; write hf://owner/repo or hf://owner/repo/file")
    filename = filename or (f"{repo}.pt" if owner == "facebook" else "model.safetensors")
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:  # first, because without a network the client asks for it again and again
            return Path(hf_hub_download(f"{owner}/{repo}", filename, local_files_only=True))
        except LocalEntryNotFoundError:
            return Path(hf_hub_download(f"{owner}/{repo}", filename))
    except Exception as error:
        # The hub client raises its own errors, the HTTP library's and OSError; all of them mean: not at hand.
        raise CheckpointError(
            f"{filename} of {owner}/{repo} is neither in the hub's cache nor to be downloaded "
            f"({type(error).__name__}); download https://huggingface.co/{owner}/{repo}/resolve/main/{filename} "
            "where there is a network, and give the path of the file as the checkpoint"
        ) from error
