"""Datasets of clips for training a tracker: layouts of videos and masks, and the sampling of frames and objects.

A `MaskSource` has `frames`, the names of the annotated frames, `read(frame)`, the masks of one of them (object id ->
(H, W) bool; absent objects may be omitted, masks may overlap), and `where(frame)`, their name in error messages. It
reads files when needed, caches what it reads while it exists (for one clip), and can be pickled to data workers.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from mmcv.transforms import BaseTransform
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS, TRANSFORMS

from pe_spatial.data.coco import decode_mask
from pe_spatial.data.files import read_json
from pe_spatial.engine.loading import RefetchBrokenMixin, log_skipped
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import read_rgb
from pe_spatial.planning.registry import register_step
from pe_spatial.tracking.vos.evaluation import choose_sequences, read_sequences
from pe_spatial.tracking.vos.masks import VOID, read_mask, read_object_masks, split_masks
from pe_spatial.video import list_frames

_SAV_STEP = 4  # SA-V annotates every 4th frame (6 of 24 per second)
_SAV_NAMES = ("manual", "auto")

# layout -> folders of images and of masks (None: must be given), and the list of videos
_LAYOUTS: dict[str, tuple[str | None, str | None, str | None]] = {
    "davis": ("JPEGImages", "Annotations", "ImageSets/2017/{split}.txt"),
    "youtube-vos": ("{split}/JPEGImages", "{split}/Annotations", None),
    "mose": ("{split}/JPEGImages", "{split}/Annotations", None),
    "synthetic": ("{split}", "instances/{split}", None),
    "sa-v": (None, None, None),
    "images": (None, None, None),
}


@dataclass(frozen=True)
class PngMasks:
    """Index masks <frame>.png or SA-V's binary masks <object>/<frame>.png, whichever `folder` contains.

    In index masks 255 is void and becomes background; in a video without other ids (DAVIS 2016) it is object 1.
    """

    folder: Path

    @cached_property
    def _indexed(self) -> bool:
        return any(self.folder.glob("[!.]*.png"))

    @cached_property
    def frames(self) -> list[str]:
        stems = sorted({path.stem for path in self.folder.glob("[!.]*.png" if self._indexed else "[!.]*/[!.]*.png")})
        if not stems:
            raise DatasetError(f"{self.folder} holds no mask; expected <frame>.png, or <object>/<frame>.png as in SA-V")
        return stems

    def read(self, frame: str) -> Mapping[int, np.ndarray]:
        if not self._indexed:
            return read_object_masks(self.folder, frame)
        mask = read_mask(self.folder / f"{frame}.png")
        void = mask == VOID
        if void.any():
            mask[void] = self._void_is
        return split_masks(mask)

    def where(self, frame: str) -> str:
        return str(self.folder / ("" if self._indexed else "*") / f"{frame}.png")

    @cached_property
    def _void_is(self) -> int:
        """The object id that 255 stands for, judged by the first mask that is not empty."""
        masks = (read_mask(self.folder / f"{frame}.png") for frame in self.frames)
        return int(not split_masks(next(mask for mask in masks if mask.any())))


@dataclass(frozen=True)
class SAVMasks:
    """SA-V's masklets: `masklet[frame][object]` of one or several JSON files, with objects numbered consecutively.

    A frame with a mask of None counts as not annotated, as in SAM 2 (training/dataset/vos_raw_dataset.py).
    """

    paths: tuple[Path, ...]

    @cached_property
    def _annotated(self) -> dict[str, list[Any]]:
        """Frame -> RLEs of its objects."""
        files = [_read_json(path, "masklet")["masklet"] for path in self.paths]
        frames = {}
        for i, of_files in enumerate(zip(*files, strict=False)):  # frames missing in one file are not annotated
            codes = [code for of_file in of_files for code in ([None] if of_file is None else of_file)]
            if None not in codes:
                frames[f"{i * _SAV_STEP:05d}"] = codes
        return frames

    @property
    def frames(self) -> list[str]:
        return list(self._annotated)

    def read(self, frame: str) -> Mapping[int, np.ndarray]:
        return {i: _decode(code, None, self.where(frame)) for i, code in enumerate(self._annotated[frame])}

    def where(self, frame: str) -> str:
        return f"frame {frame} of {self.paths[0]}"


@dataclass(frozen=True)
class CocoMasks:
    """The objects of an image: COCO's segmentations (RLE or polygons) by the ids of their annotations."""

    image: str
    size: tuple[int, int]
    segmentations: Mapping[int, Any]

    @property
    def frames(self) -> list[str]:
        return [Path(self.image).stem]

    def read(self, frame: str) -> Mapping[int, np.ndarray]:
        return {i: _decode(code, self.size, self.where(frame)) for i, code in self.segmentations.items()}

    def where(self, frame: str) -> str:  # noqa: ARG002
        return f"the annotation of {self.image}"


MaskSource = PngMasks | SAVMasks | CocoMasks


def _decode(segmentation: Any, size: tuple[int, int] | None, source: str) -> np.ndarray:
    """Decode RLE to (H, W) bool; with a `size` (height, width) also polygons and uncompressed RLE."""
    try:
        return decode_mask(segmentation, size)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise DatasetError(f"a mask of {source} cannot be decoded ({error!r}); correct the annotations") from error


def _read_json(path: Path, *keys: str) -> dict[str, Any]:
    if not path.exists():
        raise DatasetError(f"no file {path}; check data_root (--data-root) and data_prefix")
    content = read_json(path)
    if not isinstance(content, dict) or not set(keys) <= set(content):
        raise DatasetError(f"{path} lacks {' or '.join(keys)}; check layout and data_prefix")
    return content


@DATASETS.register_module()
class VideoClipDataset(RefetchBrokenMixin, BaseDataset):
    """Videos with masks, from which `LoadClip` draws clips; the dataset itself reads names only.

    Layouts and their folders, which `data_prefix` can replace:

    - davis: JPEGImages and Annotations, with or without 480p; the videos of ImageSets/2017/<split>.txt if it exists.
    - youtube-vos, mose: <split>/JPEGImages and <split>/Annotations.
    - synthetic: <split> and instances/<split>, as pe-spatial render_synthetic writes them.
    - sa-v: frames <img_path>/<video>/<frame>.jpg at 24 per second, <ann_path>/<video>_manual.json; give both folders.
      Its val and test sets, and all data with a folder of masks per object, have the layout mose.
    - images: still images as clips of one frame; `ann_path` is COCO's JSON, `img_path` the folder that its `file_name`s
      are relative to; give both. Crowds and images without masks are omitted.

    Args:
        data_root: folder that contains the others.
        layout: one of the above.
        split: name of the split, 'train' by default, for layouts that have splits.
        data_prefix: `img_path` and `ann_path`, relative to `data_root`.
        sequences: file with the names of the videos to use, one per line; None for all.
        auto: also use SA-V's automatic masks, <video>_auto.json, of the videos that have them.
        max_refetch, options: as in mmengine's `BaseDataset`; SAM 2 also tries 100 times.
    """

    def __init__(
        self,
        *,
        data_root: str,
        layout: str,
        split: str | None = None,
        data_prefix: Mapping[str, str] | None = None,
        sequences: str | None = None,
        auto: bool = False,
        max_refetch: int = 100,
        **options: Any,
    ) -> None:
        if layout not in _LAYOUTS:
            raise ConfigError(f"layout is {layout!r}; choose {', '.join(_LAYOUTS)}")
        given = dict(data_prefix or {})
        if not set(given) <= {"img_path", "ann_path"}:
            raise ConfigError(f"data_prefix holds {', '.join(given)}; it takes img_path and ann_path")
        if auto and layout != "sa-v":
            raise ConfigError(f"auto=True is for the layout sa-v, not {layout}; omit it")
        images, masks, listed = _LAYOUTS[layout]
        places = {"img_path": images, "ann_path": masks, **given}
        if None in places.values():
            raise ConfigError(f"the layout {layout} needs both of data_prefix, img_path and ann_path")
        listed = None if sequences else listed
        if split is not None and not any("{split}" in str(place) for place in (*places.values(), listed)):
            raise ConfigError(f"split is {split!r}, but layout, data_prefix and sequences do not depend on it; omit it")
        split = split or "train"
        self.layout, self.sequences, self.auto = layout, sequences, auto
        if listed and (path := Path(data_root, listed.format(split=split))).is_file():
            self.sequences = str(path)
        prefix = {key: str(place).replace("{split}", split) for key, place in places.items()}
        super().__init__(data_root=data_root, data_prefix=prefix, max_refetch=max_refetch, **options)

    def load_data_list(self) -> list[dict[str, Any]]:
        """Return video (name), img_path (folder of frames, or image) and source (of masks) of each video."""
        image_root, masks = Path(self.data_prefix["img_path"]), Path(self.data_prefix["ann_path"])
        if not image_root.is_dir():
            raise DatasetError(f"no folder {image_root}; check data_root (--data-root), layout and data_prefix")
        videos = self._image_clips(image_root, masks) if self.layout == "images" else self._videos(image_root, masks)
        MMLogger.get_current_instance().info(f"{image_root}: {len(videos)} videos")
        return videos

    def _videos(self, image_root: Path, masks: Path) -> list[dict[str, Any]]:
        if not masks.is_dir():
            raise DatasetError(f"no folder {masks}; check data_root (--data-root), layout and data_prefix")
        if self.layout == "davis":
            image_root, masks = (path / "480p" if (path / "480p").is_dir() else path for path in (image_root, masks))
        names = self._choose((path.name for path in image_root.glob("[!.]*") if path.is_dir()), image_root)
        ending = f"_{_SAV_NAMES[0]}.json" if self.layout == "sa-v" else ""
        present = {path.name for path in masks.iterdir()}  # one listing is far cheaper than a check per video
        without = [name for name in names if name + ending not in present]
        if without:
            raise DatasetError(
                f"{len(without)} of {len(names)} videos have no masks, the first is {masks / (without[0] + ending)}; "
                "restore them, or list the others in a file and set sequences"
            )
        videos = []
        for name in names:
            source: MaskSource = PngMasks(masks / name)
            if self.layout == "sa-v":
                files = [f"{name}_{kind}.json" for kind in _SAV_NAMES[: 1 + self.auto]]
                source = SAVMasks(tuple(masks / file for file in files if file in present))
            videos.append(dict(video=name, img_path=str(image_root / name), source=source))
        return videos

    def _image_clips(self, image_root: Path, annotations: Path) -> list[dict[str, Any]]:
        coco = _read_json(annotations, "images", "annotations")
        objects: dict[int, dict[int, Any]] = {}
        try:
            for one in coco["annotations"]:
                if not one.get("iscrowd") and one.get("segmentation"):
                    objects.setdefault(one["image_id"], {})[one["id"]] = one["segmentation"]
            images = {Path(one["file_name"]).with_suffix("").as_posix(): one for one in coco["images"]}
            sources = {
                name: CocoMasks(str(image_root / one["file_name"]), (one["height"], one["width"]), objects[one["id"]])
                for name, one in images.items()
                if one["id"] in objects
            }
        except (KeyError, TypeError) as error:
            raise DatasetError(f"{annotations} is not in COCO's format ({error!r} is missing); correct it") from error
        names = self._choose(sources, annotations)
        return [dict(video=name, img_path=sources[name].image, source=sources[name]) for name in names]

    def _choose(self, present: Iterable[str], where: Path) -> list[str]:
        return choose_sequences(present, self.sequences and read_sequences(self.sequences), where)


@TRANSFORMS.register_module()
class LoadClip(BaseTransform):
    """Draw consecutive frames and objects of the first of them, and read images and masks.

    As in SAM 2's RandomUniformSampler, every window of annotated frames is equally likely, and another window is drawn
    if the first frame shows no object. A video without such a window, or with too few annotated frames, is logged once
    and replaced by another video. An image and a mask belong together if their names are equal, compared as numbers if
    both are numbers.

    Args:
        num_frames: number of frames per clip.
        max_objects: maximum number of objects, chosen at random.
        reverse_prob: probability of reversing the clip; 0 in SAM 2's fine-tuning.
        skip_broken: log a video that cannot be read and draw another one, instead of raising DatasetError.
    """

    def __init__(
        self, *, num_frames: int, max_objects: int, reverse_prob: float = 0.0, skip_broken: bool = False
    ) -> None:
        if num_frames < 1 or max_objects < 1:
            raise ConfigError(f"num_frames is {num_frames} and max_objects {max_objects}; both must be at least 1")
        self.num_frames, self.max_objects, self.reverse_prob = num_frames, max_objects, reverse_prob
        self.skip_broken = skip_broken
        self.skipped: set[str] = set()  # videos skipped by this process

    def transform(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """Add frames, masks, frame_names and objects (see `transforms`), or return None to skip the video."""
        path = results["img_path"]
        try:
            results.update(self._load(Path(path), results.pop("source")))
        except DatasetError as error:
            if not (self.skip_broken or isinstance(error, _NoClipError)):
                raise
            log_skipped(self.skipped, "videos", path, error)
            return None
        return results

    def _load(self, path: Path, source: MaskSource) -> dict[str, Any]:
        names = {_key(name): name for name in source.frames}
        images = (path,) if isinstance(source, CocoMasks) else list_frames(path)
        annotated = [(image, names[key]) for image in images if (key := _key(image.stem)) in names]
        window, first = self._draw(annotated, path, source)
        visible = [i for i, mask in first.items() if mask.any()]
        objects = [visible[i] for i in np.random.permutation(len(visible))[: self.max_objects]]
        frames: list[np.ndarray] = []
        masks: list[np.ndarray] = []
        for t, (image, name) in enumerate(window):
            frame = read_rgb(image)
            by_id = source.read(name) if t else first
            size = frame.shape[:2]
            others = [(source.where(name), mask.shape) for mask in by_id.values()]
            others += [(str(window[0][0]), before.shape[:2]) for before in frames[:1]]
            for other, (h, w) in others:
                if (h, w) != size:
                    sizes = f"{image} is {size[0]}x{size[1]} (height x width) but {other} is {h}x{w}"
                    raise DatasetError(f"{sizes}; resize the frames of a video and their masks to one size")
            absent = np.zeros(size, bool)
            masks.append(np.stack([by_id.get(i, absent) for i in objects]))
            frames.append(frame)
        names_in_clip = [image.stem for image, _ in window]
        return dict(frames=frames, masks=np.stack(masks, axis=1), frame_names=names_in_clip, objects=objects)

    def _draw(
        self, annotated: Sequence[tuple[Path, str]], path: Path, source: MaskSource
    ) -> tuple[list[tuple[Path, str]], Mapping[int, np.ndarray]]:
        """Draw a window, and return it with the masks of its first frame."""
        if len(annotated) < self.num_frames:
            raise _NoClipError(f"{path} has {len(annotated)} frames with masks, but a clip needs {self.num_frames}")
        for start in np.random.permutation(len(annotated) - self.num_frames + 1):
            window = list(annotated[start : start + self.num_frames])
            if np.random.rand() < self.reverse_prob:
                window.reverse()
            first = source.read(window[0][1])
            if any(mask.any() for mask in first.values()):
                return window, first
        raise _NoClipError(f"{path} has no window of {self.num_frames} frames with an object in the first one")


class _NoClipError(DatasetError):
    """The video is intact but has no clip of the required length."""


def _key(stem: str) -> int | str:
    return int(stem) if stem.isdecimal() else stem


register_step("LoadClip", lambda step: dict(frames=step["num_frames"], objects=step["max_objects"]))
