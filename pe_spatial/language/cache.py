"""Features of images on disk, by what the files and the weights hold: neither names nor times count."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError
from pe_spatial.images import read_bytes, read_rgb

from .embedding import embed
from .model import PECore


def weights_hash(model: PECore) -> str:
    """Return the SHA-256 of the image tower's weights and configuration."""
    digest = hashlib.sha256(repr((model.config, model.visual.encoder.geometry)).encode())
    for name, parameter in sorted(model.visual.state_dict().items()):
        value = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        digest.update((ctypes.c_char * value.nbytes).from_address(value.data_ptr()))
    return digest.hexdigest()


class EmbeddingCache:
    """The features of all images that a model has seen, in one file of `folder`."""

    def __init__(self, model: PECore, folder: Path) -> None:
        self.model = model
        self.path = folder / f"{weights_hash(model)[:24]}.npz"
        self.known: dict[str, np.ndarray] = {}
        if self.path.is_file():
            try:
                with np.load(self.path) as file:
                    self.known = dict(zip(file["images"].tolist(), file["features"], strict=True))
            except (OSError, ValueError, KeyError) as error:
                raise DatasetError(f"{self.path} is damaged ({error}); remove it, and it is computed again") from None

    def features(
        self, paths: Sequence[Path], *, batch_size: int = 32, done: Callable[[int], object] = id
    ) -> tuple[list[Path], Tensor, list[str], int]:
        """Return the readable `paths`, their features (N, D), why others cannot be read, and how many are new."""
        keys: dict[Path, str] = {}
        unreadable: list[str] = []
        for path in paths:
            try:
                keys[path] = hashlib.sha256(read_bytes(path)).hexdigest()
            except DatasetError as error:
                unreadable.append(str(error))
        new = {key: path for path, key in keys.items() if key not in self.known}
        done(len(paths) - len(new))
        failed: dict[int, str] = {}
        readers = [partial(read_rgb, path) for path in new.values()]
        found = embed(self.model, readers, batch_size=batch_size, failed=failed, done=done).numpy()
        read = [key for i, key in enumerate(new) if i not in failed]
        self.known |= dict(zip(read, found, strict=True))
        if read:
            self._write()
        keys = {path: key for path, key in keys.items() if key in self.known}
        rows = np.stack([self.known[key] for key in keys.values()]) if keys else found
        return list(keys), torch.from_numpy(rows), [*unreadable, *failed.values()], len(read)

    def _write(self) -> None:
        with atomic_write(self.path) as unfinished, unfinished.open("wb") as file:
            np.savez(file, images=np.array([*self.known]), features=np.stack([*self.known.values()]))
