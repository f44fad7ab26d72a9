"""TextTower: token ids -> features in the common space.

B texts, N tokens, C channels, H heads, D channels of the common space.
Source: facebookresearch/perception_models@3e352cc:core/vision_encoder/pe.py (TextTransformer).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.encoder.vit import Mlp

from .variants import TextConfig

_EPS = 1e-5


class CausalAttention(nn.Module):
    """Self-attention in which a token sees itself and those before it."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        dim = config.width
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = CausalAttention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        # open_clip@3.3:transformer.py, `init_parameters`
        nn.init.normal_(self.attn.qkv.weight, std=dim**-0.5)
        nn.init.normal_(self.mlp.fc1.weight, std=(2 * dim) ** -0.5)
        for layer in (self.attn.proj, self.mlp.fc2):
            nn.init.normal_(layer.weight, std=dim**-0.5 * (2 * config.depth) ** -0.5)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class TextTower(nn.Module):
    """A transformer over token ids; the feature of a text is that of its end token, the largest id."""

    def __init__(self, config: TextConfig, output_dim: int) -> None:
        super().__init__()
        self.config = config
        self.token_embed = nn.Embedding(config.vocab_size, config.width)
        self.pos_embed = nn.Parameter(torch.empty(config.context_length, config.width))
        self.blocks = nn.ModuleList(TextBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_EPS)
        self.head = nn.Linear(config.width, output_dim, bias=False)
        nn.init.normal_(self.token_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed, std=0.01)
        nn.init.normal_(self.head.weight, std=config.width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, N), N up to the context -> features (B, D), not normalized; ValueError for other ids."""
        if ids.ndim != 2 or ids.is_floating_point() or ids.shape[1] > self.config.context_length:
            kind = str(ids.dtype).removeprefix("torch.")
            raise ValueError(
                f"token ids are {kind} {tuple(ids.shape)}; expected integers (B, N) with N up to "
                f"{self.config.context_length}, as `tokenizer` returns them"
            )
        x = self.token_embed(ids) + self.pos_embed[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        ends = ids.argmax(dim=-1)[:, None, None].expand(-1, 1, x.shape[-1])
        return self.head(self.norm(x.gather(1, ends)[:, 0]))
