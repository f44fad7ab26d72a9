"""Find checkpoint files (local, hub, package) and read them without running the code that a pickle may contain."""

import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor

SUFFIXES = (".pt", ".pth", ".safetensors")
_CONTAINERS = ("state_dict", "weights", "model")


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, read or mapped; its message says what came and what to do."""


def join_names(names: Iterable[str]) -> str:
    """List the first eight of `names` for an error, and how many more there are."""
    names = list(names)
    return (", ".join(names[:8]) or "nothing") + (f" and {len(names) - 8} more" if len(names) > 8 else "")


@dataclass(frozen=True)
class CheckpointFile:
    """The content of a checkpoint at `path`.

    Args:
        path: the file.
        state: name -> tensor, mapped from the file rather than read where its format allows it.
        rest: the file's other entries ('optimizer', 'iteration', 'meta', ...), or the metadata of a safetensors file.
    """

    path: Path
    state: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)


class _Inert:
    """Replaces an object that trainers save beside weights: takes any state, does nothing, imports nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


# torch finds an allowed object by its full name, so a class of that name stands for it
_INERT = [
    type(name.rpartition(".")[2], (_Inert,), {"__module__": name.rpartition(".")[0]})
    for name in (
        "argparse.Namespace",
        "mmengine.logging.history_buffer.HistoryBuffer",
        "builtins.getattr",  # how a HistoryBuffer keeps its methods
        "builtins.slice",
        *(f"{home}.multiarray.{name}" for home in ("numpy.core", "numpy._core") for name in ("_reconstruct", "scalar")),
        *(f"numpy.{name}" for name in ("ndarray", "dtype")),
        *(f"numpy.dtypes.{name}DType" for name in ("Bool", "Int32", "Int64", "UInt8", "UInt32", "Float32", "Float64")),
    )
]


def read_checkpoint(path: str | Path) -> CheckpointFile:
    """Read a .pt, .pth or .safetensors file; pickled code never runs.

    Raises CheckpointError for a file that is missing or truncated, contains objects that could run code, or no weights.
    """
    path = Path(path)
    content, rest = _read(path)
    while isinstance(content, Mapping):
        inner = next((key for key in _CONTAINERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            break
        rest |= {str(key): value for key, value in content.items() if key != inner}
        content = content[inner]
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict; give the encoder's weights")
    state = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not state:
        found = ", ".join(sorted(map(str, content))) or "nothing"
        raise CheckpointError(f"{path} holds no weights, only {found}; give a file with the weights")
    rest |= {str(name): value for name, value in content.items() if not isinstance(value, Tensor)}
    return CheckpointFile(path, state, rest)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read only the weights of a checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path).state


def _read(path: Path) -> tuple[Any, dict[str, Any]]:
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; download it, or give the path of a .pt or .safetensors file")
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})
        with torch.serialization.safe_globals(list(_INERT)):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)), {}
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))  # torch's own message advises to read it nevertheless
        if code:
            raise CheckpointError(
                f"{path} holds more than tensors and plain data ({code[1]}), so it is not read: it could run code. "
                "Save its state dict alone and load that"
            ) from None
        raise CheckpointError(
            f"{path} is truncated or not written by torch.save; download it again, or save its state dict anew"
        ) from None
    except Exception as error:
        # safetensors and torch raise many types for broken files: RuntimeError, EOFError, SafetensorError, ...
        reason = re.split(r"\. |\n", str(error))[0] or type(error).__name__
        raise CheckpointError(f"{path} is truncated or not a checkpoint ({reason}); download it again") from error


def locate(source: str | Path) -> Path:
    """Return the local path of a checkpoint.

    Args:
        source: a file; 'hf://owner/repo', 'hf://owner/repo/file' or (as Meta writes it) 'hf://owner/repo:file' for the
            hub, through its cache, so that it works offline afterwards; 'https://...', through torch.hub's cache; or
            'package://module/file', a file that an installed package ships.

    Raises CheckpointError for a file that is not here and cannot be downloaded: what to download, and where to put it.
    """
    text = str(source)
    if text.startswith("package://"):
        module, _, filename = text.removeprefix("package://").partition("/")
        try:
            return Path(str(resources.files(module) / filename))
        except ModuleNotFoundError:
            raise CheckpointError(f"{module} in {text!r} is not installed; write package://module/file") from None
    if text.startswith(("https://", "http://")):
        return _download(text)
    if not text.startswith("hf://"):
        return Path(text)
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


def _download(url: str) -> Path:
    path = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name)
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
