"""What exported models of single images share: the folder, its session, and images as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.streaming import Streamed
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import open_session


class ExportedModel(Streamed):
    """A model in another runtime, with the calls and results of `pe_spatial.load`'s.

    Args:
        folder: what `pe-spatial export` wrote.
        options: `backend` and `threads`, see `open_session`.
    """

    def __init__(self, folder: str | Path, **options: Any) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.class_names = tuple(self.manifest.class_names)
        self.session = open_session(self.folder, self.manifest, **options)

    def _prepare(self, rgb: np.ndarray) -> np.ndarray:
        return rgb

    def _shape(self, item: np.ndarray) -> Any:
        return item.shape
