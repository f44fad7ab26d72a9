"""Arrays of features on disk, one row per image and view, in blocks of rows that are complete or absent.

A folder holds about.json, which says what the rows depend on, and <array>/<block>.bin. Blocks appear complete, so a
killed writer loses one block, processes may fill a folder together, and a later one continues. Readers map the files,
so all processes of a machine share the same memory.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pe_spatial.atomic import atomic_write, write_json
from pe_spatial.errors import ConfigError, DatasetError, listed, one_of

DTYPES = {"float32": None, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
"""How values are stored; 'float32' keeps them as they were computed, to the last bit."""

_BLOCK_BYTES = 64 << 20  # of an array of float32


class FeatureCache:
    """A folder of features.

    Args:
        folder: made if it is absent.
        about: what the rows depend on, as JSON values: name -> value or mapping.
        arrays: name -> (shape, dtype) of a row as it is computed. Arrays that the folder does not have yet are added.
        weights: name of an array -> digest of the weights that it depends on.
        rows: number of rows.
        dtype: a key of `DTYPES`. 'int8' has one scale for each channel of a row.
        batch: blocks are multiples of this number of rows.

    Raises ConfigError if the folder holds rows that depend on something else, or if its disk is too small.
    """

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any],
        arrays: Mapping[str, tuple[Sequence[int], torch.dtype]],
        weights: Mapping[str, str],
        *,
        rows: int,
        dtype: str = "float32",
        batch: int = 1,
    ) -> None:
        self.folder, self.rows, self.arrays = Path(folder), rows, dict(arrays)
        self.dtype = DTYPES[one_of("the type of cached features", dtype, tuple(DTYPES))]
        row_bytes = max(4 * int(np.prod(shape)) for shape, _ in arrays.values())
        self.block = batch * max(1, round(_BLOCK_BYTES / (batch * row_bytes)))
        self.about, self.weights = {**about, "stored as": dtype, "rows": rows}, dict(weights)
        self._agree(self.about, self.weights)
        self._check_space()

    def _agree(self, about: Mapping[str, Any], weights: Mapping[str, str]) -> None:
        """Read about.json and raise ConfigError if it differs, or write it."""
        path = self.folder / "about.json"
        if path.is_file():
            try:
                there = json.loads(path.read_text())
                self.block = int(there["block"])
                old, known = _flat(there["about"]), there["weights"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DatasetError(f"{path} is damaged ({error}); delete {self.folder} and start again") from error
            new = _flat(json.loads(json.dumps(about)))
            keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
            differs = [f"{key} is {old.get(key)} there, {new.get(key)} here" for key in keys]
            changed = [name for name in weights if known.get(name, weights[name]) != weights[name]]
            if changed:
                differs.insert(0, f"the weights of the encoder are others ({listed(changed, 3)})")
            if differs:
                raise ConfigError(
                    f"{self.folder} holds other features: {listed(differs, 3)}; use those settings, give another "
                    f"folder, such as {self.folder}_2, or delete it"
                )
            weights = {**known, **weights}
            if weights == known:
                return
        elif self.folder.is_dir() and any(not path.name.startswith(".") for path in self.folder.iterdir()):
            raise ConfigError(f"{self.folder} is not a folder of features (no about.json); give another folder")
        write_json(path, dict(about=about, weights=weights, block=self.block))

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.folder).free
        if self.bytes_missing > free:
            raise ConfigError(
                f"the features need {self.bytes_missing / 1e9:.1f} GB more, but {self.folder} has {free / 1e9:.1f} GB; "
                "choose fewer layers, images or views, a smaller type (float16, int8), or another disk"
            )

    @property
    def blocks(self) -> int:
        """Number of blocks of each array."""
        return -(-self.rows // self.block)

    def rows_of(self, block: int) -> range:
        """Return the rows of a block."""
        return range(block * self.block, min((block + 1) * self.block, self.rows))

    @property
    def missing(self) -> list[int]:
        """Blocks that one of the arrays lacks."""
        return [block for block in range(self.blocks) if not all(self.has(name, block) for name in self.arrays)]

    @property
    def bytes_missing(self) -> int:
        """Size of the files that are still to be written."""
        return sum(
            self._file_size(name, block)
            for name in self.arrays
            for block in range(self.blocks)
            if not self.has(name, block)
        )

    def has(self, name: str, block: int) -> bool:
        """Return whether a block of an array is complete."""
        path = self.path(name, block)
        return path.is_file() and path.stat().st_size == self._file_size(name, block)

    def path(self, name: str, block: int) -> Path:
        """Return the file of a block."""
        return self.folder / name / f"{block:06d}.bin"

    def write(self, block: int, rows: Mapping[str, Tensor]) -> None:
        """Write the rows (n, ...) of a block, of every array that lacks it."""
        for name, values in rows.items():
            if not self.has(name, block):
                stored, scales = self._encode(values)
                with atomic_write(self.path(name, block)) as unfinished, unfinished.open("wb") as file:
                    for part in (stored, scales):  # not by numpy, whose error of a full disk has no number
                        if part is not None:
                            file.write(part.contiguous().view(torch.uint8).numpy().data)

    def read(self, name: str, row: int) -> Tensor:
        """Return a row in the dtype in which it was computed."""
        shape, dtype = self.arrays[name]
        block, place = divmod(row, self.block)
        size, count = int(np.prod(shape)), len(self.rows_of(block))
        stored = self.dtype or dtype
        data = np.memmap(self.path(name, block), np.uint8, "r")
        start = place * size * stored.itemsize
        values = torch.from_numpy(np.array(data[start : start + size * stored.itemsize])).view(stored).view(*shape)
        if stored != torch.int8:
            return values.to(dtype)
        start = count * size + 4 * place * shape[0]
        scales = torch.from_numpy(np.array(data[start : start + 4 * shape[0]])).view(torch.float32)
        return (values * scales.view(-1, *[1] * (len(shape) - 1))).to(dtype)

    def error(self, values: Tensor) -> float:
        """Return the error that storing `values` (n, channels, ...) makes, relative to their root mean square."""
        stored, scales = self._encode(values)
        back = stored.float()
        if scales is not None:
            back = back * scales.view(*scales.shape, *[1] * (values.ndim - 2))
        exact = values.cpu().float()
        return float((back - exact).square().mean().sqrt() / exact.square().mean().sqrt().clamp(min=1e-30))

    def _encode(self, values: Tensor) -> tuple[Tensor, Tensor | None]:
        values = values.detach().cpu()
        if self.dtype != torch.int8:
            stored = values.to(self.dtype or values.dtype)
            if not stored.isfinite().all():
                raise ConfigError("the features exceed the range of float16; use bfloat16")
            return stored, None
        scales = values.float().flatten(2).abs().amax(2) if values.ndim > 2 else values.float().abs()
        scales = (scales / 127).clamp(min=1e-30)  # (n, channels)
        return (values.float() / scales.view(*scales.shape, *[1] * (values.ndim - 2))).round().to(torch.int8), scales

    def _file_size(self, name: str, block: int) -> int:
        shape, dtype = self.arrays[name]
        stored = self.dtype or dtype
        row = int(np.prod(shape)) * stored.itemsize + (4 * shape[0] if stored == torch.int8 else 0)
        return row * len(self.rows_of(block))


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


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, one in value.items():
        result |= _flat(one, f"{prefix}{key}.") if isinstance(one, Mapping) else {prefix + key: one}
    return result
