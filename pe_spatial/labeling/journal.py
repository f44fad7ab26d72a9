"""The journal of a labeling project: each prompt and decision is one line of JSON, appended at once and never changed.

{"op": "project", "version": 1, "video": NAME, "frames": N, "size": [H, W]}      the first line
{"op": "class", "object": 1, "name": "cat"}
{"op": "prompt", "frame": 0, "object": 1, "point": [X, Y], "on": true}           or "box": [X0, Y0, X1, Y1], "mask": RLE
{"op": "undo"}                                                                    takes the last prompt back
{"op": "accept", "frame": 12}                                                     a person has looked at the frame
"""

import json
import os
from pathlib import Path
from typing import Any

from pe_spatial.errors import DatasetError

NAME = "journal.jsonl"
VERSION = 1


class Journal:
    """A journal file; what was appended is there after a crash, and an unfinished last line is removed.

    Args:
        folder: of the project; it is created. DatasetError if it has files but no journal, or a damaged one.
        project: `video`, `frames` and `size` of the project. DatasetError if the folder holds another one.
    """

    def __init__(self, folder: Path, project: dict[str, Any]) -> None:
        self.path = folder / NAME
        self.entries: list[dict[str, Any]] = []
        if not self.path.is_file() and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise DatasetError(f"{folder} holds other files and no journal of labels; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            self._read()
        first = {"op": "project", "version": VERSION, **project}
        if not self.entries:
            self.append(first)
        elif self.entries[0] != first:
            other = self.entries[0]
            raise DatasetError(
                f"{folder} holds the labels of {other.get('video')} ({other.get('frames')} frames of "
                f"{_size(other)}), not of {project['video']} ({project['frames']} frames of {_size(project)}); choose "
                "another folder"
            )

    def append(self, entry: dict[str, Any]) -> None:
        """Add a line; it is on the disk when this returns."""
        line = (json.dumps(entry, separators=(",", ":")) + "\n").encode()
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(file, line)
            os.fsync(file)
        finally:
            os.close(file)
        self.entries.append(entry)

    def _read(self) -> None:
        data = self.path.read_bytes()
        complete = data[: data.rfind(b"\n") + 1]
        if len(complete) < len(data):  # a crash while a line was written
            with self.path.open("r+b") as file:
                file.truncate(len(complete))
        for number, line in enumerate(complete.splitlines(), 1):
            try:
                entry = json.loads(line)
                entry["op"]
            except (ValueError, TypeError, KeyError):
                raise DatasetError(f"{self.path}, line {number} is not an entry of a journal; remove it") from None
            self.entries.append(entry)

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """The prompts that were not taken back, in the order in which they were given."""
        kept: list[dict[str, Any]] = []
        for entry in self.entries:
            if entry["op"] == "prompt":
                kept.append(entry)
            elif entry["op"] == "undo":
                kept.pop()
        return kept

    @property
    def classes(self) -> dict[int, str]:
        """Object -> the name of its class."""
        return {entry["object"]: entry["name"] for entry in self.entries if entry["op"] == "class"}

    @property
    def accepted(self) -> set[int]:
        """The frames that a person has accepted."""
        return {entry["frame"] for entry in self.entries if entry["op"] == "accept"}


def _size(project: dict[str, Any]) -> str:
    height, width = project.get("size") or (0, 0)
    return f"{width}x{height}"
