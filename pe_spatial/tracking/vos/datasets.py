"""Datasets of videos for evaluation, in the layouts of DAVIS, MOSE, YouTube-VOS, LVOS and SA-V."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.registry import DATASETS
from torch.utils.data import Dataset

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.tracking.vos.evaluation import choose_sequences, read_sequences
from pe_spatial.video import list_frames

FOLDERS = {"davis": ("JPEGImages", "Annotations"), "sa-v": ("JPEGImages_24fps", "Annotations_6fps")}
"""Folders of frames and of annotations, by layout."""


@DATASETS.register_module()
class VideoDataset(Dataset):
    """One item for each sequence: `dict(clip=Clip)`. Frames and masks are read by the model, one at a time.

    Args:
        data_root: `root` of `davis_clips` or `sav_clips`.
        sequences: file with the names of the sequences, one per line; None for the default of those functions.
        layout: 'davis' (also for MOSE, YouTube-VOS and LVOS): one index mask per frame. 'sa-v': one binary mask per
            object, which begins on the first annotated frame that shows it.
        data_prefix: `img_path` and `ann_path`, relative to `data_root`, if the folders differ from the layout's names.
        late_objects: for 'davis': track objects that appear later from there on, as YouTube-VOS and LVOS require,
            instead of only those of the first frame, as DAVIS and MOSE do.
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
        self.metainfo: Mapping[str, Any] = {}  # mmengine requires it
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
    """List the sequences of a dataset in DAVIS' layout, with the mask of the first frame or with all masks.

    `root` contains `folders` (of frames and of annotations), each with or without a folder 480p, then one folder per
    sequence. `sequences` are names; None takes those of ImageSets/2017/val.txt or, if that is missing, every folder of
    frames. With `late_objects` objects that appear later are tracked as well, and annotations of some frames are
    enough. Raises DatasetError for missing folders, frames and masks.
    """
    root = Path(root)
    images, masks = (_folder(root / name, "DAVIS'") for name in folders)
    images, masks = (path / "480p" if (path / "480p").is_dir() else path for path in (images, masks))
    val = root / "ImageSets" / "2017" / "val.txt"
    if sequences is None and val.is_file():
        sequences = read_sequences(val)
    clips = []
    for name in _choose(images, sequences):
        frames, annotations = list_frames(images / name), _folder(masks / name, "DAVIS'")
        first = annotations / f"{frames[0].stem}.png"
        if not late_objects and not first.is_file():
            problem = f"the first frame of {images / name} has no mask {first}, so there is no object to track"
            raise DatasetError(f"{problem}; objects that begin later need late_objects")
        clips.append(Clip(name, frames, annotations if late_objects else first))
    return clips


def sav_clips(
    root: str | Path, sequences: Sequence[str] | None = None, *, folders: tuple[str, str] = FOLDERS["sa-v"]
) -> list[Clip]:
    """List the videos of a dataset in SA-V's layout, with the masks of every object.

    `root` contains `folders`: frames as <video>/<frame>.jpg, annotations as <video>/<object>/<frame>.png. `sequences`
    are names, as in sav_val.txt and sav_test.txt; None takes every folder of frames. Raises DatasetError for missing
    folders and frames.
    """
    images, masks = (_folder(Path(root) / name, "SA-V's") for name in folders)
    return [
        Clip(name, list_frames(images / name), _folder(masks / name, "SA-V's"), overlapping=True)
        for name in _choose(images, sequences)
    ]


def _folder(path: Path, layout: str) -> Path:
    if not path.is_dir():
        raise DatasetError(f"no folder {path}; give the root of a dataset in {layout} layout")
    return path


def _choose(images: Path, sequences: Sequence[str] | None) -> list[str]:
    return choose_sequences((path.name for path in images.glob("[!.]*") if path.is_dir()), sequences, images)
