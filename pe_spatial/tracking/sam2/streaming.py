"""Track objects through a stream of frames with a SAM 2 model, in constant memory.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, H x W pixels of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pe_spatial.errors import ConfigError
from pe_spatial.tracking.sam2.model import IMAGENET_MEAN, IMAGENET_STD
from pe_spatial.tracking.sam2.online import (
    MAX_LOGIT,
    Bank,
    Input,
    Memory,
    MemorySettings,
    OnlineTracker,
    Output,
    model_image,
)

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base

_NEEDED = {
    "use_mask_input_as_output_without_sam": True,
    "directly_add_no_mem_embed": True,
    "use_obj_ptrs_in_encoder": True,
    "add_tpos_enc_to_obj_ptrs": True,
    "proj_tpos_enc_in_obj_ptrs": True,
    "use_signed_tpos_enc_to_obj_ptrs": True,
    "only_obj_ptrs_in_the_past_for_eval": True,
    "non_overlap_masks_for_mem_enc": False,
}
"""Options of SAM 2.1 that this tracker relies on."""


def memory_settings(model: SAM2Base) -> MemorySettings:
    """Return what a model remembers; ConfigError if an option differs from SAM 2.1's where it matters."""
    wrong = [f"{name}={getattr(model, name)}" for name, value in _NEEDED.items() if getattr(model, name) != value]
    if wrong:
        raise ConfigError(f"the model has {', '.join(wrong)}; streaming needs these flags as in SAM 2.1")
    return MemorySettings(**{name: getattr(model, name) for name in MemorySettings.__dataclass_fields__})


class StreamingTracker(OnlineTracker):
    """An `OnlineTracker` with a model in torch.

    Args:
        model: from `build_pe_sam2`, in evaluation mode.
        memory_dtype: dtype in which memories are kept; None keeps the model's. sam2's predictor uses torch.bfloat16.
        options: those of `OnlineTracker`.

    Raises ConfigError if an option of the model differs from SAM 2.1's where it matters.
    """

    def __init__(self, model: SAM2Base, *, memory_dtype: torch.dtype | None = None, **options: Any) -> None:
        super().__init__(memory_settings(model), **options)
        self.model, self.memory_dtype = model, memory_dtype

    def _check_mode(self) -> None:
        if self.model.training:
            raise ConfigError("the model is in training mode; call its eval() before tracking")

    @torch.no_grad()
    def _encode(self, frame_rgb: np.ndarray) -> dict[str, Any]:
        side, device = self.model.image_size, self.model.device
        image = torch.from_numpy(model_image(frame_rgb, side)).to(device).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.model.forward_image(((image - mean) / std)[None])
        # drop the encodings of finer levels, which nothing reads and which are most of what is kept for corrections
        return {**features, "vision_pos_enc": features["vision_pos_enc"][-1:]}

    def _decode(self, features: Mapping[str, Any], batch: Sequence[Input]) -> tuple[Tensor, ...]:
        """Return the model's `_forward_sam_heads` for inputs of one `shape`."""
        device = self.model.device
        masks = [torch.from_numpy(one.mask).to(device) for one in batch if one.mask is not None]
        clicks = [one.clicks for one in batch if one.clicks is not None]
        banks = [one.bank for one in batch if one.bank is not None]
        before = [one.before for one in batch if one.before is not None]
        image, points = _expand(features, len(batch)), None
        high_res = features["backbone_fpn"][-3:-1] if self.model.use_high_res_features_in_sam else None
        if masks:
            return self.model._use_mask_as_output(image, high_res, torch.stack(masks))
        if clicks:
            coords, labels = (torch.from_numpy(np.stack(part)).to(device) for part in zip(*clicks, strict=True))
            points = {"point_coords": coords, "point_labels": labels}
        image = self._condition(features, banks) if banks else image + self.model.no_mem_embed.view(1, -1, 1, 1)
        return self.model._forward_sam_heads(
            backbone_features=image,
            point_inputs=points,
            mask_inputs=self._mask_inputs(before) if before else None,
            high_res_features=high_res,
            multimask_output=self.model._use_multimask(not banks, points),
        )

    def _mask_inputs(self, before: Sequence[Tensor]) -> Tensor:
        """Return (B, 1, h, w); at other strides than 16 the logits of a mask have another size than the decoder's."""
        inputs = [logits[None, None].clamp(-MAX_LOGIT, MAX_LOGIT) for logits in before]
        if len({one.shape for one in inputs}) > 1:  # those of one size are resized by the model
            size = self.model.sam_prompt_encoder.mask_input_size
            options: Any = dict(mode="bilinear", align_corners=False, antialias=True)
            inputs = [F.interpolate(one, size, **options) for one in inputs]
        return torch.cat(inputs)

    def _condition(self, features: Mapping[str, Any], banks: list[Bank]) -> Tensor:
        """Attend from the frame to the memories of each object: (B, d, g, g)."""
        from sam2.modeling.sam2_utils import get_1d_sine_pe

        model, count = self.model, len(banks)
        image = _expand(features, count)
        device = image.device
        positions = features["vision_pos_enc"][-1]
        memory = torch.stack([torch.stack([x for _, x in bank.memories]) for bank in banks])  # (B, n, m, g, g)
        spatial = model.memory_encoder.position_encoding(memory[0, :1]).flatten(2).transpose(1, 2)  # (1, gg, m)
        rows = torch.tensor([[row for row, _ in bank.memories] for bank in banks], device=device)  # (B, n)
        memory_pos = spatial + model.maskmem_tpos_enc[rows, 0]  # (B, n, gg, m)
        memory = memory.flatten(3).transpose(2, 3)  # (B, n, gg, m)

        pointers = torch.stack([torch.stack([x for _, x in bank.pointers]) for bank in banks])  # (B, p, d)
        back = torch.tensor([[n for n, _ in bank.pointers] for bank in banks], device=device)  # (B, p)
        pointer_pos = model.obj_ptr_tpos_proj(get_1d_sine_pe(back / (self._reach() - 1), model.hidden_dim))  # (B, p, m)
        tokens = pointers.reshape(count, -1, model.mem_dim)  # (B, p * d / m, m)
        pointer_pos = pointer_pos.repeat_interleave(model.hidden_dim // model.mem_dim, dim=1)
        attended = model.memory_attention(
            curr=image.flatten(2).permute(2, 0, 1),
            curr_pos=positions.expand(count, -1, -1, -1).flatten(2).permute(2, 0, 1),
            memory=torch.cat((memory.flatten(1, 2), tokens), dim=1).transpose(0, 1),
            memory_pos=torch.cat((memory_pos.flatten(1, 2), pointer_pos), dim=1).transpose(0, 1),
            num_obj_ptr_tokens=tokens.shape[1],
        )  # (gg, B, d)
        return attended.permute(1, 2, 0).unflatten(2, image.shape[-2:])

    @torch.no_grad()
    def _run(self, features: Mapping[str, Any], batch: Sequence[Input]) -> list[Output]:
        _, _, _, low, high, pointers, scores = self._decode(features, batch)
        image = _expand(features, len(low))
        memories, _ = self.model._encode_new_memory(
            current_vision_feats=[image.flatten(2).permute(2, 0, 1)],
            feat_sizes=[image.shape[-2:]],
            pred_masks_high_res=high,
            object_score_logits=scores,
            is_mask_from_pts=batch[0].clicks is not None,
        )
        memories = memories.to(self.memory_dtype or memories.dtype)
        return [  # clones, because a slice would keep the complete batch alive
            Output(logits, score, Memory(pointer.clone(), memory.clone()))
            for logits, score, pointer, memory in zip(low[:, 0], scores, pointers, memories, strict=True)
        ]

    @torch.no_grad()
    def _masks(self, outputs: Mapping[int, Output], frame_rgb: np.ndarray) -> dict[int, Tensor]:
        if not outputs:
            return {}
        options: Any = dict(size=frame_rgb.shape[:2], mode="bilinear", align_corners=False)
        logits = torch.cat([F.interpolate(out.logits[None, None], **options) for out in outputs.values()])
        if self.non_overlapping:
            logits = self.model._apply_non_overlapping_constraints(logits)
        return dict(zip(outputs, logits[:, 0], strict=True))


def _expand(features: Mapping[str, Any], count: int) -> Tensor:
    return features["backbone_fpn"][-1].expand(count, -1, -1, -1)
