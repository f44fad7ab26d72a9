"""A trained detector in the form that `export` writes."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from mmdet.models.detectors import SingleStageDetector
from mmdet.models.detectors.base_detr import DetectionTransformer

from pe_spatial.detection.deta.detector import DETA
from pe_spatial.encoder.backbone import PerceptionEncoderPyramid
from pe_spatial.engine.nodes import type_name
from pe_spatial.errors import ConfigError
from pe_spatial.export.deta import DETAGraph
from pe_spatial.export.detections import DetectorGraph
from pe_spatial.export.encoder import encoder_facts
from pe_spatial.export.graph import Exportable
from pe_spatial.export.one_stage import OneStageGraph
from pe_spatial.export.pixels import Pixels, scaled_size, size_of_short_side
from pe_spatial.export.suppression import translations
from pe_spatial.export.transformer import TransformerGraph
from pe_spatial.export.two_stage import TwoStageGraph


def detector_graph(predictor: Any, *, source: str = "") -> Exportable:
    """Return a detector to export.

    Args:
        predictor: what `pe_spatial.load` returns for a detector.
        source: where the weights came from.

    Raises ConfigError for parts of a model or of its test pipeline that a graph does not write.
    """
    model = predictor.model
    square = isinstance(model, DETA)
    pixels, resizing = pixels_of(model.data_preprocessor, predictor.pipeline.transforms, square=square)
    graph = graph_of(model, pixels)
    side = pixels.multiple
    backbone = model.backbone
    facts = encoder_facts(backbone.encoder) if isinstance(backbone, PerceptionEncoderPyramid) else {}
    exportable = exportable_of(graph)
    exportable.class_names = predictor.class_names
    exportable.model = facts | dict(type=type(model).__name__, source=source, pad_to=side) | resizing
    exportable.options = dict(canvas=side, resizing=resizing) if square else {}
    return exportable


def graph_of(model: Any, pixels: Pixels) -> DetectorGraph:
    """Return the graph of a detector; ConfigError for one that is not written here."""
    if isinstance(model, DETA):
        return DETAGraph(model, pixels)
    if hasattr(model, "roi_head"):
        return TwoStageGraph(model, pixels)
    if isinstance(model, DetectionTransformer):
        return TransformerGraph(model, pixels)
    if isinstance(model, SingleStageDetector) and hasattr(model, "bbox_head"):
        return OneStageGraph(model, pixels)
    raise ConfigError(f"a {type(model).__name__} is not exported; detectors with a bbox_head or an roi_head are")


def exportable_of(graph: DetectorGraph) -> Exportable:
    """Return a graph to export, of any batch and any size."""
    side = graph.pixels.multiple
    # levels of several cells, since the tracer takes a size of one for a constant; a canvas has them
    least = (0, 0) if graph.pixels.square else (2 * graph.coarsest + 44, 3 * graph.coarsest + 36)
    size = max(side - 20, 48, least[0]), max(side - 36, 40, least[1])
    return Exportable(
        module=graph,
        task="detection",
        inputs={"pixels": torch.randint(0, 256, (2, *size, 3), dtype=torch.uint8)},
        dynamic={"pixels": {0: "batch", 1: "height", 2: "width"}},
        outputs=graph.outputs(),
        stages=graph.stages(),
        translations=translations(),
    )


def pixels_of(processor: Any, transforms: Any, *, square: bool = False) -> tuple[Pixels, dict[str, Any]]:
    """Return the preprocessing of a model and of its test pipeline, and how it resizes.

    ConfigError for a step that is not written here.
    """
    size: Any = None
    pillow, resizing = False, dict[str, Any]()
    for step in transforms:
        kind = type_name(step) if isinstance(step, dict) else type(step).__name__
        if kind == "Resize" and step.keep_ratio and step.interpolation == "bilinear":
            resizing = dict(scale=(max(step.scale), min(step.scale)))
            size, pillow = partial(scaled_size, **resizing), step.backend == "pillow"
        elif kind == "ShortSideResize" and len(step.short_sides) == 1:
            limit = None if math.isinf(step.max_long_side) else step.max_long_side
            resizing = dict(short_side=step.short_sides[0], max_long_side=limit)
            size, pillow = partial(size_of_short_side, **resizing), True
        elif not kind.startswith(("Pack", "Load")):
            raise ConfigError(f"the test pipeline has a {kind}, which is not exported; a Resize(keep_ratio=True) is")
    batch = getattr(processor, "batch_augments", None)
    if batch:
        raise ConfigError(f"the data_preprocessor has {type(batch[0]).__name__}, which is not exported")
    normalized = getattr(processor, "_enable_normalize", False)
    pixels = Pixels(
        processor.mean.flatten().tolist() if normalized else [0.0] * 3,
        processor.std.flatten().tolist() if normalized else [1.0] * 3,
        bgr=not processor._channel_conversion,  # OpenMMLab's images are B, G, R until here
        multiple=processor.pad_size_divisor,
        square=square,
        pad_value=processor.pad_value,
        size=size,
        pillow=pillow,
    )
    return pixels, resizing
