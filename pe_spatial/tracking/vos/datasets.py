"""Sets of videos in the layouts of DAVIS, MOSE, YouTube-VOS, LVOS and SA-V."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.evaluation import read_sequences
from pe_spatial.tracking.vos.video import Clip, list_frames

FOLDERS = {"davis": ("JPEGImages", "Annotations"), "sa-v": ("JPEGImages_24fps", "Annotations_6fps")}
"""Of frames and annotations, by layout."""


@DATASETS.register_module()
class VideoDataset(Dataset):
    """One item for each sequence: `dict(clip=Clip)`. Frames and masks are read by the model, one at a time.

    Args:
        data_root: the `root` of `davis_clips` or `sav_clips`.
        sequences: file with the names of the sequences, one a line; None as in those.
        layout: 'davis', also that of MOSE, YouTube-VOS and LVOS: one index mask for a frame. 'sa-v': one binary mask
            for each object, which begins on the first annotated frame that shows it.
        data_prefix: `img_path` and `ann_path`, relative to `data_root`, where the layout's folders have other names.
        late_objects: of 'davis', whether objects that appear later are followed from there on, as YouTube-VOS and LVOS
            want it, or, by the rule of DAVIS and MOSE, only those of the first frame.
    """

    def __init__(
        self,
        data_root: str,
        *,
        sequences: str | None = None,
        layout: str = "davis",
        data_prefix: Mapping[str, str] | None = None,
        late_objects: bool = False,
    ) -> None:
        self.metainfo: Mapping[str, Any] = {}  # mmengine asks for it
        names = read_sequences(sequences) if sequences else None
        if layout not in FOLDERS:
            raise ConfigError(f"layout is {layout!r}; choose {' or '.join(FOLDERS)}")
        images, masks = FOLDERS[layout]
        prefix = dict(img_path=images, ann_path=masks) | dict(data_prefix or {})
        if len(prefix) > 2:
            raise ConfigError(f"data_prefix holds {', '.join(data_prefix or {})}; it takes img_path and ann_path")
        folders = (prefix["img_path"], prefix["ann_path"])
        if layout == "sa-v":
            self.clips = sav_clips(data_root, names, folders=folders)
        else:
            self.clips = davis_clips(data_root, names, folders=folders, late_objects=late_objects)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: int) -> dict[str, Clip]:
        return dict(clip=self.clips[index])


def davis_clips(
    root: str | Path,
    sequences: Sequence[str] | None = None,
    *,
    folders: tuple[str, str] = FOLDERS["davis"],
    late_objects: bool = False,
) -> list[Clip]:
    """List the sequences of a set in DAVIS' layout, each with the mask of its first frame, or with all its masks.

    Args:
        root: holds `folders`, each with or without a folder 480p, then a folder for each sequence.
        sequences: names; None takes those of ImageSets/2017/val.txt, or where that is absent every folder of frames.
        folders: of frames and of annotations.
        late_objects: follow objects that appear later as well. Annotations of some frames are enough then.

    Raises DatasetError for absent folders, frames and masks.
    """
    root = Path(root)
    images, masks = (_folder(root / name, "DAVIS'") for name in folders)
    images, masks = (path / "480p" if (path / "480p").is_dir() else path for path in (images, masks))
    val = root / "ImageSets" / "2017" / "val.txt"
    if sequences is None and val.is_file():
        sequences = read_sequences(val)
    clips = []
    for name in _names(images, sequences):
        frames, annotations = list_frames(images / name), _folder(masks / name, "DAVIS'")
        first = annotations / f"{frames[0].stem}.png"
        if not late_objects and not first.is_file():
            raise DatasetError(
                f"no mask {first} of the first frame of {images / name}, so there is nothing to follow; objects that "
                "begin later need late_objects"
            )
        clips.append(Clip(name, frames, annotations if late_objects else first))
    return clips


def sav_clips(
    root: str | Path, sequences: Sequence[str] | None = None, *, folders: tuple[str, str] = FOLDERS["sa-v"]
) -> list[Clip]:
    """List the videos of a set in SA-V's layout, each with the masks of every object.

    Args:
        root: holds `folders`: frames as <video>/<frame>.jpg, annotations as <video>/<object>/<frame>.png.
        sequences: names (of sav_val.txt or sav_test.txt); None takes every folder of frames.
        folders: of frames and of annotations.

    Raises DatasetError for absent folders and frames.
    """
    images, masks = (_folder(Path(root) / name, "SA-V's") for name in folders)
    return [
        Clip(name, list_frames(images / name), _folder(masks / name, "SA-V's"), overlapping=True)
        for name in _names(images, sequences)
    ]


def _folder(path: Path, layout: str) -> Path:
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; give the root of a set in {layout} layout")
    return path


def _names(images: Path, sequences: Sequence[str] | None) -> Sequence[str]:
    if sequences is None:
        sequences = sorted(path.name for path in images.iterdir() if path.is_dir())
    if not sequences:
        raise DatasetError(f"{images} holds no folders of frames")
    return sequences
