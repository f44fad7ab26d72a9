"""Find checkpoint files (local, hub, package) and read them without running the code that a pickle may contain."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

from pe_spatial.errors import listed

from .unpickling import explain, unpickle

SUFFIXES = (".pt", ".pth", ".safetensors")
"""Of files that are written here; any file is read."""

_CONTAINERS = (
    "state_dict", "model", "weights", "model_state_dict", "model_state", "network", "net", "module", "params",
    "encoder", "backbone",
)  # fmt: skip
# averaged weights, or one of two networks: taken where they are alone, named where they stand beside others
_CHOICES = (
    "ema", "model_ema", "ema_model", "state_dict_ema", "ema_state_dict", "ema_state", "params_ema", "teacher",
    "student", "target_encoder",
)  # fmt: skip
# names that torch.compile, FSDP and recomputation put into the name of every module that they wrap
_WRAPPED = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_NESTED = 5  # entries in one another; a pickle may contain itself
_INDEX = ".index.json"
# files of weights in a folder: not hidden, no state of a trainer, no part of a file with an index
_WEIGHTS = re.compile(
    r"(?i)(?!\.|optimizer|scheduler|scaler|training_args|random_states|rng_state|.+-\d{5}-of-\d{5}\.)"
    r".+\.(pt|pth|ckpt|(safetensors|bin)(\.index\.json)?)"
)

_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or mapped; its message says what came and what to do."""


def join_names(names: Iterable[str]) -> str:
    """List the first eight of `names` for an error, and how many more there are."""
    return listed(list(names), 8) or "nothing"


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a checkpoint at `path`.

    Args:
        path: the file.
        state: name -> tensor, mapped from the file where its format allows it: copy the tensors before anything is
            written to the file. What wrappers add to names ('module.', '_orig_mod.') is removed.
        rest: the file's other entries ('optimizer', 'iteration', 'meta', ...), or the metadata of a safetensors file.
    """

    path: Path
    state: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


def read_checkpoint(path: str | Path, *, in_parts: bool = False) -> CheckpointFile:
    """Read a file that torch or safetensors wrote, or the .index.json of several; pickled code never runs.

    Args:
        path: the file; 'FILE#ENTRY' takes the weights from that entry of it, for instance 'w.pth#model_ema'.
        in_parts: accept a file of ShardedRunner whose weights lie in a folder beside it; they are meta tensors.

    Raises CheckpointError for a file that is missing or truncated, contains objects that could run code, or no weights.
    """
    path, entry = split_entry(path)
    content, rest = _read(path)
    for _ in range(_NESTED):
        inner = _choose(path, content, entry) if isinstance(content, Mapping) else None
        if inner is None:
            break
        entry = None
        rest |= {str(key): value for key, value in content.items() if key != inner}
        content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; give the encoder's weights")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        found = ", ".join(sorted(map(str, content))) or "nothing"
        holders = [f"{path}#{key}" for key in content if _holds_weights(content[key])]
        choice = f", for instance {join_names(holders)}" if holders else ""
        raise CheckpointError(f"{path} holds no weights, only {found}; give a file with the weights{choice}")
    rest |= {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    if "parts" in rest and not in_parts:
        raise CheckpointError(
            f"{path} has its weights in parts. Merge them: pe-spatial consolidate_checkpoint {path} FILE"
        )
    return CheckpointFile(path, _without_wrappers(state), rest)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read only the weights of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path).state


def split_entry(path: str | Path) -> tuple[Path, str | None]:
    """Split 'FILE#ENTRY' into the file and the entry; a file whose own name has a '#' is itself."""
    file, mark, entry = str(path).rpartition("#")
    return (Path(file), entry) if mark and file and not Path(path).exists() else (Path(path), None)


def unwrap(state: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """Return `state` without the prefix ('model.', 'module.' and both) that hides most of the `expected` names."""
    names = list(expected)
    prefixes = {""}
    for name in state:
        parts = name.split(".")
        depth = next(i for i, part in enumerate([*parts, ""]) if part not in ("model", "module"))
        prefixes |= {".".join(parts[:i]) + "." for i in range(1, depth + 1)}
    prefix = max(sorted(prefixes), key=lambda prefix: sum(prefix + name in state for name in names))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _choose(path: Path, content: Mapping[Any, Any], entry: str | None) -> str | None:
    """Return the entry of a checkpoint that holds the weights; None if they are not in an entry."""
    if entry is not None:
        if not isinstance(content.get(entry), Mapping):
            raise CheckpointError(f"{path} has no entry {entry!r} with weights; it has {join_names(map(str, content))}")
        return entry
    plain = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
    others = [key for key in _CHOICES if _holds_weights(content.get(key))]
    if "meta" in content:  # mmengine's EMAHook swaps the two when it saves: its state_dict is the average
        others = [key for key in others if key != "ema_state_dict"]
    if plain is None and len(others) > 1:
        raise CheckpointError(
            f"{path} holds several sets of weights; give one of {', '.join(f'{path}#{o}' for o in others)}"
        )
    if plain is not None and others:
        choice = ", ".join(f"{path}#{other}" for other in others)
        _log.warning(
            "%s: loads the entry %s; it also holds %s, for which give %s", path, plain, ", ".join(others), choice
        )
    return plain or (others[0] if others else None)


def _holds_weights(value: Any, depth: int = 3) -> bool:
    """Return whether `value` holds tensors by name, itself or in an entry of a known name."""
    if not isinstance(value, Mapping) or not depth:
        return False
    if any(isinstance(name, str) and isinstance(x, Tensor) for name, x in value.items()):
        return True
    return any(_holds_weights(value.get(key), depth - 1) for key in (*_CONTAINERS, *_CHOICES))


def _without_wrappers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove what wrappers add to names: torch.compile and FSDP anywhere, data parallel training at the start."""
    names = {name: _WRAPPED.sub("", name) for name in state}
    while all(name.startswith("module.") for name in names.values()):
        names = {old: name.removeprefix("module.") for old, name in names.items()}
    return {names[old]: value for old, value in state.items()} if len(set(names.values())) == len(names) else state


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; download it, or give the path of a .pt or .safetensors file")
    if path.name.endswith(_INDEX):
        return _read_shards(path), {}
    try:
        with open(path, "rb") as file:
            head = file.read(9)
        if head == b"version h":
            raise CheckpointError(f"{path} is a pointer of Git LFS, not the file; run `git lfs pull`, or download it")
        pickled = head[:2] == b"PK" or head[:1] == b"\x80"
        if head[8:] == b"{" or (path.suffix.lower() == ".safetensors" and not pickled):
            from safetensors import safe_open

            with safe_open(path, framework="pt") as tensors:
                facts: dict[str, Any] = dict(tensors.metadata() or {})
                if "meta" in facts:  # as `write_checkpoint` writes it
                    facts["meta"] = json.loads(facts["meta"])
                return {name: tensors.get_tensor(name) for name in tensors.keys()}, facts
        return unpickle(path, mmap=True), {}
    except CheckpointError:
        raise
    except Exception as error:  # of safetensors, pickle, zipfile and torch
        raise CheckpointError(explain(path, error)) from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Read the weights that a 'model.safetensors.index.json' spreads over several files beside it."""
    try:
        places: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        files = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, OSError):
        raise CheckpointError(
            f"{index} is not an index of weights: it has no 'weight_map' of names and files"
        ) from None
    if any(Path(name).name != name for name in files):
        raise CheckpointError(
            f"{index} names files outside of its folder ({join_names(files)}); put all of them beside it"
        )
    missing = [name for name in files if not (index.parent / name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index} names {join_names(missing)}, not beside it; download all of its {len(files)} files"
        )
    shards = {name: _read(index.parent / name)[0] for name in files}
    lost = [name for name, file in places.items() if not isinstance(shards[file], Mapping) or name not in shards[file]]
    if lost:
        raise CheckpointError(
            f"{index} names weights that its files do not hold ({join_names(lost)}); download them again"
        )
    return {name: shards[file][name] for name, file in places.items()}


def locate(source: str | Path) -> Path:
    """Return the local path of a checkpoint.

    Args:
        source: a file, or a folder with one file of weights; 'hf://owner/repo', 'hf://owner/repo/file' or (as Meta
            writes it) 'hf://owner/repo:file' for the hub, through its cache, so that it works offline afterwards;
            'https://...', through torch.hub's cache; or 'package://module/file', a file that an installed package
            ships. '#ENTRY' behind any of them is kept, see `read_checkpoint`.

    Raises CheckpointError for a file that is not here and cannot be downloaded: what to download, and where to put it.
    """
    text, _, entry = str(source).partition("#") if "://" in str(source) else (str(source), "", "")
    if entry:
        return Path(f"{locate(text)}#{entry}")
    if text.startswith("package://"):
        module, _, filename = text.removeprefix("package://").partition("/")
        try:
            return Path(str(resources.files(module) / filename))
        except ModuleNotFoundError:
            raise CheckpointError(f"{module} in {text!r} is not installed; write package://module/file") from None
    if text.startswith(("https://", "http://")):
        return _download(text)
    if not text.startswith("hf://"):
        return weights_in(Path(text)) if os.path.isdir(text) else Path(text)
    owner, repo, filename = [*text.removeprefix("hf://").replace(":", "/", 1).split("/", 2), "", ""][:3]
    if not owner or not repo:
        raise CheckpointError(f"{text!r} is not an address on the hub; write hf://owner/repo or hf://owner/repo/file")
    filename = filename or (f"{repo}.pt" if owner == "facebook" else "model.safetensors")
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        try:  # first, because without a network the client asks for it again and again
            return Path(hf_hub_download(f"{owner}/{repo}", filename, local_files_only=True))
        except LocalEntryNotFoundError:
            get_hf_file_metadata(hf_hub_url(f"{owner}/{repo}", filename))  # asks once; the download asks six times
            return Path(hf_hub_download(f"{owner}/{repo}", filename))
    except Exception as error:
        # the hub client raises its own errors, the HTTP library's and OSError; all of them mean: no file
        raise CheckpointError(
            f"{filename} of {owner}/{repo} is not in the local cache, and the download failed "
            f"({type(error).__name__}; no network?); download "
            f"https://huggingface.co/{owner}/{repo}/resolve/main/{filename} on another machine, and give the path of "
            "the file as the checkpoint"
        ) from error


def weights_in(folder: Path, stem: str | None = None) -> Path:
    """Return the file of weights in a folder: the index of several, the one called `stem`, or the only one.

    What trainers write beside them (optimizers, random states, arguments) does not count. A folder of Hugging Face may
    have the weights twice, and then safetensors come first. Raises CheckpointError for none and for several.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and _WEIGHTS.fullmatch(path.name))
    for known in (
        rf"model\.safetensors{_INDEX}",
        r"model\.safetensors",
        rf"pytorch_model\.bin{_INDEX}",
        r"pytorch_model\.bin",
    ):
        files = [path for path in files if re.fullmatch(known, path.name)] or files
    files = [path for path in files if path.stem == stem] or files
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(f"{folder} should hold one file of weights ({', '.join(SUFFIXES)}) but holds {names}")
    return files[0]


def _download(url: str) -> Path:
    name = Path(urlparse(url).path)  # two addresses may end in one name
    key = hashlib.sha256(url.encode()).hexdigest()[:12]
    path = Path(torch.hub.get_dir(), "checkpoints", f"{name.stem}-{key}{name.suffix}")
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path))  # appears under its name when it is complete
        except OSError as error:  # URLError and HTTPError are
            raise CheckpointError(
                f"{url} cannot be downloaded ({error}). Download it on another machine, and put it at {path} or "
                "give its path"
            ) from error
    return path
