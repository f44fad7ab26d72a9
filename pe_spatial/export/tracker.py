"""The parts of a SAM 2 tracker as modules that can be exported: what `StreamingTracker` runs, without conditions.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, n memories and p pointers
of an object, P points. Rotary positions are products of real numbers here, and fixed resizes products of matrices,
which every runtime computes alike. Each part equals the code of facebookresearch/sam2@2b90b9f that its docstring names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.atomic import atomic_folder
from pe_spatial.errors import ConfigError
from pe_spatial.export.graph import Exportable, export, versions
from pe_spatial.images import bilinear_weights
from pe_spatial.runtime.manifest import Manifest, write_manifest
from pe_spatial.tracking.sam2.model import IMAGENET_MEAN, IMAGENET_STD, STRIDE
from pe_spatial.tracking.sam2.streaming import memory_settings

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

ABSENT = -1024.0
"""Logits of an object that is not in the frame, sam2's NO_OBJ_SCORE."""

PARTS = ("image_encoder", "memory_attention", "mask_decoder", "mask_prompt", "memory_encoder")
"""The folders of an exported tracker."""


class Resize(nn.Module):
    """A bilinear resize of squares, from `size` to `out` pixels per side, as two products."""

    weights: Tensor

    def __init__(self, size: int, out: int) -> None:
        super().__init__()
        weights = torch.from_numpy(bilinear_weights(size, out, antialias=True)).float()
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size, size) -> (..., out, out)."""
        return self.weights @ x @ self.weights.T


def resize(size: int, out: int) -> nn.Module:
    """Return a module that resizes squares, antialiased where they shrink; it does nothing for equal sizes."""
    return nn.Identity() if size == out else Resize(size, out)


class ImageEncoderPart(nn.Module):
    """`SAM2Base.forward_image`, from pixels."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: SAM2Base) -> None:
        super().__init__()
        self.trunk, self.neck = model.image_encoder.trunk, model.image_encoder.neck
        self.resize = resize(self.trunk.image_size, self.trunk.input_size)
        decoder = model.sam_mask_decoder
        self.high_res = nn.ModuleList([decoder.conv_s0, decoder.conv_s1] if model.use_high_res_features_in_sam else [])
        self.no_memory = model.no_mem_embed
        for name, values in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values), persistent=False)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """(1, S, S, 3) uint8 RGB -> `image`, `fresh` (1, d, g, g), and the levels of stride 8 and 4.

        `fresh` is the image as a frame sees it that reads no memory.
        """
        images = ((pixels.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        images = self.resize(images * self.trunk._scale + self.trunk._shift)
        fine, middle, image = self.neck.pyramid(self.trunk.encoder(images))
        levels = [conv(level) for conv, level in zip(self.high_res, (fine, middle), strict=False)]
        return image, image + self.no_memory.view(1, -1, 1, 1), *levels[::-1]


class RealRotary(nn.Module):
    """Rotary positions of a square grid: sam2's complex products, written with real numbers."""

    cos: Tensor
    sin: Tensor

    def __init__(self, grid: int, channels: int) -> None:
        super().__init__()
        from sam2.modeling.position_encoding import compute_axial_cis

        angles = compute_axial_cis(dim=channels, end_x=grid, end_y=grid)  # (gg, channels / 2), complex
        self.register_buffer("cos", angles.real.clone(), persistent=False)
        self.register_buffer("sin", angles.imag.clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., gg, channels) -> the same, rotated."""
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * self.cos - b * self.sin, a * self.sin + b * self.cos), -1).flatten(-2)


class MemoryAttentionPart(nn.Module):
    """`SAM2Base._prepare_memory_conditioned_features` for given memories, and `MemoryAttention`."""

    positions: Tensor
    places: Tensor

    def __init__(self, model: SAM2Base, grid: int) -> None:
        super().__init__()
        self.attention, self.grid = model.memory_attention, grid
        self.width, self.channels = model.hidden_dim, model.mem_dim
        self.pointer_positions, self.times = model.obj_ptr_tpos_proj, model.maskmem_tpos_enc
        layer = self.attention.layers[0]
        options = (layer.pos_enc_at_attn, layer.pos_enc_at_cross_attn_keys, layer.pos_enc_at_cross_attn_queries)
        if options != (False, True, False) or layer.self_attn.num_heads != 1 or layer.cross_attn_image.num_heads != 1:
            raise ConfigError("the memory attention is not SAM 2.1's (one head, positions at the keys of memories)")
        self.rotate = RealRotary(grid, layer.self_attn.internal_dim)
        position_encoding = model.image_encoder.neck.position_encoding
        for name, encoding, channels in (
            ("positions", position_encoding, self.width),
            ("places", model.memory_encoder.position_encoding, self.channels),
        ):
            values = encoding(torch.zeros(1, channels, grid, grid)).flatten(2).transpose(1, 2).clone()  # (1, gg, C)
            self.register_buffer(name, values, persistent=False)

    def forward(
        self, image: Tensor, memories: Tensor, rows: Tensor, pointers: Tensor, back: Tensor
    ) -> tuple[Tensor, ...]:
        """Attend from an image to memories.

        `image` (1, d, g, g); `memories` (B, n, m, g, g) and `rows` (B, n) int64 of the temporal encoding, from 0;
        `pointers` (B, p, d) and `back` (B, p), how many frames ago each was, divided by the reach - 1.
        Returns `conditioned` (B, d, g, g).
        """
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        values = memories.flatten(3).transpose(2, 3)  # (B, n, gg, m)
        keys = values + self.places + F.embedding(rows, self.times[:, 0, 0])[:, :, None]
        count = pointers.shape[0]
        pointer_values = pointers.reshape(count, -1, self.channels)  # (B, p d / m, m)
        times = self.pointer_positions(get_1d_sine_pe(back, self.width))  # (B, p, m)
        times = times[:, :, None].expand(-1, -1, self.width // self.channels, -1).flatten(1, 2)
        pointer_keys = pointer_values + times

        x = (image.flatten(2).transpose(1, 2) + 0.1 * self.positions).expand(count, -1, -1)  # (B, gg, d)
        for layer in self.attention.layers:
            y = layer.norm1(x)
            x = x + self._attend(layer.self_attn, y, y[:, None], y[:, None], None, None)
            x = x + self._attend(layer.cross_attn_image, layer.norm2(x), keys, values, pointer_keys, pointer_values)
            x = x + layer.linear2(layer.activation(layer.linear1(layer.norm3(x))))
        x = self.attention.norm(x)
        return (x.transpose(1, 2).unflatten(2, (self.grid, self.grid)),)

    def _attend(
        self, layer: Any, queries: Tensor, keys: Tensor, values: Tensor, more_keys: Tensor | None,
        more_values: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Attend from (B, gg, d) to n grids (B, n, gg, c) with rotary positions, and to tokens (B, k, c) without."""
        q = self.rotate(layer.q_proj(queries))
        k, v = self.rotate(layer.k_proj(keys)).flatten(1, 2), layer.v_proj(values).flatten(1, 2)
        if more_keys is not None:
            k = torch.cat((k, layer.k_proj(more_keys)), 1)
            v = torch.cat((v, layer.v_proj(more_values)), 1)
        return layer.out_proj(F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])


class MaskDecoderPart(nn.Module):
    """`SAM2Base._forward_sam_heads`: the prompt encoder, the mask decoder, the choice of a mask, occlusion."""

    grid_positions: Tensor

    def __init__(self, model: SAM2Base, grid: int) -> None:
        super().__init__()
        self.prompts, self.decoder, self.pointer = model.sam_prompt_encoder, model.sam_mask_decoder, model.obj_ptr_proj
        self.no_pointer = model.no_obj_ptr if model.pred_obj_scores else None
        self.soft, self.fixed = model.soft_no_obj_ptr, model.fixed_no_obj_ptr
        self.enlarge = resize(4 * grid, model.image_size)
        self.register_buffer("grid_positions", self.prompts.get_dense_pe().detach().clone(), persistent=False)

    def forward(
        self, image: Tensor, points: Tensor, labels: Tensor, mask: Tensor, use_mask: Tensor, multimask: Tensor,
        middle: Tensor | None = None, fine: Tensor | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """Decode the mask of each object.

        `image` (B, d, g, g), conditioned on memories or fresh; `points` (B, P, 2) in pixels of the model's image and
        `labels` (B, P) int64, -1 for none; `mask` (B, 1, 4g, 4g), read if `use_mask` (1,) bool; `multimask` (1,) bool:
        choose the best of three masks; `middle` and `fine` from the image encoder.
        Returns `logits` (B, 1, 4g, 4g), `large` (B, 1, S, S), `pointers` (B, d), `scores` (B, 1).
        """
        dense = torch.where(
            use_mask[:, None, None, None],
            self.prompts.mask_downscaling(mask),
            self.prompts.no_mask_embed.weight.reshape(1, -1, 1, 1),
        )
        high_res = None if fine is None else [fine, middle]
        masks, quality, tokens, scores = self.decoder.predict_masks(
            image_embeddings=image,
            image_pe=self.grid_positions,
            sparse_prompt_embeddings=self._points(points, labels),
            dense_prompt_embeddings=dense,
            repeat_image=False,
            high_res_features=high_res,
        )
        logits, token = self._choose(masks, quality, tokens, multimask)
        pointers = self.pointer(token)
        if self.no_pointer is not None:
            there = scores > 0
            logits = torch.where(there[:, None, None], logits, ABSENT)
            weight = scores.sigmoid() if self.soft else there.float()
            pointers = (weight * pointers if self.fixed else pointers) + (1 - weight) * self.no_pointer
        return logits, self.enlarge(logits), pointers, scores

    def _points(self, points: Tensor, labels: Tensor) -> Tensor:
        """`PromptEncoder._embed_points`: (B, P, 2), (B, P) -> (B, P + 1, d)."""
        points = F.pad(points + 0.5, (0, 0, 0, 1))  # a last one, which is none
        labels = F.pad(labels, (0, 1), value=-1)[..., None]
        height, width = self.prompts.input_image_size
        found = self.prompts.pe_layer._pe_encoding(points / points.new_tensor([width, height]))
        embedded = torch.where(labels == -1, self.prompts.not_a_point_embed.weight, found)
        for label, embedding in enumerate(self.prompts.point_embeddings):
            embedded = torch.where(labels == label, embedded + embedding.weight, embedded)
        return embedded

    def _choose(self, masks: Tensor, quality: Tensor, tokens: Tensor, multimask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 4, h, w), (B, 4), (B, 4, d) -> (B, 1, h, w), (B, d): of the first, or of the best of the others."""
        single, token = masks[:, :1], tokens[:, 0]
        if self.decoder.dynamic_multimask_via_stability:
            single, _ = self.decoder._dynamic_multimask_via_stability(masks, quality)
        best = F.one_hot(quality[:, 1:].argmax(-1), 3).bool()  # (B, 3)
        several = torch.where(best[:, :, None, None], masks[:, 1:], 0.0).sum(1, keepdim=True)
        best_token = token
        if self.decoder.use_multimask_token_for_obj_ptr:
            best_token = torch.where(best[:, :, None], tokens[:, 1:], 0.0).sum(1)
        chosen = torch.where(multimask[:, None, None, None], several, single)
        return chosen, torch.where(multimask[:, None], best_token, token)


class MaskPromptPart(nn.Module):
    """What `SAM2Base._use_mask_as_output` makes of a mask, before the mask decoder."""

    def __init__(self, model: SAM2Base, grid: int) -> None:
        super().__init__()
        self.downsample, side = model.mask_downsample, model.image_size
        self.reduce = resize(side, side // 4)
        self.fit = resize(side // 4, 4 * grid)

    def forward(self, masks: Tensor) -> tuple[Tensor, ...]:
        """(B, 1, S, S) of 0 and 1 -> `prompts` (B, 1, 4g, 4g) for the decoder, `logits` (B, 1, S / 4, S / 4)."""
        return self.fit(self.downsample(masks)), self.reduce(masks * 20.0 - 10.0)


class MemoryEncoderPart(nn.Module):
    """`SAM2Base._encode_new_memory`, and `MemoryEncoder`."""

    def __init__(self, model: SAM2Base, grid: int) -> None:
        super().__init__()
        encoder = model.memory_encoder
        self.downsample, self.project = encoder.mask_downsampler.encoder, encoder.pix_feat_proj
        self.fuse, self.out = encoder.fuser, encoder.out_proj
        self.fit = resize(model.image_size, STRIDE * grid)
        self.scale, self.bias = model.sigmoid_scale_for_mem_enc, model.sigmoid_bias_for_mem_enc
        self.no_object = model.no_obj_embed_spatial

    def forward(self, image: Tensor, masks: Tensor, scores: Tensor) -> tuple[Tensor, ...]:
        """(B, d, g, g), logits (B, 1, S, S), (B, 1) positive where an object is there -> `memories` (B, m, g, g)."""
        masks = self.downsample(self.fit(masks.sigmoid() * self.scale + self.bias))
        memories = self.out(self.fuse(self.project(image) + masks))
        if self.no_object is not None:
            memories = memories + (1 - (scores > 0).float())[..., None, None] * self.no_object[..., None, None]
        return (memories,)


def tracker_parts(model: SAM2Base) -> dict[str, Exportable]:
    """Return the parts of a tracker in the form that `export` writes, by name."""
    side, grid, width, channels = model.image_size, model.sam_image_embedding_size, model.hidden_dim, model.mem_dim
    features = dict(image=torch.rand(1, width, grid, grid))
    objects = {0: "objects"}
    decoder_inputs = dict(
        image=torch.rand(3, width, grid, grid), points=side * torch.rand(3, 2, 2), labels=torch.tensor([[-1, 3]] * 3),
        mask=torch.rand(3, 1, 4 * grid, 4 * grid), use_mask=torch.tensor([True]), multimask=torch.tensor([False]),
    )  # fmt: skip
    levels: dict[str, Tensor] = {}
    if model.use_high_res_features_in_sam:
        levels = {
            name: torch.rand(1, width // divisor, scale * grid, scale * grid)
            for name, divisor, scale in (("middle", 4, 2), ("fine", 8, 4))
        }
    attention_inputs = features | dict(
        memories=torch.rand(3, 4, channels, grid, grid), rows=torch.tensor([[0, 1, 2, model.num_maskmem - 1]] * 3),
        pointers=torch.rand(3, 5, width), back=torch.rand(3, 5),
    )  # fmt: skip
    masks = torch.rand(3, 1, side, side)
    parts: dict[str, tuple[nn.Module, Mapping[str, Tensor], Mapping[str, Mapping[int, str]], list[str]]] = {
        "image_encoder": (
            ImageEncoderPart(model),
            dict(pixels=torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8)),
            {},
            ["image", "fresh", *levels],
        ),
        "memory_attention": (
            MemoryAttentionPart(model, grid),
            attention_inputs,
            {name: objects | {1: "frames"} for name in ("memories", "rows")}
            | {name: objects | {1: "pointers"} for name in ("pointers", "back")},
            ["conditioned"],
        ),
        "mask_decoder": (
            MaskDecoderPart(model, grid),
            decoder_inputs | levels,
            {name: objects | {1: "points"} for name in ("points", "labels")} | dict(image=objects, mask=objects),
            ["logits", "large", "pointers", "scores"],
        ),
        "mask_prompt": (MaskPromptPart(model, grid), dict(masks=masks), dict(masks=objects), ["prompts", "logits"]),
        "memory_encoder": (
            MemoryEncoderPart(model, grid),
            dict(image=decoder_inputs["image"], masks=masks, scores=torch.tensor([[-1.0], [1.0], [1.0]])),
            dict(image=objects, masks=objects, scores=objects),
            ["memories"],
        ),
    }
    return {
        name: Exportable(
            module=module.eval(),
            task=name,
            inputs=inputs,
            dynamic=dynamic,
            outputs=outputs,
            cases=_cases(inputs, dynamic),
        )
        for name, (module, inputs, dynamic, outputs) in parts.items()
    }


_SIZES: Sequence[dict[str, int]] = (
    dict(objects=1, frames=1, pointers=1, points=1),
    dict(objects=3, frames=7, pointers=16, points=4),
    dict(objects=2, frames=4, pointers=5, points=2),
)
"""Sizes of the free dimensions with which a certificate compares."""


def _cases(inputs: Mapping[str, Tensor], dynamic: Mapping[str, Mapping[int, str]]) -> list[dict[str, Tensor]]:
    """Return random inputs, each number between the smallest and the largest one of the example."""
    random = torch.Generator().manual_seed(0)
    cases = []
    for number, sizes in enumerate(_SIZES):
        case: dict[str, Tensor] = {}
        for name, example in inputs.items():
            free = dynamic.get(name, {})
            shape = [sizes[free[i]] if i in free else side for i, side in enumerate(example.shape)]
            least, most = example.min().item(), example.max().item()
            if example.dtype == torch.bool:
                case[name] = torch.tensor([(number + len(case)) % 2 == 0])
            elif example.is_floating_point():
                case[name] = least + (most - least) * torch.rand(shape, generator=random)
            else:
                case[name] = torch.randint(int(least), int(most) + 1, shape, generator=random, dtype=example.dtype)
        cases.append(case)
    return cases


def export_tracker(
    model: SAM2Base, out: str | Path, *, form: str = "onnx", source: str = "", **options: Any
) -> Manifest:
    """Write the folder `out`: manifest.json, and a folder for each part; `options` are those of `export`.

    Raises ConfigError as `export` does, and for a model that is not SAM 2.1's where it matters.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder")
    facts, parts = stream_options(model), tracker_parts(model)
    with atomic_folder(out) as folder:
        written = [export(part, folder / name, form=form, **options) for name, part in parts.items()]
        manifest = Manifest(
            task="tracking", format=form, precision=written[0].precision, inputs={}, outputs=[], options=facts,
            model=dict(variant=model.image_encoder.trunk.encoder.variant, source=source), versions=versions(),
        )  # fmt: skip
        write_manifest(folder, manifest)
    return manifest


def stream_options(model: SAM2Base) -> dict[str, Any]:
    """Return what the runtime must know of a tracker; ConfigError if it is not SAM 2.1 where it matters."""
    multimask = dict(
        new=model.multimask_output_in_sam,
        tracked=model.multimask_output_in_sam and model.multimask_output_for_tracking,
        points=[model.multimask_min_pt_num, model.multimask_max_pt_num],
    )
    binarize = model.binarize_mask_from_pts_for_mem_enc
    return dict(parts=list(PARTS), memory=asdict(memory_settings(model)), multimask=multimask, binarize=binarize)
