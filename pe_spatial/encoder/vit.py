"""PerceptionEncoder: an image encoder that returns one feature map for each requested block.

Shapes: B images, h x w patches on the grid, N tokens in a sequence, C channels, H heads, D head dimension.
Reference: facebookresearch/perception_models@3e352cc:core/vision_encoder/pe.py; windows and compressed rotary positions
as in apps/detection/detectron2_pe/modeling/backbone/pev1_det.py of the same commit.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .geometry import Geometry, block_indices, check_frozen_stages, check_images, get_geometry, patch_grid, preset_name
from .layer_decay import layer_of
from .lora import LoRA, add_adapters, get_lora
from .recompute import Choice, check_micro_batch, recomputed_blocks, run_in_micro_batches, run_recomputed
from .resize import is_autocast, is_compiling, resize_pos_embed, sizes_of
from .rope import apply_rope, rope_table
from .variants import VARIANTS, EncoderConfig, get_config, recipe_rate, variant_key
from .windows import valid_tokens, window_partition, window_unpartition

_EPS = 1e-5  # of every LayerNorm, as in pe.py
# The released geometry warns above this ratio of the grid to the pretraining grid. Published: tracking with
# PE-Spatial-G holds or gains up to 1.9 (short side of 840 px) and loses 4 to 12 points of J&F at 2.8 (1260 px), on each
# of DAVIS, YouTube-VOS and MOSE (DINOv3 paper, Tab. 5).
_LARGE = 2.0
_warned = False
_log = logging.getLogger(__name__)


class Attention(nn.Module):
    """Self-attention with rotary positions."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor, mask: Tensor | None) -> Tensor:
        """(B, N, C), table (N, D / 2, 2), mask of the keys (B, 1, 1, N) or None -> (B, N, C)."""
        q, k, v = self.heads(x, rope)
        return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))

    def heads(self, x: Tensor, rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, which are rotated, and values, (B, H, N, D) each."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))  # (B, N, 3, H, D)
        q, k = apply_rope(qkv[:, :, :2], rope).permute(2, 0, 3, 1, 4).unbind()
        return q, k, qkv[:, :, 2].transpose(1, 2)


class Mlp(nn.Module):
    """Two linear layers around an exact GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block with optional LayerScale and drop path."""

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: EncoderConfig, drop_path: float) -> None:
        super().__init__()
        dim = config.embed_dim
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(dim, eps=_EPS)
        self.attn = Attention(dim, config.num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=_EPS)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio))
        for name in ("gamma_1", "gamma_2"):
            gamma = None if config.init_values is None else nn.Parameter(torch.full((dim,), config.init_values))
            self.register_parameter(name, gamma)
        for layer in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, rope: Tensor, valid: Tensor | None, mask: Tensor | None, batch_size: int) -> Tensor:
        """(B * n, N, C) -> the same, for n windows of each of B = `batch_size` images (n = 1 if attention is global).

        Windows that do not divide the grid are padded. The padding is treated in one of two ways:
        `valid` (B * n, N, 1) sets it to zero after norm1, as the released detectors do, so that it still counts as
        keys; `mask` (B * n, 1, 1, N) keeps it out of the attention.
        """
        y = self.norm1(x)
        if valid is not None:
            y = y * valid.to(y.dtype)
        x = x + self._branch(self.attn(y, rope, mask), self.gamma_1, batch_size)
        return x + self._branch(self.mlp(self.norm2(x)), self.gamma_2, batch_size)

    @property
    def scales_branches(self) -> bool:
        """Whether LayerScale or drop path multiplies what attention and MLP give."""
        return self.gamma_2 is not None or (self.drop_path > 0.0 and self.training)

    def _branch(self, y: Tensor, gamma: Tensor | None, batch_size: int) -> Tensor:
        if gamma is not None:
            y = y * gamma
        if self.drop_path == 0.0 or not self.training:
            return y
        keep = 1.0 - self.drop_path
        scale = y.new_empty(batch_size, 1, 1, 1).bernoulli_(keep).div_(keep)  # one for all windows of an image
        return (y.unflatten(0, (batch_size, -1)) * scale).flatten(0, 1)


class PatchProjection(nn.Conv2d):
    """A convolution whose stride is its kernel size; in 16 bits a matrix product, which CPUs run much faster."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, in, h * p, w * p) -> (B, C, h, w)."""
        if images.dtype.itemsize != 2 and not is_autocast(images.device.type):
            return super().forward(images)
        p = self.kernel_size[0]
        batch, channels, height, width = sizes_of(images)
        patches = images.reshape(batch, channels, height // p, p, width // p, p)
        patches = patches.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, h, w, in * p * p)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Embed non-overlapping patches by one linear map without bias."""

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.proj = PatchProjection(in_chans, dim, patch_size, stride=patch_size, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, in, H, W) -> (B, h, w, C)."""
        return self.proj(images).permute(0, 2, 3, 1)


class PerceptionEncoder(nn.Module):
    """Meta's Perception Encoder as a backbone for dense prediction.

    Args:
        variant: a key of `VARIANTS`, a released name such as 'PE-Spatial-B16-512', an `EncoderConfig` or its fields.
        out_indices: blocks that return their output, in this order; 0-based, negatives count from the end. Blocks after
            the last of them are not built.
        geometry: positions, patches and windows: a preset's name ('release', 'timm', 'vitdet', 'deta'), a `Geometry` or
            its fields.
        drop_path_rate: stochastic depth of the last block of the complete network; rises linearly from 0. 'vitdet' is
            the published rate for the depth.
        grad_checkpointing: recompute activations in the backward pass: True in every block, or indices of blocks.
            'selective' keeps the results of attention and of the wide matrix products, for about half of the memory in
            nearly the same time; {0: 'full', 1: 'selective'} chooses by block.
        micro_batch: in training encode so many images at a time, and compute them again in the backward pass: the
            activations are those of one micro-batch, and the losses see all images. None encodes all at once.
        frozen_stages: -1 trains all; 0 freezes patches, positions and norm_pre; k also the first k blocks. Frozen parts
            run in evaluation mode and without autograd.
        lora: options of `LoRA`, such as `dict(rank=8)`: freeze the encoder, and train small adapters in the blocks that
            `frozen_stages` does not freeze; None trains the encoder itself.
        overrides: single fields of the geometry, for instance `window_size=16`.

    Attributes:
        geometry: the geometry in numbers.
        depth: number of blocks built.
        num_prefix_tokens: tokens before the patches: 1 with a class token, else 0.
        base_names: names of the parameters that adapters need and do not change; () without `lora`.
        base_source: where the weights of the base are, as `load_checkpoint` takes it; None if no one knows.
        base_hash: `checkpoint.base_hash` of the weights that were loaded from there.

    Raises ValueError for a value that is not allowed, and TypeError for an option that does not exist.
    """

    def __init__(
        self,
        variant: str | EncoderConfig | Mapping[str, Any],
        *,
        out_indices: int | Sequence[int] = (-1,),
        geometry: str | Geometry | Mapping[str, Any] = "release",
        drop_path_rate: float | str = 0.0,
        grad_checkpointing: Choice = False,
        micro_batch: int | None = None,
        frozen_stages: int = -1,
        lora: LoRA | Mapping[str, Any] | None = None,
        **overrides: Any,
    ) -> None:
        super().__init__()
        config = get_config(variant)
        self.variant = variant_key(variant) if isinstance(variant, str) else None
        self.config = config
        self.geometry = get_geometry(geometry, **overrides).resolve(config)
        self.patch_size = self.geometry.patch_size
        self.embed_dim = config.embed_dim
        self.out_indices = block_indices("out_indices", out_indices, config.depth, allow_none=False)
        self.depth = max(self.out_indices) + 1
        rate = recipe_rate("drop_path_rate", drop_path_rate, config.depth)
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path_rate is {rate}; it is a probability below 1")
        self.frozen_stages = check_frozen_stages(frozen_stages, self.depth)
        self.grad_checkpointing = grad_checkpointing
        self.micro_batch = check_micro_batch(micro_batch, self._recomputed.values())

        dim = config.embed_dim
        self.num_prefix_tokens = int(config.class_token)
        self.patch_embed = PatchEmbed(config.in_chans, dim, self.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.pos_embed = nn.Parameter(torch.empty(1, self.num_prefix_tokens + self.geometry.pos_grid**2, dim))
        self.norm_pre = nn.LayerNorm(dim, eps=_EPS)
        self.blocks = nn.ModuleList(Block(config, rate * i / max(config.depth - 1, 1)) for i in range(self.depth))
        # (window size or None, blocks): tokens are partitioned into windows once for consecutive windowed blocks.
        window, global_blocks = self.geometry.window_size, self.geometry.global_attn_indexes
        groups = groupby(range(self.depth), key=lambda i: None if i in global_blocks else window)
        self._block_groups = [(size, tuple(blocks)) for size, blocks in groups]
        for token in self._learned_tokens():
            nn.init.normal_(token, std=dim**-0.5)
        self._freeze()
        self.lora = get_lora(lora)
        self.base_names: tuple[str, ...] = ()
        self.base_source: str | None = None
        self.base_hash: str | None = None
        if self.lora is not None:
            self._adapt(self.lora)

    @property
    def grad_checkpointing(self) -> dict[int, str]:
        """Block -> 'full' or 'selective', for those that recompute activations; set with what the argument takes."""
        return self._recomputed

    @grad_checkpointing.setter
    def grad_checkpointing(self, choice: Choice) -> None:
        self._recomputed = recomputed_blocks(choice, self.depth, self.config.depth)

    def _learned_tokens(self) -> list[nn.Parameter]:
        return [self.pos_embed] if self.cls_token is None else [self.pos_embed, self.cls_token]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)
        if self.frozen_stages >= 0:
            for token in self._learned_tokens():
                token.requires_grad_(False)

    def _adapt(self, lora: LoRA) -> None:
        for parameter in (*self._learned_tokens(), *self.patch_embed.parameters(), *self.norm_pre.parameters()):
            parameter.requires_grad_(False)
        add_adapters(list(self.blocks[max(self.frozen_stages, 0) :]), lora)
        self.base_names = tuple(name for name, parameter in self.named_parameters() if not parameter.requires_grad)

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        return [self.patch_embed, self.norm_pre, *self.blocks[: self.frozen_stages]]

    def train(self, mode: bool = True) -> PerceptionEncoder:
        """Set training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Encode `images` (B, 3, H, W), normalized, into one map (B, C, H / p, W / p) for each of `out_indices`.

        p is the patch size. Maps are the residual stream after a block: the released models end without a norm. Raises
        ValueError if a side is not a multiple of p.
        """
        return self.forward_with_class_tokens(images)[0]

    def forward_with_class_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the maps of `forward` and the class tokens (B, C) after the same blocks, () without a class token."""
        maps_and_tokens = run_in_micro_batches(self._encode, images, self.micro_batch)
        number = len(self.out_indices)
        return maps_and_tokens[:number], maps_and_tokens[number:]

    def _encode(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the maps, and after them the class tokens."""
        check_images(images, self.patch_embed.proj.weight)
        grid = patch_grid(images, self.patch_size, self.config.in_chans)
        self._warn_of_large_images(grid)
        with _autograd(self.frozen_stages < 0):
            x = self._embed(images, grid)
        maps: dict[int, Tensor] = {}
        tokens: dict[int, Tensor] = {}
        for window, blocks in self._block_groups:
            rope = self._rope(window, grid, x.device)
            valid, mask = self._padding(window, grid, x)
            if window:
                x = self._enter_windows(x, window, grid)
            for i in blocks:
                with _autograd(i >= self.frozen_stages):
                    x = self._block(i, x, rope, valid, mask, images.shape[0])
                if i in self.out_indices:
                    maps[i] = self._map(x, window, grid)
                    if self.num_prefix_tokens:
                        tokens[i] = self._class_token(x, images.shape[0])[:, 0]
            if window:
                x = self._leave_windows(x, window, grid)
        return tuple(found[i] for found in (maps, tokens) if found for i in self.out_indices)

    def _warn_of_large_images(self, grid: tuple[int, int]) -> None:
        """Warn once per process where the released geometry is known to get worse."""
        global _warned
        native = self.config.grid_size
        if is_compiling() or _warned or min(grid) <= _LARGE * native:
            return
        if self.config in VARIANTS.values() and preset_name(self.geometry, self.config) == "release":
            _warned = True
            _log.warning(
                f"images of {grid[0]}x{grid[1]} patches are more than {_LARGE:g} times the pretraining grid of "
                f"{native}x{native}, and the geometry is 'release', with which PE-Spatial gets worse at such sizes; "
                "use geometry='vitdet' (windows of the pretraining grid) or smaller images"
            )

    def _embed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        side, mode = self.geometry.pos_grid, self.geometry.pos_embed_mode
        pos = self.pos_embed[:, self.num_prefix_tokens :].unflatten(1, (side, side))
        x = (self.patch_embed(images) + resize_pos_embed(pos, grid, mode=mode)).flatten(1, 2)
        if self.cls_token is not None:
            cls_token = (self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
            x = torch.cat((cls_token.to(x.dtype), x), dim=1)
        return self.norm_pre(x)

    def _rope(self, window: int | None, grid: tuple[int, int], device: torch.device) -> Tensor:
        grid = (window, window) if window else grid
        scale = (1.0, 1.0)
        if self.geometry.rope_grid is not None:
            side = self.geometry.rope_grid[0 if window else 1]
            scale = (side / grid[0], side / grid[1])
        head_dim, count = self.embed_dim // self.config.num_heads, self.num_prefix_tokens
        return rope_table(grid, head_dim, scale=scale, offset=count, num_prefix_tokens=count, device=device)

    def _padding(self, window: int | None, grid: tuple[int, int], x: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return (valid, mask) of `Block.forward`: at most one of them is not None."""
        valid = valid_tokens(grid, window, x.device) if window else None
        if valid is None:
            return None, None
        valid = F.pad(valid, (self.num_prefix_tokens, 0), value=True).repeat(x.shape[0], 1)  # (B * n, N)
        return (None, valid[:, None, None]) if self.geometry.mask_window_padding else (valid[..., None], None)

    def _enter_windows(self, x: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
        windows = window_partition(x[:, self.num_prefix_tokens :].unflatten(1, grid), window)
        if self.num_prefix_tokens:
            copies = x[:, None, :1].expand(-1, windows.shape[0] // x.shape[0], -1, -1).flatten(0, 1)
            windows = torch.cat((copies, windows), dim=1)
        return windows

    def _leave_windows(self, x: Tensor, window: int, grid: tuple[int, int]) -> Tensor:
        patches = window_unpartition(x[:, self.num_prefix_tokens :], window, grid).flatten(1, 2)
        if self.num_prefix_tokens:
            patches = torch.cat((self._class_token(x, patches.shape[0]), patches), dim=1)
        return patches

    def _class_token(self, x: Tensor, batch_size: int) -> Tensor:
        """(B * windows, N, C) -> the mean over the windows of each image, (B, 1, C)."""
        return x[:, :1].unflatten(0, (batch_size, -1)).mean(dim=1)

    def _block(self, i: int, x: Tensor, *args: Any) -> Tensor:
        if i in self._recomputed and torch.is_grad_enabled():
            return run_recomputed(self.blocks[i], self._recomputed[i], x, *args)
        out: Tensor = self.blocks[i](x, *args)
        return out

    def _map(self, x: Tensor, window: int | None, grid: tuple[int, int]) -> Tensor:
        x = x[:, self.num_prefix_tokens :]
        x = window_unpartition(x, window, grid) if window else x.unflatten(1, grid)
        return x.permute(0, 3, 1, 2)

    def layer_of(self, name: str) -> int:
        """Return the layer of the parameter `name`, as `layer_decay.layer_of` counts."""
        return layer_of(name, self.depth)

    def extra_repr(self) -> str:
        """Show the configuration, and the geometry by the name of its preset and in numbers."""
        return (
            f"{self.config}, out_indices={self.out_indices}, "
            f"geometry={preset_name(self.geometry, self.config) or 'custom'}: {self.geometry}, "
            f"frozen_stages={self.frozen_stages}, grad_checkpointing={self.grad_checkpointing}, "
            f"micro_batch={self.micro_batch}, lora={self.lora}"
        )


def _autograd(enabled: bool) -> AbstractContextManager[None]:
    return torch.set_grad_enabled(enabled and torch.is_grad_enabled())
