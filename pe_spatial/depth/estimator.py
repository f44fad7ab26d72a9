"""A depth estimator: encoder, depth head, padding, sliding windows, flips and losses."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
from pe_spatial.encoder.lora import has_adapters
from pe_spatial.errors import ConfigError, one_of
from pe_spatial.planning.registry import register_example, total_loss

from .heads import resize

LAYERS = {"last": (1.0,), "even": (1 / 4, 2 / 4, 3 / 4, 1.0), "late": (5 / 8, 6 / 8, 7 / 8, 1.0)}
"""Name -> the blocks that a head reads, as fractions of the depth; 'even' is [12, 24, 37, 49] in PE-Spatial-G."""


def named_layers(name: str, depth: int) -> list[int]:
    """Return the blocks, 0-based, of a name in `LAYERS` for an encoder of `depth` blocks.

    They are rounded up, so that the last block is always read; the usual i * (n // 4) - 1 misses the last of 50 blocks.
    """
    if name not in LAYERS:
        raise ConfigError(f"out_indices is {name!r}; allowed are block numbers and {', '.join(map(repr, LAYERS))}")
    return [math.ceil(part * depth) - 1 for part in LAYERS[name]]


# MMSegmentation has its own DepthEstimator, which its scope would find first.
@MODELS.register_module(name="PEDepthEstimator")
class DepthEstimator(BaseModel):
    """Metric depth from one image: any backbone of the registries, a depth head, a list of losses.

    If the sides of an image are not multiples of the encoder's patch, it is padded with zeros on all sides, and the
    padding is cropped from the prediction (DINOv2 resizes the padded prediction instead).

    Args:
        backbone: config of the encoder. `out_indices` may be a name in `LAYERS`, so that layers follow the variant.
        decode_head: config of `BinsDepthHead` or `DPTDepthHead`; `in_channels` follows from the encoder, and is only
            given for backbones without `embed_dim`.
        losses: configs of modules (pred (B, 1, H, W), target (B, 1, H, W), 0 = missing) -> scalar; they are summed.
        frozen: keep the backbone in evaluation mode and without autograd, but for adapters if it has `lora`.
        test_cfg: `mode` 'whole' or 'slide' (with `crop_size` and `stride`, (h, w) in pixels: windows, averaged where
            they overlap), `flip` True to average with the prediction of the mirrored image.
        data_preprocessor: config of `DepthPreprocessor`.
    """

    def __init__(
        self, backbone: Mapping[str, Any], decode_head: Mapping[str, Any], *, losses: Sequence[Mapping[str, Any]],
        frozen: bool = True, test_cfg: Mapping[str, Any] | None = None,
        data_preprocessor: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(data_preprocessor)
        self.backbone: Any = _build_backbone(backbone)
        self.decode_head = _build_head(decode_head, self.backbone)
        self.losses = nn.ModuleList(MODELS.build(cfg) for cfg in losses)
        self.frozen = frozen and not has_adapters(self.backbone)
        self.test_cfg = _checked_test_cfg(**(test_cfg or {}))
        if self.frozen:
            self.backbone.requires_grad_(False)

    def train(self, mode: bool = True) -> DepthEstimator:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def forward(
        self, inputs: Tensor, data_samples: Sequence[SegDataSample] | None = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[SegDataSample]:
        """Run mmengine's 'loss', 'predict' or 'tensor' on normalized `inputs` (B, 3, H, W).

        'predict' returns samples with pred_depth_map (1, h, w) in meters, at the size of the image before it was
        resized (`ori_shape`); 'tensor' returns the depth (B, 1, H, W) of the complete image, as in training.
        """
        if mode == "loss":
            return self.loss(inputs, data_samples)  # type: ignore[arg-type]
        if mode == "predict":
            return self.predict(inputs, data_samples)
        one_of("mode", mode, ("tensor", "loss", "predict"))
        return self.depth(inputs)

    def loss(self, inputs: Tensor, data_samples: Sequence[SegDataSample]) -> dict[str, Tensor]:
        target = torch.stack([sample.gt_depth_map.data for sample in data_samples])
        depth = self.depth(inputs)
        return {f"loss_{i}_{type(loss).__name__}": loss(depth, target) for i, loss in enumerate(self.losses)}

    def predict(self, inputs: Tensor, data_samples: Sequence[SegDataSample] | None = None) -> list[SegDataSample]:
        samples = data_samples or [SegDataSample() for _ in inputs]
        for depth, sample in zip(self.infer(inputs), samples, strict=True):
            h, w = sample.get("img_shape", inputs.shape[-2:])
            depth = resize(depth[None, :, :h, :w], sample.get("ori_shape", (h, w))[:2])
            sample.pred_depth_map = PixelData(data=depth[0])
        return list(samples)

    def infer(self, inputs: Tensor) -> Tensor:
        """Predict depth (B, 1, H, W), within the range of the head, with the windows and flips of `test_cfg`."""
        if self.test_cfg["mode"] == "whole":
            return self._view(inputs)
        (h, w), (dy, dx) = self.test_cfg["crop_size"], self.test_cfg["stride"]
        total, count = inputs.new_zeros(inputs.shape[0], 1, *inputs.shape[-2:]), inputs.new_zeros(inputs.shape[-2:])
        for y, x in product(_starts(inputs.shape[-2], h, dy), _starts(inputs.shape[-1], w, dx)):
            window = (..., slice(y, y + h), slice(x, x + w))
            total[window] += self._view(inputs[window])
            count[window] += 1
        return total / count

    def _view(self, inputs: Tensor) -> Tensor:
        depth = self.depth(inputs, clamp=True)
        return (depth + self.depth(inputs.flip(-1), clamp=True).flip(-1)) / 2 if self.test_cfg["flip"] else depth

    def depth(self, inputs: Tensor, *, clamp: bool = False) -> Tensor:
        """(B, 3, H, W), normalized -> depth (B, 1, H, W) in float32.

        `clamp` limits it to the range of the head, before it is resized, as in dinov2@b8931f7; training does without,
        because clamped pixels have no gradient.
        """
        (h, w), patch = inputs.shape[-2:], getattr(self.backbone, "patch_size", 1)
        top, left = -h % patch // 2, -w % patch // 2
        images = F.pad(inputs, (left, -w % patch - left, top, -h % patch - top))
        depth = self.decode_head(*self._encode(images)).float()
        if clamp:
            depth = depth.clamp(self.decode_head.min_depth, self.decode_head.max_depth)
        return resize(depth, images.shape[-2:])[..., top : top + h, left : left + w]

    def _encode(self, images: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            if self.decode_head.token == "class":
                return self.backbone.forward_with_class_tokens(images)
            return self.backbone(images), ()


def _build_backbone(cfg: Mapping[str, Any]) -> nn.Module:
    layers = cfg.get("out_indices")
    if isinstance(layers, str):
        if "variant" not in cfg:
            raise ConfigError(f"out_indices is {layers!r}, but {cfg['type']} has no variant; give block numbers")
        with torch.device("meta"):  # for the number of blocks
            encoder = MODELS.build(dict(type=cfg["type"], variant=cfg["variant"], out_indices=[0]))
        cfg = {**cfg, "out_indices": named_layers(layers, encoder.config.depth)}
    return MODELS.build(cfg)


def _build_head(cfg: Mapping[str, Any], backbone: Any) -> nn.Module:
    width = getattr(backbone, "embed_dim", None)
    if isinstance(width, int):
        if "in_channels" in cfg:
            raise ConfigError("decode_head.in_channels follows from the encoder; remove it")
        cfg = {**cfg, "in_channels": [width] * len(backbone.out_indices)}
    elif "in_channels" not in cfg:
        raise ConfigError(f"{type(backbone).__name__} has no embed_dim; give decode_head.in_channels")
    head = MODELS.build(cfg)
    if head.token == "class" and not (hasattr(backbone, "forward_with_class_tokens") and backbone.num_prefix_tokens):
        name = getattr(backbone, "variant", None) or type(backbone).__name__
        raise ConfigError(f"{name} has no class token; set decode_head.token to 'mean' (of the patches) or None")
    return head


def _checked_test_cfg(
    mode: str = "whole", *, flip: bool = False, crop_size: Sequence[int] = (), stride: Sequence[int] = ()
) -> dict[str, Any]:
    one_of("test_cfg.mode", mode, ("whole", "slide"))
    windows = crop, step = tuple(crop_size or ()), tuple(stride or ())
    if mode == "slide" and not all(len(v) == 2 and min(v) > 0 for v in windows):
        raise ConfigError(f"crop_size and stride are {crop} and {step}; mode 'slide' needs both, (h, w) in pixels")
    if mode == "slide" and (step[0] > crop[0] or step[1] > crop[1]):
        raise ConfigError(f"test_cfg.stride {stride} exceeds crop_size {crop_size}, which would omit pixels")
    if mode == "whole" and any(windows):
        raise ConfigError("test_cfg.crop_size and stride need mode 'slide'; set it, or remove them")
    return dict(mode=mode, flip=flip, crop_size=crop, stride=step)


def _starts(size: int, window: int, stride: int) -> list[int]:
    """Return where windows start along one side; the last one ends at its end, and a short side has one."""
    last = max(size - window, 0)
    return [*range(0, last, stride), last]


@register_example(DepthEstimator, counted="backbone, depth head and losses")
def _planned_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:  # noqa: ARG001
    samples = [SegDataSample(gt_depth_map=PixelData(data=image[:1])) for image in images]
    return total_loss(model, inputs=images, data_samples=samples)
