"""A trained detector in the form that `export` writes."""

from __future__ import annotations

from typing import Any

import torch

from pe_spatial.encoder.backbone import PerceptionEncoderPyramid
from pe_spatial.engine.nodes import type_name
from pe_spatial.errors import ConfigError
from pe_spatial.export.encoder import encoder_facts
from pe_spatial.export.graph import Exportable
from pe_spatial.export.pixels import Pixels
from pe_spatial.export.suppression import translations
from pe_spatial.export.two_stage import TwoStageGraph


def detector_graph(predictor: Any, *, source: str = "") -> Exportable:
    """Return a detector to export.

    Args:
        predictor: what `pe_spatial.load` returns for a detector.
        source: where the weights came from.

    Raises ConfigError for parts of a model or of its test pipeline that a graph does not write.
    """
    model = predictor.model
    pixels = pixels_of(model.data_preprocessor, predictor.pipeline.transforms)
    graph = TwoStageGraph(model, pixels)
    side = pixels.multiple
    backbone = model.backbone
    facts = encoder_facts(backbone.encoder) if isinstance(backbone, PerceptionEncoderPyramid) else {}
    example = torch.randint(0, 256, (2, max(side - 20, 48), max(side - 36, 40), 3), dtype=torch.uint8)
    return Exportable(
        module=graph,
        task="detection",
        inputs={"pixels": example},
        dynamic={"pixels": {0: "batch", 1: "height", 2: "width"}},
        outputs=graph.outputs(),
        stages=graph.stages(),
        class_names=predictor.class_names,
        model=facts | dict(type=type(model).__name__, source=source, scale=pixels.scale, pad_to=pixels.multiple),
        translations=translations(),
    )


def pixels_of(processor: Any, transforms: Any) -> Pixels:
    """Return the preprocessing of a model and of its test pipeline; ConfigError for a step that is not written here."""
    scale: Any = None
    pillow = False
    for step in transforms:
        kind = type_name(step) if isinstance(step, dict) else type(step).__name__
        if kind == "Resize" and step.keep_ratio and step.interpolation == "bilinear":
            scale, pillow = step.scale, step.backend == "pillow"
        elif not kind.startswith(("Pack", "Load")):
            raise ConfigError(f"the test pipeline has a {kind}, which is not exported; a Resize(keep_ratio=True) is")
    batch = getattr(processor, "batch_augments", None)
    if batch:
        raise ConfigError(f"the data_preprocessor has {type(batch[0]).__name__}, which is not exported")
    normalized = getattr(processor, "_enable_normalize", False)
    return Pixels(
        processor.mean.flatten().tolist() if normalized else [0.0] * 3,
        processor.std.flatten().tolist() if normalized else [1.0] * 3,
        bgr=not processor._channel_conversion,  # OpenMMLab's images are B, G, R until here
        multiple=processor.pad_size_divisor,
        pad_value=processor.pad_value,
        scale=scale,
        pillow=pillow,
    )
