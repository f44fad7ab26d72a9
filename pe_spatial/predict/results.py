"""What a predictor returns: small typed objects in pixels of the original image. Importing it needs no torch.

N detections, H x W pixels. Boxes are x0, y0, x1, y1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pe_spatial.errors import ConfigError, DatasetError, listed
from pe_spatial.predict.inputs import ImageLike, read_image
from pe_spatial.predict.masks import MaskCrop

if TYPE_CHECKING:
    import supervision


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """Objects in an image, in the order of the model (most detectors: highest score first).

    Args:
        boxes: (N, 4) float32.
        scores: (N,) float32, from 0 to 1.
        labels: (N,) int64, index of the class in `class_names`.
        class_names: names of all classes.
        image_size: (H, W).
        crops: the mask of each object, or None for models without masks.
    """

    boxes: np.ndarray
    scores: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    crops: tuple[MaskCrop, ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """The class of each detection."""
        return [self.class_names[label] for label in self.labels]

    @property
    def masks(self) -> np.ndarray | None:
        """The masks as (N, H, W) bool, written out at each call; `crops` take less memory."""
        if self.crops is None:
            return None
        return np.stack([crop.full(self.image_size) for crop in self.crops] or [np.zeros((0, *self.image_size), bool)]
                        ).reshape(-1, *self.image_size)  # fmt: skip

    def select(self, index: Any) -> Detections:
        """Return the detections of an index: booleans (N,), or numbers in any order."""
        numbers = np.arange(len(self))[index]
        crops = None if self.crops is None else tuple(self.crops[i] for i in numbers)
        arrays = dict(boxes=self.boxes[numbers], scores=self.scores[numbers], labels=self.labels[numbers])
        return replace(self, **arrays, crops=crops)

    def filter(self, *, score: float = 0.0, classes: Sequence[str] | None = None) -> Detections:
        """Return the detections with at least a score, and of some classes; ConfigError for an unknown class."""
        keep = self.scores >= score
        if classes is not None:
            keep &= np.isin(self.labels, class_labels(classes, self.class_names))
        return self if keep.all() else self.select(keep)

    def to_coco(self, image_id: int = 0, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: image_id, category_id, bbox (x, y, width, height), score and segmentation (RLE).

        A category's id is its label + 1, unless `category_ids` has one for each class.
        """
        ids = category_ids or range(1, len(self.class_names) + 1)
        results: list[dict[str, Any]] = []
        for i in range(len(self)):
            x0, y0, x1, y1 = map(float, self.boxes[i])
            one: dict[str, Any] = dict(image_id=image_id, category_id=ids[self.labels[i]])
            one |= dict(bbox=[x0, y0, x1 - x0, y1 - y0], score=float(self.scores[i]))
            results.append(one | ({"segmentation": self.crops[i].rle(self.image_size)} if self.crops else {}))
        return results

    def to_supervision(self) -> supervision.Detections:
        """Return `supervision.Detections`; ImportError without that package."""
        names = dict(class_name=np.array(self.names, dtype=str))
        return _supervision().Detections(
            xyxy=self.boxes, mask=self.masks, confidence=self.scores, class_id=self.labels, data=names
        )

    def draw(self, image: ImageLike) -> np.ndarray:
        """Return the image with boxes, masks, classes and scores, (H, W, 3) uint8 RGB."""
        from pe_spatial.predict import drawing

        rgb = _checked(image, self.image_size)
        texts = [f"{name} {score:.2f}" for name, score in zip(self.names, self.scores, strict=True)]
        return drawing.draw_objects(rgb, self.boxes, self.labels.tolist(), texts, self.crops)


@dataclass(frozen=True, eq=False, kw_only=True)
class SegmentationMap:
    """The class of each pixel.

    Args:
        labels: (H, W) int64, index of the class in `class_names`.
        class_names: names of all classes.
        palette: (R, G, B) of each class; None for colors of our own.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    palette: Sequence[Sequence[int]] | None = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.labels.shape

    @cached_property
    def present(self) -> list[int]:
        """The labels of the classes that have pixels."""
        return [int(label) for label in np.unique(self.labels) if label < len(self.class_names)]

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return results of COCO-Stuff: one segmentation (RLE) for each class; category_id is its label + 1."""
        parts = [(label, MaskCrop.cut(self.labels == label).rle(self.image_size)) for label in self.present]
        return [dict(image_id=image_id, category_id=label + 1, segmentation=rle) for label, rle in parts]

    def to_supervision(self) -> supervision.Detections:
        """Return `supervision.Detections` with one mask for each class; ImportError without that package."""
        crops = [MaskCrop.cut(self.labels == label) for label in self.present]
        masks = np.array([self.labels == label for label in self.present]).reshape(-1, *self.image_size)
        names = dict(class_name=np.array([self.class_names[label] for label in self.present], dtype=str))
        boxes = np.array([crop.box for crop in crops], np.float32).reshape(-1, 4)
        return _supervision().Detections(xyxy=boxes, mask=masks, class_id=np.array(self.present, int), data=names)

    def draw(self, image: ImageLike) -> np.ndarray:
        """Return the image under the half transparent colors of its classes, (H, W, 3) uint8 RGB."""
        from pe_spatial.predict import drawing

        return drawing.draw_labels(_checked(image, self.image_size), self.labels, self.class_names, self.palette)


@dataclass(frozen=True, eq=False, kw_only=True)
class DepthMap:
    """The depth of each pixel.

    Args:
        depth: (H, W) float32, in meters if `quantity` says so.
        quantity: 'meter'; 'relative depth' or 'relative disparity' for models trained up to scale and shift.
    """

    depth: np.ndarray
    quantity: str = "meter"

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W)."""
        return self.depth.shape

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:  # noqa: ARG002  (as all results)
        """Return no annotations: depth has no objects."""
        return []

    def draw(self, image: ImageLike | None = None, *, colors: str = "Spectral") -> np.ndarray:
        """Return the depth as colors between its 2nd and 98th percentile, (H, W, 3) uint8 RGB.

        The `image` is not needed; it is checked for its size, so that all results are drawn by the same call.
        """
        from pe_spatial.depth.outputs import depth_range, draw_depth

        if image is not None:
            _checked(image, self.image_size)
        return draw_depth(self.depth, depth_range(self.depth, (2, 98)) or (0.0, 1.0), colors)


@dataclass(frozen=True, eq=False, kw_only=True)
class Tracks:
    """Objects through a video.

    Args:
        frames: names of the frames.
        objects: for each frame, the mask of each object by its id, which is the same in all frames.
        image_size: (H, W).
    """

    frames: tuple[str, ...]
    objects: tuple[Mapping[int, MaskCrop], ...]
    image_size: tuple[int, int]

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def ids(self) -> list[int]:
        """The ids of all objects."""
        return sorted({i for crops in self.objects for i in crops})

    def masks(self, frame: int) -> dict[int, np.ndarray]:
        """Return the masks of a frame, object id -> (H, W) bool."""
        return {i: crop.full(self.image_size) for i, crop in self.objects[frame].items()}

    def to_coco(self, video_id: int = 0) -> list[dict[str, Any]]:
        """Return results of YouTube-VIS: for each object the segmentation (RLE) on every frame, None where it is not.

        `category_id` is 1 for all, and `score` 1: a tracker knows no classes.
        """
        results = []
        for i in self.ids:
            crops = [crops.get(i) for crops in self.objects]
            parts = [crop.rle(self.image_size) if crop is not None and crop.pixels.size else None for crop in crops]
            results.append(dict(video_id=video_id, id=i, category_id=1, score=1.0, segmentations=parts))
        return results

    def to_supervision(self) -> list[supervision.Detections]:
        """Return `supervision.Detections` of each frame, with `tracker_id`; ImportError without that package."""
        kind = _supervision().Detections
        frames = []
        for crops in self.objects:
            shown = {i: crop for i, crop in crops.items() if crop.pixels.size}
            masks = np.array([crop.full(self.image_size) for crop in shown.values()], bool)
            boxes = np.array([crop.box for crop in shown.values()], np.float32).reshape(-1, 4)
            ids = np.array([*shown], int)
            frames.append(kind(xyxy=boxes, mask=masks.reshape(-1, *self.image_size), class_id=ids, tracker_id=ids))
        return frames

    def draw(self, image: ImageLike, frame: int) -> np.ndarray:
        """Return the image of a frame with its masks, (H, W, 3) uint8 RGB."""
        from pe_spatial.predict import drawing

        crops = self.objects[frame]
        boxes = np.array([crop.box for crop in crops.values()], np.float32).reshape(-1, 4)
        rgb = _checked(image, self.image_size)
        return drawing.draw_objects(rgb, boxes, list(crops), [str(i) for i in crops], tuple(crops.values()))


@dataclass(frozen=True, eq=False, kw_only=True)
class TrackedFrame:
    """Tracked objects on one frame of a video.

    Args:
        objects: the mask of each object that is in the frame, by its id.
        image_size: (H, W).
    """

    objects: Mapping[int, MaskCrop]
    image_size: tuple[int, int]

    @property
    def crops(self) -> tuple[MaskCrop, ...]:
        """The masks in the order of the ids."""
        return tuple(self.objects[i] for i in sorted(self.objects))

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """Return COCO annotations with `track_id`; `category_id` is 1 for all, because a tracker knows no classes."""
        results = []
        for i, crop in zip(sorted(self.objects), self.crops, strict=True):
            x0, y0, x1, y1 = crop.box
            one = dict(image_id=image_id, category_id=1, track_id=i, bbox=[x0, y0, x1 - x0, y1 - y0])
            results.append({**one, "segmentation": crop.rle(self.image_size)})
        return results

    def draw(self, image: ImageLike) -> np.ndarray:
        """Return the image with its masks and ids, (H, W, 3) uint8 RGB."""
        one = Tracks(frames=("",), objects=(self.objects,), image_size=self.image_size)
        return one.draw(image, 0)


Result = Detections | SegmentationMap | DepthMap | Tracks


def class_labels(classes: Sequence[str], class_names: Sequence[str]) -> list[int]:
    """Return the labels of class names; ConfigError for one that the model does not have."""
    unknown = [name for name in classes if name not in class_names]
    if unknown:
        raise ConfigError(f"the model has no class {unknown[0]!r}; its classes are {listed(class_names, 20)}")
    return [i for i, name in enumerate(class_names) if name in classes]


def _checked(image: ImageLike, size: tuple[int, int]) -> np.ndarray:
    rgb = read_image(image)
    if rgb.shape[:2] != size:
        raise DatasetError(f"the image has {rgb.shape[:2]} pixels (height, width), the result {size}; give its image")
    return rgb


def _supervision() -> Any:
    try:
        import supervision
    except ModuleNotFoundError as error:
        raise ImportError("to_supervision needs supervision: pip install supervision", name="supervision") from error
    return supervision
