"""The results of several tasks in one folder: a `ResultFolder` for each, filled from one pass over the inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.folder import ResultFolder
from pe_spatial.predict.together import Together

TRACKED = ("object",)
"""The class of tracked objects: a tracker knows none."""


class TaskFolders(ResultFolder):
    """<folder>/<task>/ is what `ResultFolder` writes for a task alone; an image is finished when all tasks are.

    Args:
        folder: where they go.
        model: its tasks are predicted.
        prompts: for a tracker, as `MultiTask.stream` takes them; each video begins with them.
        formats, progress: as in `ResultFolder`.
    """

    def __init__(
        self, folder: Path, model: Together, *, prompts: Any, formats: Collection[str], progress: Callable[..., Any]
    ) -> None:
        def predict(images: Any) -> Iterator[Any]:
            return model.stream(images, prompts)

        super().__init__(folder, predict, class_names=(), formats=formats, progress=progress)
        self.tasks = {
            task: ResultFolder(folder / task, predict, class_names=predictor.class_names or TRACKED, formats=formats,
                               progress=progress)
            for task, predictor in model.predictors.items()
        }  # fmt: skip

    def _part(self, name: str) -> Path:
        return list(self.tasks.values())[-1]._part(name)

    def _save(self, name: str, path: Path, rgb: np.ndarray, result: Any) -> None:
        for task, folder in self.tasks.items():
            folder._save(name, path, rgb, result[task])

    def _open_writer(self, stack: ExitStack, name: str, file_name: str, fps: float) -> Callable[..., None]:
        writers = {task: x._open_writer(stack, name, file_name, fps) for task, x in reversed(self.tasks.items())}

        def write(number: int, rgb: np.ndarray, result: Any) -> None:
            for task in self.tasks:
                writers[task](number, rgb, result[task])

        return write

    def finish_tasks(self) -> dict[str, int]:
        """Write the tables of each task; return the numbers of their objects."""
        return {task: folder.finish() for task, folder in self.tasks.items()}
