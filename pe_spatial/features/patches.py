"""What one patch, or the class token, sees: similarity of features and attention."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.encoder.vit import Attention, PerceptionEncoder
from pe_spatial.encoder.windows import window_unpartition

AttentionInput = tuple[Tensor, Tensor, Tensor | None]
"""Arguments of `Attention.forward`: tokens, rotary table, mask of the keys."""


def similarity(feature_map: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the cosine similarity (h, w) of all patches of a map (C, h, w) to the patch (row, column)."""
    unit = F.normalize(feature_map, dim=0)
    return (unit * unit[:, patch[0], patch[1], None, None]).sum(0)


@contextmanager
def recorded_attention(encoder: PerceptionEncoder, layers: Sequence[int]) -> Iterator[dict[int, AttentionInput]]:
    """Record what the attention of each of the `layers` gets in the forward passes of the block: layer -> inputs.

    The encoder computes as always; weights follow from what was recorded.
    """
    recorded: dict[int, AttentionInput] = {}

    def keep(layer: int, _: nn.Module, inputs: AttentionInput) -> None:
        recorded[layer] = inputs

    hooks = [_attention(encoder, i).register_forward_pre_hook(partial(keep, i)) for i in layers]
    try:
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def _attention(encoder: PerceptionEncoder, layer: int) -> Attention:
    block: Any = encoder.blocks[layer]
    return block.attn


def attention_weights(attn: Attention, inputs: AttentionInput, query: int) -> Tensor:
    """Return the attention of token `query` to all tokens, (B, H, N), each row with the sum 1."""
    x, rope, mask = inputs
    q, k, _ = attn.heads(x, rope)
    scores = (q[:, :, query : query + 1] @ k.transpose(-2, -1)) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1)[:, :, 0]


def attention_map(
    encoder: PerceptionEncoder, layer: int, inputs: AttentionInput, grid: tuple[int, int], patch: tuple[int, int] | None
) -> Tensor:
    """Return the attention (h, w) of one image's patch (row, column), or of its class token, mean over the heads.

    Args:
        encoder: the encoder.
        layer: the block.
        inputs: what `recorded_attention` recorded for it, of one image.
        grid: (h, w) of the image, in patches.
        patch: None for the class token. In a windowed block a patch sees its window, and the class token has a copy in
            each window, over which the mean is taken.
    """
    size, first = encoder.geometry.window_size, encoder.num_prefix_tokens
    if patch is None and not first:
        raise ValueError("the encoder has no class token; give a patch")
    window = size if size and layer not in encoder.geometry.global_attn_indexes else None
    row, column = patch or (0, 0)
    width, columns = (window, -(-grid[1] // window)) if window else (grid[1], 1)
    home = (row // window) * columns + column // window if window else 0
    inside = (row % window) * width + column % window if window else row * width + column
    query = 0 if patch is None else first + inside
    weights = attention_weights(_attention(encoder, layer), inputs, query).mean(1)[:, first:]  # (windows, N)
    if window is None:
        return weights.view(grid)
    if patch is not None:
        weights = weights * F.one_hot(weights.new_tensor(home).long(), weights.shape[0])[:, None]
    else:
        weights = weights / weights.shape[0]
    return window_unpartition(weights[..., None], window, grid)[0, ..., 0]
