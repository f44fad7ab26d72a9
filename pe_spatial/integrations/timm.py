"""Plain vision transformers of timm with the interface of our encoder.

timm (1.0 or newer) builds and runs them, through `forward_intermediates`; it is imported when the first one is built.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pe_spatial.encoder.checkpoint import mismatch
from pe_spatial.encoder.files import CheckpointError, locate, read_state_dict
from pe_spatial.encoder.geometry import block_indices, check_frozen_stages, check_images, patch_grid
from pe_spatial.encoder.variants import recipe_rate
from pe_spatial.errors import ConfigError

PREFIX = "timm:"
"""What the variant of such an encoder begins with, for instance 'timm:vit_base_patch14_dinov2.lvd142m'."""

_log = logging.getLogger(__name__)
# what a file may contain beside the encoder: head, pooling, the token of masked pretraining, rotary constants
_OMITTED = r"(head|head_dist|fc_norm|attn_pool)\.|mask_token$|rope\."


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """The shape of a timm encoder, with the names of `EncoderConfig`; `depth` counts all blocks, built or not."""

    name: str
    patch_size: int
    embed_dim: int
    depth: int
    grid_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class PretrainedMixin:
    """For backbones of OpenMMLab: `init_cfg` names the checkpoint that `init_weights` loads."""

    loads_released_weights = True
    is_init = False

    def set_init_cfg(self, init_cfg: Mapping[str, Any] | None) -> None:
        """Keep `init_cfg`; ConfigError unless it is None or names a checkpoint."""
        if init_cfg is not None and (init_cfg.get("type") != "Pretrained" or set(init_cfg) != {"type", "checkpoint"}):
            raise ConfigError(f"init_cfg is {init_cfg}; allowed are None and dict(type='Pretrained', checkpoint=...)")
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Load the pretrained weights, if any; mmengine calls this before training, and only the first call counts."""
        if self.init_cfg is not None and not self.is_init:
            self.load_weights(self.init_cfg["checkpoint"])
        self.is_init = True

    def load_weights(self, source: str) -> None:
        """Load the checkpoint `source`."""
        raise NotImplementedError


class TimmEncoder(PretrainedMixin, nn.Module):
    """A plain vision transformer of timm as a backbone: a tuple of single-scale maps without class and register tokens.

    Positions, rotary or learned, reach other image sizes as timm does it. Blocks after the last of `out_indices`, the
    head and the pooling are not kept.

    Args:
        variant: 'timm:NAME', with or without the tag of its weights.
        out_indices: as in `PerceptionEncoder`.
        final_norm: apply the encoder's last norm to every map, as DINOv2 and DINOv3 do for dense tasks; False returns
            the residual stream, as `PerceptionEncoder` does. Where timm has that norm after the average pooling
            (`fc_norm`), it is applied to the tokens.
        patch_size: side of a patch, in pixels, if not the published one; the kernel is resized when weights are loaded.
        drop_path_rate: as in `PerceptionEncoder`.
        grad_checkpointing: recompute the activations of every block in the backward pass.
        frozen_stages: as in `PerceptionEncoder`; all blocks includes the last norm.
        init_cfg: None for random weights, or `dict(type='Pretrained', checkpoint=...)`: 'released' (timm's on the hub)
            or a file or address as in `load_checkpoint`, in timm's layout or one that timm converts. Strict.

    Raises ConfigError for names that timm does not know and for models that are not plain vision transformers.
    """

    def __init__(
        self,
        variant: str,
        *,
        out_indices: Sequence[int] = (-1,),
        final_norm: bool = True,
        patch_size: int | None = None,
        drop_path_rate: float | str = 0.0,
        grad_checkpointing: bool = False,
        frozen_stages: int = -1,
        init_cfg: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.set_init_cfg(init_cfg)
        if not isinstance(grad_checkpointing, bool):
            raise ConfigError(f"grad_checkpointing is {grad_checkpointing}; timm's encoders take True or False")
        with torch.device("meta"):
            plan = _create(variant)  # refuses, and tells the shape, before memory is taken
        grid, native = plan.patch_embed.grid_size, plan.patch_embed.patch_size[0]
        self.variant = variant
        self.patch_size = patch_size or native
        self.embed_dim = int(plan.embed_dim)
        self.config = TimmConfig(
            name=variant.removeprefix(PREFIX),
            patch_size=native,
            embed_dim=self.embed_dim,
            depth=len(plan.blocks),
            grid_size=grid,
            mean=tuple(round(255.0 * x, 4) for x in plan.pretrained_cfg["mean"]),
            std=tuple(round(255.0 * x, 4) for x in plan.pretrained_cfg["std"]),
        )
        rate = recipe_rate("drop_path_rate", drop_path_rate, self.config.depth)
        self.out_indices = block_indices("out_indices", out_indices, self.config.depth, allow_none=False)
        self.depth = max(self.out_indices) + 1
        self.frozen_stages = check_frozen_stages(frozen_stages, self.depth)
        self.final_norm = final_norm
        # Another patch size keeps the grid of learned positions, and with it their values.
        sizes = {"patch_size": self.patch_size, "img_size": tuple(n * self.patch_size for n in grid)}
        self.model = _create(variant, drop_path_rate=rate, **(sizes if self.patch_size != native else {}))
        self._moved_norm = isinstance(self.model.norm, nn.Identity) and not isinstance(self.model.fc_norm, nn.Identity)
        norm = self.model.fc_norm if self._moved_norm else self.model.norm
        self.model.prune_intermediate_layers(list(self.out_indices), prune_norm=not final_norm, prune_head=True)
        if final_norm:
            self.model.norm = norm
        self.model.set_grad_checkpointing(grad_checkpointing)
        for name, parameter in self.named_parameters():
            if min(self.layer_of(name), self.depth) <= frozen_stages:
                parameter.requires_grad_(False)
        self.train()

    @property
    def blocks(self) -> nn.Module:
        """The transformer blocks that were kept."""
        return self.model.blocks

    def train(self, mode: bool = True) -> TimmEncoder:
        """Set training mode; frozen parts stay in evaluation mode."""
        super().train(mode)
        if self.frozen_stages >= 0:
            stem = [child for name, child in self.model.named_children() if name not in ("blocks", "norm")]
            for module in (*stem, *self.model.blocks[: self.frozen_stages]):
                module.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Encode `images` (B, 3, H, W), normalized, into maps (B, C, H / p, W / p), one for each of `out_indices`.

        Raises ValueError if a side is not a multiple of the patch size p.
        """
        return self.forward_with_class_tokens(images)[0]

    def forward_with_class_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Return the maps of `forward` and the class tokens (B, C) after the same blocks, () without a class token."""
        check_images(images, self.model.patch_embed.proj.weight)
        patch_grid(images, self.patch_size)
        blocks = sorted(set(self.out_indices))  # the order in which timm returns them
        options = dict(norm=self.final_norm, return_prefix_tokens=bool(self.num_prefix_tokens), intermediates_only=True)
        out = self.model.forward_intermediates(images, indices=blocks, **options)
        maps, tokens = zip(*out, strict=True) if self.num_prefix_tokens else (out, ())
        at = [blocks.index(i) for i in self.out_indices]
        return tuple(maps[i] for i in at), tuple(tokens[i][:, 0] for i in at if tokens)

    @property
    def num_prefix_tokens(self) -> int:
        """1 with a class token, else 0."""
        return int(getattr(self.model, "cls_token", None) is not None)

    def layer_of(self, name: str) -> int:
        """Return the layer of the parameter `name`: 0 for patches, tokens and positions, i + 1 for block i.

        The last norm is one layer above the last block, where heads are.
        """
        head, _, rest = name.removeprefix("model.").partition(".")
        if head == "blocks":
            return int(rest.partition(".")[0]) + 1
        return self.depth + 1 if head == "norm" else 0

    def load_weights(self, source: str) -> None:
        """Load a checkpoint in timm's layout, or one that timm converts, strictly."""
        path = locate(self._released() if source == "released" else source)
        state = read_state_dict(path)
        convert = getattr(sys.modules[type(self.model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                state = convert(state, self.model)
            except (KeyError, IndexError, AttributeError, RuntimeError, ValueError) as error:
                raise CheckpointError(
                    f"{path} holds nothing that timm can bring to {self.variant} ({type(error).__name__}: {error}); "
                    "give the weights of this encoder, as timm or their authors publish them"
                ) from error
        if self._moved_norm and "norm.weight" not in state:
            state = {name.removeprefix("fc_") if name.startswith("fc_norm.") else name: x for name, x in state.items()}
        ours = self.model.state_dict()
        state = {name: value for name, value in state.items() if name in ours or not self._is_omitted(name)}
        problems = mismatch(state, ours)
        if problems:
            raise CheckpointError(f"{path} does not hold the weights of {self.variant}: {problems}. Use another file")
        self.model.load_state_dict(state)
        _log.info("%s: weights of %s", path, self.variant)

    def _released(self) -> str:
        cfg = self.model.pretrained_cfg
        if not cfg.get("hf_hub_id"):
            remedy = f"download {cfg['url']} and give the file" if cfg.get("url") else "give a file or another name"
            raise CheckpointError(f"timm has no weights of {self.variant} on the hub; {remedy}")
        return f"hf://{cfg['hf_hub_id']}/{cfg.get('hf_hub_filename') or 'model.safetensors'}"

    def _is_omitted(self, name: str) -> bool:
        block = re.match(r"blocks\.(\d+)\.", name)
        if block:
            return self.depth <= int(block[1]) < self.config.depth
        return re.match(_OMITTED, name) is not None or (not self.final_norm and name.startswith("norm."))


def _create(variant: str, **options: Any) -> Any:
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ConfigError(f"{variant} needs timm, which is not installed; pip install timm") from error
    from timm.layers.patch_embed import PatchEmbed
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    name = variant.removeprefix(PREFIX)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.5)
        nearest = f"; nearest are {', '.join(near)}" if near else ""
        raise ConfigError(f"timm {timm.__version__} knows no model {architecture!r}{nearest}; write timm:NAME")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or "none"
        raise ConfigError(f"timm knows no weights {name!r}; known are {tags}") from None
    try:
        model = timm.create_model(name, num_classes=0, dynamic_img_size=True, **options)
    except TypeError:  # a class that does not know dynamic_img_size
        model = None
    if not isinstance(model, VisionTransformer | Eva) or not isinstance(model.patch_embed, PatchEmbed):
        raise ConfigError(
            f"{variant} is not a plain vision transformer that takes images of any size in timm; those of its classes "
            "VisionTransformer and Eva are: DINOv2, DINOv3, SigLIP, CLIP, DeiT, EVA-02, PE and others, most 'vit_*'"
        )
    return model
