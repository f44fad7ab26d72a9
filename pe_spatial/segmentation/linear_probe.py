"""The linear probe of a frozen encoder for MMSegmentation: one layer, BatchNorm, one linear map.

In a config: `custom_imports = dict(imports=['pe_spatial.segmentation'])`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.registry import DATASETS, MODELS
from mmengine.structures import PixelData
from mmseg.datasets import ADE20KDataset
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.segmentors import EncoderDecoder
from mmseg.structures import SegDataSample
from torch import Tensor, nn

import pe_spatial.engine
import pe_spatial.integrations.openmmlab  # noqa: F401  (registers the encoders)
from pe_spatial.encoder.lora import has_adapters
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import is_hidden, open_image, read_size
from pe_spatial.planning.registry import register_example, total_loss


@MODELS.register_module()
class LinearProbe(EncoderDecoder):
    """A frozen encoder and a head on one of its layers; the width of the head follows from the encoder.

    The encoder runs in evaluation mode and without autograd; with `lora` its adapters train. Images are padded with
    zeros on all sides to multiples of the patch size, as in dinov2@7c503b3's evaluation: 512 px to 518 px for patches
    of 14.
    Its options are those of `EncoderDecoder`; `backbone.out_indices` has one block, `decode_head` no `in_channels`.
    """

    def _init_decode_head(self, decode_head: Mapping[str, Any]) -> None:
        layers = self.backbone.out_indices
        if len(layers) != 1:
            raise ConfigError(f"a linear probe reads one layer but out_indices is {layers}; give one, such as [-1]")
        if "in_channels" in decode_head:
            raise ConfigError("decode_head.in_channels follows from the encoder of a LinearProbe; remove it")
        self.frozen = not has_adapters(self.backbone)
        if self.frozen:
            self.backbone.requires_grad_(False)
        super()._init_decode_head({**decode_head, "in_channels": self.backbone.embed_dim})

    def train(self, mode: bool = True) -> LinearProbe:
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def extract_feat(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Normalized images (B, 3, H, W) -> a tuple of one map (B, C, ceil(H / p), ceil(W / p))."""
        h, w = (-side % self.backbone.patch_size for side in inputs.shape[-2:])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            return self.backbone(F.pad(inputs, (w // 2, w - w // 2, h // 2, h - h // 2)))


@MODELS.register_module()
class LinearProbeHead(BaseDecodeHead):
    """BatchNorm and a 1x1 convolution, resized to a fixed size.

    PE's appendix resizes the features. The logits are a linear function of them, so in evaluation resizing the logits
    gives the same at a tenth of the memory; in training the norm's statistics are those of the tokens.

    Args:
        in_channels: channels of the map.
        map_size: (h, w) to which the logits are resized (bilinearly) before MMSegmentation resizes them to the labels.
        options: options of `BaseDecodeHead`, such as `num_classes`.
    """

    def __init__(self, *, in_channels: int, map_size: Sequence[int] = (518, 518), **options: Any) -> None:
        super().__init__(in_channels, in_channels, **{"dropout_ratio": 0.0, **options})
        self.map_size = tuple(map_size)
        self.bn = nn.BatchNorm2d(in_channels)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """A sequence of one map (B, C, h, w) -> logits (B, classes, *map_size)."""
        logits = self.cls_seg(self.bn(maps[0]))
        return F.interpolate(logits, self.map_size, mode="bilinear", align_corners=self.align_corners)


@DATASETS.register_module()
class CheckedADE20KDataset(ADE20KDataset):
    """MMSegmentation's ADE20K that raises DatasetError for missing folders, images or label maps, and wrong labels.

    Each process checks a label map when it reads it for the first time. Hidden files are skipped.
    """

    def __init__(self, **options: Any) -> None:
        self._checked: set[str] = set()  # label maps, by this process
        super().__init__(**options)

    def prepare_data(self, idx: int) -> Any:
        entry = self.get_data_info(idx)
        path = entry["seg_map_path"]
        if path not in self._checked:
            classes = len(self.METAINFO["classes"])
            check_labels(path, entry["img_path"], classes=classes, skip_zero=self.reduce_zero_label)
            self._checked.add(path)
        return super().prepare_data(idx)

    def load_data_list(self) -> list[dict[str, Any]]:
        folders = [Path(self.data_prefix[key]) for key in ("img_path", "seg_map_path")]
        for folder in folders:
            if not folder.is_dir():
                raise DatasetError(f"there is no folder {folder}; check data_root (--data-root)")
        data = [one for one in super().load_data_list() if not is_hidden(Path(one["img_path"]), folders[0])]
        if not data:
            raise DatasetError(f"{folders[0]} contains no {self.img_suffix} images; check data_root (--data-root)")
        missing = [entry["seg_map_path"] for entry in data if not Path(entry["seg_map_path"]).is_file()]
        if missing:
            raise DatasetError(
                f"{len(missing)} of {len(data)} images in {folders[0]} have no label map (such as {missing[0]}); "
                "unpack the annotations again"
            )
        return data


def check_labels(path: str, image_path: str, *, classes: int, skip_zero: bool) -> None:
    """Raise DatasetError for a label map that is not one channel of labels in the size of its image.

    Labels are 0 to `classes` - 1, or with `skip_zero` 1 to `classes` and 0 for no label; 255 is no label.
    """
    try:
        with open_image(path) as image:
            labels = np.asarray(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise DatasetError(f"the label map {path} cannot be decoded ({error}); unpack the annotations again") from error
    if labels.ndim != 2:
        raise DatasetError(f"{path} has {labels.shape[2]} channels; a label map has one, with labels instead of colors")
    size = read_size(image_path)
    if labels.shape != size:
        raise DatasetError(
            f"{path} is {labels.shape[0]}x{labels.shape[1]} (height x width) but {image_path} is {size[0]}x{size[1]}; "
            "give label maps of the size of their images"
        )
    highest = classes if skip_zero else classes - 1
    wrong = np.unique(labels[(labels > highest) & (labels != 255)])
    if wrong.size:
        raise DatasetError(
            f"{path} has the label {wrong[0]} and {wrong.size - 1} more above {highest}, and the dataset has {classes} "
            "classes; map them to these, or to 255 (no label)"
        )


@register_example(EncoderDecoder, counted="backbone, decode head and its loss")
def _planned_loss(model: Any, images: Tensor, objects: int, replaced: ExitStack) -> Tensor:  # noqa: ARG001
    samples = [SegDataSample(gt_sem_seg=PixelData(data=image[:1].long())) for image in images]
    return total_loss(model, inputs=images, data_samples=samples)
