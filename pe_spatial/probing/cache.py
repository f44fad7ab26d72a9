"""Feature maps and labels on disk, and the parts of a model that read them instead of running the encoder."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.model import BaseDataPreprocessor
from mmengine.structures import PixelData
from torch import Tensor, nn

from pe_spatial.atomic import write_json

Features = dict[str, Tensor]
"""What one layer gives: 'maps' (B, C, h, w) and, where the encoder has a class token, 'tokens' (B, C)."""


class ArrayCache:
    """Arrays on disk with one row per image, filled in order; rows.json holds the number of finished rows of each.

    `shapes` maps the name of each array to shape and type of a row.
    """

    def __init__(self, folder: Path, rows: int, shapes: Mapping[str, tuple[Sequence[int], torch.dtype]]) -> None:
        self.folder, self.rows, self.shapes = folder, rows, dict(shapes)
        finished = self._read_state()
        self.finished = {name: finished.get(name, 0) if self._is_intact(name) else 0 for name in shapes}
        self._arrays: dict[str, np.ndarray] = {}

    def _read_state(self) -> dict[str, int]:
        path = self.folder / "rows.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.npy"

    def _is_intact(self, name: str) -> bool:
        try:
            return np.load(self.path(name), mmap_mode="r").shape == (self.rows, *self.shapes[name][0])
        except (OSError, ValueError):  # absent, or shorter than its header says
            return False

    @property
    def bytes_missing(self) -> int:
        """Size of the rows that are still to be written."""
        return sum(
            (self.rows - self.finished[name]) * int(np.prod(shape)) * dtype.itemsize
            for name, (shape, dtype) in self.shapes.items()
        )

    @property
    def first_missing(self) -> int:
        """The first row that one of the arrays lacks."""
        return min(self.finished.values())

    def read(self, name: str, row: int) -> Tensor:
        dtype = self.shapes[name][1]
        values = torch.from_numpy(np.array(self._open(name)[row]))
        return values.view(dtype) if dtype == torch.bfloat16 else values

    def write(self, name: str, row: int, values: Tensor) -> None:
        values = values.cpu().contiguous()
        self._open(name)[row] = (values.view(torch.int16) if values.dtype == torch.bfloat16 else values).numpy()

    def flush(self, rows: int) -> None:
        """Write all rows to disk, then record that the first `rows` of every array are finished."""
        for array in self._arrays.values():
            array.flush()  # type: ignore[attr-defined]
        self.finished = {name: max(rows, finished) for name, finished in self.finished.items()}
        write_json(self.folder / "rows.json", {**self._read_state(), **self.finished})

    def _open(self, name: str) -> np.ndarray:
        if name not in self._arrays:
            shape, dtype = self.shapes[name]
            if not self._is_intact(name):
                self.folder.mkdir(parents=True, exist_ok=True)
                stored = np.dtype("int16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch."))
                np.lib.format.open_memmap(self.path(name), "w+", stored, (self.rows, *shape))
            self._arrays[name] = np.load(self.path(name), mmap_mode="r+")
        return self._arrays[name]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}}  # a copy of a memory-mapped array would load all of it


class CachedSamples(torch.utils.data.Dataset[dict[str, Any]]):
    """The training set of one layer's probe: its cached maps and the labels.

    `arrays` maps the keys of `Features` to the names of their arrays, and `labels` names the arrays of labels.
    """

    def __init__(
        self, cache: ArrayCache, *, arrays: Mapping[str, str], labels: Sequence[str], sample_type: type,
        metainfo: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self.cache, self.arrays, self.labels = cache, arrays, labels
        self.sample_type, self.metainfo = sample_type, metainfo

    def __len__(self) -> int:
        return self.cache.rows

    def __getitem__(self, row: int) -> dict[str, Any]:
        sample = self.sample_type()
        for name in self.labels:
            values = self.cache.read(name, row)
            setattr(sample, name, PixelData(data=values.long() if values.dtype == torch.int16 else values))
        return {**{key: self.cache.read(name, row) for key, name in self.arrays.items()}, "data_samples": sample}


class CachedEncoder(nn.Module):
    """Takes the encoder's place in a model and returns what `read(images)` gives for one layer.

    `out_indices` is this layer, 0-based, repeated as often as the head reads it.
    """

    def __init__(self, encoder: nn.Module, out_indices: Sequence[int]) -> None:
        super().__init__()
        self.config = encoder.config
        self.patch_size: int = encoder.patch_size  # type: ignore[assignment]
        self.embed_dim: int = encoder.embed_dim  # type: ignore[assignment]
        self.num_prefix_tokens = getattr(encoder, "num_prefix_tokens", 0)
        self.out_indices = tuple(out_indices)
        self.read: Callable[[Tensor], Features]

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.read(images)["maps"],) * len(self.out_indices)

    def forward_with_class_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        features, times = self.read(images), len(self.out_indices)
        return (features["maps"],) * times, (features["tokens"],) * times


class CachedPreprocessor(BaseDataPreprocessor):
    """Passes the cached features of a batch to `encoder`; the model gets empty images of `size` (H, W)."""

    def __init__(self, encoder: CachedEncoder, size: Sequence[int]) -> None:
        super().__init__()
        self.encoder, self.size = encoder, tuple(size)

    def forward(self, data: dict[str, Any], training: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """Return inputs (B, 3, H, W), which take no memory, and the data samples."""
        data = self.cast_data(data)
        features: Features = {key: torch.stack(data[key]).float() for key in ("maps", "tokens") if key in data}
        self.encoder.read = lambda _: features
        images = torch.zeros((), device=self.device).expand(len(data["maps"]), 3, *self.size)
        return dict(inputs=images, data_samples=data["data_samples"])


class SharedEncoderPass:
    """Runs the encoder once for several models that ask for the same images in the same order."""

    def __init__(self, encoder: Any) -> None:
        self.encoder = encoder
        self.calls: list[list[Features]] = []

    def reader(self, index: int) -> Callable[[Tensor], Features]:
        """Return what another model, which reads the layer `out_indices[index]`, calls in place of the encoder."""
        calls = 0

        def read(images: Tensor) -> Features:
            nonlocal calls
            if calls == len(self.calls):
                self.calls.append(self._encode(images))
            calls += 1
            return self.calls[calls - 1][index]

        return read

    @torch.no_grad()
    def _encode(self, images: Tensor) -> list[Features]:
        if not hasattr(self.encoder, "forward_with_class_tokens"):
            return [dict(maps=maps) for maps in self.encoder(images)]
        maps, tokens = self.encoder.forward_with_class_tokens(images)
        if not tokens:
            return [dict(maps=layer) for layer in maps]
        return [dict(maps=layer, tokens=token) for layer, token in zip(maps, tokens, strict=True)]


def layer_digests(encoder: nn.Module, layers: Sequence[int]) -> dict[int, str]:
    """Return for each layer a digest of the weights that its maps depend on: its block, those before, and the stem."""
    state = {name: value.contiguous().cpu() for name, value in encoder.state_dict().items()}
    blocks = {name: re.search(r"\bblocks\.(\d+)\.", name) for name in state}
    total, result = hashlib.sha256(), {}
    for block in range(-1, max(layers) + 1):
        for name, match in blocks.items():
            if (int(match[1]) if match else -1) == block:
                total.update(name.encode())
                total.update(state[name].flatten().view(torch.uint8).numpy().data)
        if block in layers:
            result[block] = total.hexdigest()[:12]
    return result


def digest(value: Any) -> str:
    """Return a digest of nested dictionaries, lists and values, others than plain ones by their repr."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=repr).encode()).hexdigest()[:16]
