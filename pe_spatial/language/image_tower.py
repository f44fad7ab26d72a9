"""ImageTower: the encoder, its last norm, attention pooling and the projection into the common space.

B images, R regions, N tokens, C channels of the encoder, H heads, D channels of the common space.
Source: facebookresearch/perception_models@3e352cc:core/vision_encoder/pe.py (VisionTransformer, AttentionPooling).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.encoder.geometry import patch_grid
from pe_spatial.encoder.vit import Mlp, PerceptionEncoder

from .variants import CoreConfig

_EPS = 1e-5


class AttentionPool(nn.Module):
    """One learned query attends to the tokens; an MLP follows."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, 4 * dim)
        nn.init.normal_(self.latent, std=dim**-0.5)
        for layer in (self.q, self.kv):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, C) -> (B, C)."""
        return self._pool(tokens, None)[:, 0]

    def regions(self, tokens: Tensor, regions: Tensor) -> Tensor:
        """Pool the tokens (N, C) of one image over R `regions` (R, N), bool and none of them empty -> (R, C)."""
        return self._pool(tokens[None], regions[:, None, None])[:, 0]

    def each(self, tokens: Tensor) -> Tensor:
        """Return what pooling over a single token gives, for each of `tokens` (B, N, C) -> (B, N, C)."""
        return self._out(self.kv(tokens).chunk(2, dim=-1)[1])

    def _pool(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        query = self.q(self.latent).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (1, H, 1, C / H)
        keys, values = self.kv(tokens).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        batch = tokens.shape[0] if mask is None else mask.shape[0]
        query, keys, values = (x.expand(batch, -1, -1, -1) for x in (query, keys, values))
        pooled = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)  # (B, H, 1, C / H)
        return self._out(pooled.transpose(1, 2).flatten(2))

    def _out(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        return x + self.mlp(self.norm(x))


class ImageTower(nn.Module):
    """Images -> features in the common space.

    Args:
        config: the configuration of the PE-Core.
        options: options of `PerceptionEncoder` but `out_indices`, such as `geometry` or `grad_checkpointing`.
    """

    def __init__(self, config: CoreConfig, **options: Any) -> None:
        super().__init__()
        dim = config.vision.embed_dim
        self.encoder = PerceptionEncoder(config.vision, **options)
        self.norm = nn.LayerNorm(dim, eps=_EPS)
        self.attn_pool = AttentionPool(dim, config.pool_heads)
        self.head = nn.Linear(dim, config.output_dim, bias=False)
        nn.init.normal_(self.head.weight, std=dim**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W), normalized -> features (B, D), not normalized."""
        return self.head(self.attn_pool(self.tokens(images)))

    def tokens(self, images: Tensor) -> Tensor:
        """Return the normed tokens (B, N, C) of the last block; the class token, where there is one, is the first."""
        (maps,), class_tokens = self.encoder.forward_with_class_tokens(images)
        x = maps.flatten(2).transpose(1, 2)
        if class_tokens:
            x = torch.cat((class_tokens[0][:, None], x), dim=1)
        return self.norm(x)

    def patches(self, images: Tensor) -> Tensor:
        """Return the normed tokens of the patches as a map (B, h, w, C)."""
        grid = patch_grid(images, self.encoder.patch_size, self.encoder.config.in_chans)
        return self.tokens(images)[:, self.encoder.num_prefix_tokens :].unflatten(1, grid)

    def dense(self, images: Tensor) -> Tensor:
        """Return features (B, D, h, w), not normalized: those of the pooling if it attended to one patch alone."""
        patches = self.patches(images)
        features = self.head(self.attn_pool.each(patches.flatten(1, 2)))
        return features.unflatten(1, patches.shape[1:3]).permute(0, 3, 1, 2)
