"""A classifier of regions whose weights are embeddings of class names, so that other names need no training.

After ViLD (arXiv 2104.13921, section 3.3): cosine similarity over a temperature, and a learned background.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from pe_spatial.encoder.files import read_checkpoint
from pe_spatial.errors import ConfigError

_NEVER = -1e4  # finite, so that losses of logits stay finite


@MODELS.register_module()
class TextClassifierHead(nn.Module):
    """Features of regions or queries -> logits of classes that are given by text embeddings.

    It stands where a box head has its last linear layer: `cls_predictor_cfg=dict(type='TextClassifierHead', ...)` of
    Mask and Cascade R-CNN, with softmax or `FederatedLoss`; `classifier=dict(...)` of `DETAHead`. The embeddings are
    part of a checkpoint; a file replaces them, also with other classes. It computes in float32 under autocast.

    Args:
        in_features: width of the features.
        out_features: number of logits: C classes, and the background if there is one.
        embed_dims: D, width of the embeddings: the output_dim of the PE-Core.
        embeddings: file of `pe-spatial embed_classes` with the C classes in the order of the labels; None takes those
            of the checkpoint. A file that is absent matters when the first features come.
        background: the last logit is that of a learned embedding.
        temperature: start of the learned temperature.
        prior: start of a learned offset of the logits of classes: with sigmoids log(p / (1 - p)) for the share p of
            positives.
        left_out: labels of classes that training must not use as negatives, because their objects are not annotated.
    """

    embeddings: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        embed_dims: int,
        embeddings: str | None = None,
        background: bool = True,
        temperature: float = 0.02,
        prior: float = 0.0,
        left_out: Sequence[int] = (),
    ) -> None:
        super().__init__()
        number = out_features - background
        self.file, self.left_out = embeddings, sorted(left_out)
        if self.left_out and not 0 <= self.left_out[0] <= self.left_out[-1] < number:
            raise ConfigError(f"left_out is {self.left_out}; labels of {number} classes are 0 to {number - 1}")
        self.proj = nn.Linear(in_features, embed_dims)
        self.background = nn.Parameter(torch.randn(1, embed_dims)) if background else None
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(temperature)))
        self.prior = nn.Parameter(torch.tensor(float(prior)))
        self.known = embeddings is not None and Path(embeddings).is_file() and not self.prior.is_meta
        values = self._read(number, embed_dims) if self.known else torch.zeros(number, embed_dims)
        self.register_buffer("embeddings", values)

    def _read(self, number: int, width: int) -> Tensor:
        values = read_checkpoint(str(self.file)).state.get("embeddings")
        shape = None if values is None else tuple(values.shape)
        if values is None or shape != (number, width):
            raise ConfigError(
                f"{self.file} has embeddings {shape}, and the head needs {(number, width)}: num_classes of the head, "
                "and embed_dims, the width of the PE-Core; write them with pe-spatial embed_classes"
            )
        return F.normalize(values.float(), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> logits (..., out_features), float32; ConfigError without embeddings."""
        if not self.known and not x.is_meta:
            raise ConfigError(
                f"the classes have no embeddings: {self.file or 'no file'} is absent, and no checkpoint was loaded; "
                "write them with pe-spatial embed_classes, and give the file as embeddings"
            )
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):  # 'meta' has no autocast
            features = F.normalize(self.proj(x.float()), dim=-1)
            scale = self.logit_scale.exp().clamp(max=100.0)
            logits = scale * F.linear(features, self.embeddings) + self.prior
            if self.training and self.left_out:
                logits = logits.index_fill(-1, torch.tensor(self.left_out, device=logits.device), _NEVER)
            if self.background is not None:
                other = scale * F.linear(features, F.normalize(self.background, dim=-1))
                logits = torch.cat((logits, other), dim=-1)
        return logits

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        key = f"{prefix}embeddings"
        if self.known and self.file is not None:
            state_dict = {**state_dict, key: self.embeddings}  # the file decides
        elif key in state_dict:
            self.known = True
        super()._load_from_state_dict(state_dict, prefix, *args)
