"""What exported models of single images share: the folder, its session, and images as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.streaming import Streamed
from pe_spatial.runtime.manifest import check_complete, read_manifest
from pe_spatial.runtime.sessions import Session, open_session


class ExportedModel(Streamed):
    """A model in another runtime, with the calls and results of `pe_spatial.load`'s.

    Args:
        folder: what `pe-spatial export` wrote.
        session: runs the graph of a head whose encoder is another graph; None opens the folder's.
        options: `backend` and `threads`, see `open_session`.

    Raises ConfigError for a folder that is not complete, and for such a head without a session.
    """

    def __init__(self, folder: str | Path, *, session: Session | None = None, **options: Any) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(folder)
        self.class_names = tuple(self.manifest.class_names)
        if session is None:
            check_complete(self.folder, self.manifest)
            session = open_session(self.folder, self.manifest, **options)
        self.session = session

    def _prepare(self, rgb: np.ndarray) -> np.ndarray:
        return rgb

    def _shape(self, item: np.ndarray) -> Any:
        return item.shape
