"""Sets of videos in DAVIS' layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from pe_spatial.errors import DatasetError

from .evaluation import read_sequences
from .video import Clip, list_frames


@DATASETS.register_module()
class VideoDataset(Dataset):
    """One item for each sequence: `dict(clip=Clip)`. Frames are read by the model, one at a time.

    Args:
        data_root: the `root` of `davis_clips`.
        sequences: file with the names of the sequences, one a line; None as in `davis_clips`.
    """

    def __init__(self, data_root: str, *, sequences: str | None = None) -> None:
        self.metainfo: Mapping[str, Any] = {}  # mmengine asks for it
        self.clips = davis_clips(data_root, read_sequences(sequences) if sequences else None)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Clip]:
        return dict(clip=self.clips[index])


def davis_clips(root: str | Path, sequences: Sequence[str] | None = None) -> list[Clip]:
    """List the sequences of a set in DAVIS' layout, each with the mask of its first frame.

    Objects that appear later have no mask in that frame, and are not followed: DAVIS' semi-supervised rule.

    Args:
        root: holds JPEGImages and Annotations, each with or without a folder 480p, then a folder for each sequence.
        sequences: names; None takes those of ImageSets/2017/val.txt, or where that is absent every folder of frames.

    Raises DatasetError for absent folders, frames and masks.
    """
    root = Path(root)
    pictures, masks = (_folder(root / name) for name in ("JPEGImages", "Annotations"))
    val = root / "ImageSets" / "2017" / "val.txt"
    if sequences is None:
        sequences = read_sequences(val) if val.is_file() else sorted(p.name for p in pictures.iterdir() if p.is_dir())
    if not sequences:
        raise DatasetError(f"{pictures} holds no folders of frames")
    return [_clip(pictures / name, masks / name) for name in sequences]


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; give the root of a set in DAVIS' layout (JPEGImages, Annotations)")
    return path / "480p" if (path / "480p").is_dir() else path


def _clip(pictures: Path, masks: Path) -> Clip:
    frames = list_frames(pictures)
    first = masks / f"{frames[0].stem}.png"
    if not first.is_file():
        raise DatasetError(f"no mask {first} of the first frame of {pictures}, so there is nothing to follow")
    return Clip(pictures.name, frames, first)
