"""Depth estimators and segmenters as modules that can be exported: pixels in, a map of their size out.

Resizing to the size that the network wants, sliding windows, and resizing back are the runtime's, as they are the
predictor's; normalization, padding, flips and the range of depth are in the graph.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.engine.nodes import type_name
from pe_spatial.errors import ConfigError
from pe_spatial.export.encoder import encoder_facts
from pe_spatial.export.graph import Exportable


class DenseGraph(nn.Module):
    """A model that normalizes pixels in the graph, as its data preprocessor does."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        processor = model.data_preprocessor
        self.model = model
        self.bgr = not getattr(processor, "channel_conversion", getattr(processor, "_channel_conversion", False))
        for name in ("mean", "std"):
            self.register_buffer(name, getattr(processor, name).detach().clone().flatten().float(), persistent=False)

    def normalized(self, pixels: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, 3, H, W), as the network reads it."""
        images = pixels.float()
        if self.bgr:
            images = images.flip(-1)
        return ((images - self.mean) / self.std).permute(0, 3, 1, 2)


class DepthGraph(DenseGraph):
    """A `DepthEstimator` on a complete image or on a window, with its flips."""

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        """(B, H, W, 3) uint8 RGB -> depth (B, H, W)."""
        return (self.model._view(self.normalized(pixels))[:, 0],)


class LogitsGraph(DenseGraph):
    """An `EncoderDecoder` of MMSegmentation on a complete image or on a window."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.pooling = any(isinstance(part, nn.AdaptiveAvgPool2d) for part in model.decode_head.modules())
        if self.pooling:
            self.head = _with_average_pools(copy.deepcopy(model.decode_head))

    def forward(self, pixels: Tensor) -> tuple[Tensor]:
        """(B, H, W, 3) uint8 RGB -> logits (B, classes, H, W)."""
        head = self.head if self.pooling else self.model.decode_head
        logits = head(self.model.extract_feat(self.normalized(pixels)))
        size = pixels.shape[1:3]
        return (F.interpolate(logits, size, mode="bilinear", align_corners=self.model.align_corners),)


class AveragePool(nn.Module):
    """`nn.AdaptiveAvgPool2d` as two products, because ONNX files hold the cells of one size otherwise."""

    def __init__(self, size: Any) -> None:
        super().__init__()
        self.size = size if isinstance(size, tuple) else (size, size)  # None: as many cells as there are places

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, h, w)."""
        sides = zip(x.shape[2:], self.size, strict=True)
        rows, columns = (shares(length, cells or length).to(x) for length, cells in sides)
        return rows @ x @ columns.mT


def shares(length: int, cells: int) -> Tensor:
    """Return how much each of `length` places counts in the mean of each cell, (cells, length)."""
    cell, place = torch.arange(cells)[:, None], torch.arange(length)
    inside = (place >= cell * length // cells) & (place < ((cell + 1) * length + cells - 1) // cells)
    return inside / inside.sum(1, keepdim=True)


def _with_average_pools(module: nn.Module) -> nn.Module:
    """Exchange what averages over cells of a fixed number, in place."""
    for name, part in module.named_children():
        if isinstance(part, nn.AdaptiveAvgPool2d):
            setattr(module, name, AveragePool(part.output_size))
        else:
            _with_average_pools(part)
    return module


def depth_graph(predictor: Any, *, source: str = "") -> Exportable:
    """Return a depth estimator to export; `predictor` is what `pe_spatial.load` returns for it.

    Raises ConfigError for a step of the test pipeline, or a padding, that the runtime does not do.
    """
    model = predictor.model
    steps = [type_name(step) for step in predictor.estimator.steps]
    _check_pipeline([step for step in steps if not step.startswith("Pack")])
    if model.data_preprocessor.pad_size_divisor != 1:
        raise ConfigError("a pad_size_divisor of a depth estimator is not exported; remove it from data_preprocessor")
    options = dict(quantity=predictor.quantity, size=predictor.size, windows=_windows(model.test_cfg), scale=None)
    return _dense(DepthGraph(model), "depth", "depth", options, model, source)


def segmenter_graph(predictor: Any, *, source: str = "") -> Exportable:
    """Return a segmenter to export; `predictor` is what `pe_spatial.load` returns for it.

    Raises ConfigError for a step of the test pipeline, a padding or a head that the runtime does not do.
    """
    model, scale = predictor.model, None
    for step in predictor.pipeline.transforms:
        kind = type(step).__name__
        if kind == "Resize" and step.keep_ratio and step.backend == "cv2" and step.interpolation == "bilinear":
            scale = list(step.scale)
        elif not kind.startswith(("Pack", "Load")):
            _check_pipeline([kind])
    if getattr(model, "decode_head", None) is None or isinstance(model.decode_head, nn.ModuleList):
        raise ConfigError(f"a {type(model).__name__} is not exported; segmenters with one decode_head are")
    if model.out_channels == 1:
        raise ConfigError("a segmenter of one class with a threshold is not exported; train it with two classes")
    if model.data_preprocessor.test_cfg:
        raise ConfigError("padding of test images (data_preprocessor.test_cfg) is not exported; remove it")
    palette = predictor.meta.get("palette")
    options = dict(
        scale=scale, windows=_windows(model.test_cfg), palette=palette and [list(map(int, color)) for color in palette],
        align_corners=model.align_corners,
    )  # fmt: skip
    graph = _dense(LogitsGraph(model), "segmentation", "logits", options, model, source)
    graph.class_names = predictor.class_names
    return graph


def _dense(module: nn.Module, task: str, output: str, options: dict[str, Any], model: Any, source: str) -> Exportable:
    patch = getattr(model.backbone, "patch_size", 16)
    # grids of odd and different sides, so that nothing is special
    example = torch.randint(0, 256, (2, 7 * patch - 3, 5 * patch - 2, 3), dtype=torch.uint8)
    facts = encoder_facts(model.backbone) if isinstance(model.backbone, PerceptionEncoder) else {}
    return Exportable(
        module=module,
        task=task,
        inputs={"pixels": example},
        dynamic={"pixels": {0: "batch", 1: "height", 2: "width"}},
        outputs=[output],
        torch_minimum=2 * patch,
        model=facts | dict(type=type(model).__name__, source=source),
        options=options,
    )


def _windows(test_cfg: Any) -> dict[str, list[int]] | None:
    if test_cfg["mode"] == "whole":
        return None
    return dict(size=list(test_cfg["crop_size"]), stride=list(test_cfg["stride"]))


def _check_pipeline(steps: list[str]) -> None:
    if steps:
        raise ConfigError(
            f"the test pipeline has a {steps[0]}, which is not exported; a Resize(keep_ratio=True) of a segmenter is"
        )
