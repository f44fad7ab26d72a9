"""Predictors of detectors and segmenters: images in, results in pixels of the original images out."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

from pe_spatial.engine.configs import as_config_error
from pe_spatial.engine.weights import load_weights
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.predict.inputs import ImageLike, read_image
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.models import find_meta, task_of, test_dataset, without_loading
from pe_spatial.predict.results import Detections, SegmentationMap
from pe_spatial.predict.streaming import Streamed
from pe_spatial.predict.tiles import choose_tile, merge_tiles, tile_corners

if TYPE_CHECKING:
    from pe_spatial.language.model import PECore
    from pe_spatial.predict.words import NamedPredictor

warnings.filterwarnings("ignore", "To copy construct from a tensor", UserWarning, "mmdet")  # cascades do, harmlessly


class Predictor(Streamed):
    """A trained model in torch that takes images and returns results."""

    def __init__(self, model: Any, *, device: str, dtype: torch.dtype | None = None, compile: bool = False) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        if compile:
            getattr(model, "module", model).backbone.compile()  # a module is inside of test-time augmentation

    def _precision(self) -> AbstractContextManager[Any]:
        return torch.autocast(torch.device(self.device).type, self.dtype) if self.dtype else nullcontext()


class OpenMMLabPredictor(Predictor):
    """A predictor whose model is OpenMMLab's: images pass the config's test pipeline without its loading steps."""

    def __init__(self, model: Any, pipeline: Sequence[Any], meta: dict[str, Any], **options: Any) -> None:
        super().__init__(model, **options)
        self.pipeline, self.meta = Compose(pipeline), meta
        self.class_names = tuple(meta["classes"])

    def _prepare(self, rgb: np.ndarray) -> dict[str, Any]:
        size = rgb.shape[:2]
        bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR)
        given = dict(img=bgr, img_shape=size, ori_shape=size, height=size[0], width=size[1], img_id=0, img_path=None)
        try:
            item = self.pipeline(dict(given, seg_fields=[]))
        except cv2.error as error:
            raise DatasetError(
                f"an image of {size[1]}x{size[0]} pixels does not survive the config's test pipeline "
                f"({error.err or error}); crop or pad it to a usual shape"
            ) from error
        return item

    def _shape(self, item: dict[str, Any]) -> Any:
        inputs = item["inputs"] if isinstance(item["inputs"], list) else [item["inputs"]]
        processor = getattr(self.model, "module", self.model).data_preprocessor  # in test-time augmentation
        divisor = getattr(processor, "pad_size_divisor", 1)
        return [tuple(-(-side // divisor) for side in view.shape) for view in inputs]

    @torch.inference_mode()
    def _predict(self, items: Sequence[dict[str, Any]]) -> list[Any]:
        with self._precision():
            samples = self.model.test_step(pseudo_collate(items))
        return [self._result(sample) for sample in samples]

    def _result(self, sample: Any) -> Any:
        raise NotImplementedError


MAX_MASK_PIXELS = 2**26
"""The largest image in which masks are detected: a detector writes all of them out, 100 in 6.7 GB."""


class ObjectPredictor(Predictor):
    """Finds objects; `score` is the lowest score that is returned.

    `words` is the PE-Core that names regions, if there is one.
    """

    score: float
    words: PECore | None = None

    @cached_property
    def _named(self) -> dict[Any, NamedPredictor]:
        return {}

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], *, batch_size: int = 1, classes: Sequence[str] | None = None,
        by: str = "tokens",
    ) -> Any:  # fmt: skip
        """Return the results; with `classes` (words), proposals of the detector under these names.

        `by` is 'tokens' or 'crops', as in `RegionClassifier`.
        """
        if classes is not None:
            return self.named(classes, by=by)(images, batch_size=batch_size)
        return super().__call__(images, batch_size=batch_size)

    def named(
        self, classes: Sequence[str], *, by: str = "tokens", background: Sequence[str] = (), proposals: bool = True
    ) -> NamedPredictor:
        """Return a predictor with other classes, which are words.

        Args:
            classes: names or phrases.
            by: 'tokens' or 'crops', as in `RegionClassifier`.
            background: phrases that compete; what is one of them is dropped.
            proposals: name the detector's class-agnostic proposals; otherwise its detections.

        Raises ConfigError without a PE-Core, for equal names, and for a detector without proposals.
        """
        from pe_spatial.language.regions import RegionClassifier
        from pe_spatial.predict.words import NamedPredictor

        if self.words is None:
            raise ConfigError("words need a PE-Core; load the detector with words='PE-Core-L14-336', or a file of one")
        key = (tuple(classes), by, tuple(background), proposals)
        if key not in self._named:
            classifier = RegionClassifier(self.words, classes, by=by, background=background)
            self._named[key] = NamedPredictor(self, classifier, proposals=proposals)
        return self._named[key]

    def _propose(self, items: Sequence[Any], images: Sequence[np.ndarray]) -> list[Detections]:
        """Return class-agnostic objects of prepared images."""
        raise NotImplementedError


class DetectionPredictor(ObjectPredictor, OpenMMLabPredictor):
    """Boxes and, where the model has them, masks."""

    task = "detection"

    def __init__(self, *args: Any, score: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.score = score

    def _propose(self, items: Sequence[Any], images: Sequence[np.ndarray]) -> list[Detections]:
        from pe_spatial.predict.words import propose

        return propose(self, items, images)

    def _prepare(self, rgb: np.ndarray) -> dict[str, Any]:
        height, width = rgb.shape[:2]
        if height * width > MAX_MASK_PIXELS and getattr(self.model, "with_mask", False):
            raise DatasetError(
                f"an image of {width}x{height} pixels is too large for the masks of all its objects; detect in tiles "
                "(--tile; in Python: tiled())"
            )
        return super()._prepare(rgb)

    def tiled(
        self, image: ImageLike, *, tile: int | None = None, overlap: int | None = None, batch_size: int = 1
    ) -> Detections:
        """Detect in overlapping square tiles of an image; memory depends on the tile and not on the image.

        Args:
            tile: side in pixels, a multiple of the attention windows; None is the side that the model gets anyway.
            overlap: smallest overlap of neighboring tiles, at best the size of the largest object; None is a quarter.
            batch_size: number of tiles per forward pass.

        Raises ConfigError for other sides.
        """
        tile, overlap = self.choose_tiles(tile, overlap)
        rgb = read_image(image)
        size = rgb.shape[0], rgb.shape[1]
        corners = tile_corners(size, tile, overlap)
        parts: Any = self.stream((rgb[y : y + tile, x : x + tile] for y, x in corners), batch_size=batch_size)
        return merge_tiles(parts, corners, size, self.class_names)

    def choose_tiles(self, tile: int | None = None, overlap: int | None = None) -> tuple[int, int]:
        """Return the side and the overlap that `tiled` uses; ConfigError for impossible ones."""
        tile = choose_tile(getattr(self.model, "module", self.model), self.pipeline, tile)
        overlap = tile // 4 if overlap is None else overlap
        if not 0 <= overlap < tile:
            raise ConfigError(f"the overlap is {overlap}; tiles of {tile} pixels allow 0 to {tile - 1}")
        return tile, overlap

    def _result(self, sample: Any) -> Detections:
        from mmdet.structures.bbox import get_box_tensor

        if "pred_instances" not in sample:
            raise ConfigError(f"a {type(self.model).__name__} predicts no objects; give a detector")
        found = sample.pred_instances
        if self.score > 0:
            found = found[found.scores >= self.score]
        number, names = int(found.labels.max()) + 1 if len(found) else 0, len(self.class_names)
        if number > names:
            raise ConfigError(
                f"the model has {number} classes or more, and {names} have names; give all as class_names"
            )
        masks = found.get("masks")
        return Detections(
            boxes=get_box_tensor(found.bboxes).float().cpu().numpy().reshape(-1, 4),
            scores=found.scores.float().cpu().numpy(),
            labels=found.labels.long().cpu().numpy(),
            class_names=self.class_names,
            image_size=tuple(sample.ori_shape[:2]),
            crops=None if masks is None else tuple(MaskCrop.cut(np.asarray(mask)) for mask in _on_cpu(masks)),
        )


class SegmentationPredictor(OpenMMLabPredictor):
    """The class of each pixel."""

    task = "segmentation"

    def _result(self, sample: Any) -> SegmentationMap:
        if "pred_sem_seg" not in sample:
            raise ConfigError(f"a {type(self.model).__name__} predicts no classes of pixels; give a segmenter")
        labels = sample.pred_sem_seg.data[0].long().cpu().numpy()
        return SegmentationMap(labels=labels, class_names=self.class_names, palette=self.meta.get("palette"))


def build_predictor(
    cfg: Config, weights: str, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False,
    score: float = 0.0, tta: bool = False, class_names: Sequence[str] | None = None,
    words: str | Path | PECore | None = None,
) -> OpenMMLabPredictor:  # fmt: skip
    """Build the predictor of a detector or a segmenter; the arguments are those of `pe_spatial.load`."""
    task = task_of(cfg)
    scope = "mmdet" if task == "detection" else "mmseg"
    if score and task != "detection":
        raise ConfigError("score is for detectors, and this is a segmenter; omit it")
    if words is not None and task != "detection":
        raise ConfigError("words are for detectors, and this is a segmenter; omit them")
    model_cfg, pipeline = cfg.model, test_dataset(cfg).pipeline
    if tta:
        missing = [name for name in ("tta_model", "tta_pipeline") if name not in cfg]
        if missing:
            raise ConfigError(f"the config has no {' and no '.join(missing)}, so there is no test-time augmentation")
        pipeline = cfg.tta_pipeline
    default_scope = DefaultScope.overwrite_default_scope(cfg.get("default_scope", scope))
    with as_config_error(cfg.filename or weights), default_scope, redirect_stdout(io.StringIO()):
        import_modules_from_strings([f"{scope}.models", f"{scope}.datasets.transforms"])  # they print
        model = MODELS.build(model_cfg)
        rest = load_weights(model, weights)
        meta = find_meta(cfg, rest)
        if tta:
            model = MODELS.build(ConfigDict(**cfg.tta_model, module=model))
        options: dict[str, Any] = dict(device=device, dtype=dtype or _test_dtype(cfg), compile=compile)
        if class_names is not None:
            meta = {"classes": tuple(class_names)}
        if not meta.get("classes"):
            raise ConfigError(f"neither {weights} nor its config names the classes; give them as class_names")
        arguments = (model.eval().to(device), without_loading(pipeline), meta)
        if task == "segmentation":
            return SegmentationPredictor(*arguments, **options)
        predictor = DetectionPredictor(*arguments, score=score, **options)
        predictor.words = load_words(words, device)
        return predictor


def load_words(words: str | Path | PECore | None, device: str) -> PECore | None:
    """Return a PE-Core on a device, from its name or file."""
    if words is None:
        return None
    from pe_spatial.language.model import PECore

    model = PECore.from_pretrained(words) if isinstance(words, str | Path) else words
    return model.eval().to(device)


def _test_dtype(cfg: Config) -> torch.dtype | None:
    """Return the precision in which a test of the config computes."""
    return torch.float16 if (cfg.get("test_cfg") or {}).get("fp16") else None


def _on_cpu(masks: Any) -> Any:
    return masks.cpu() if isinstance(masks, torch.Tensor) else masks
