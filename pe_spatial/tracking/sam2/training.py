"""Training of SAM 2 on a clip: which frames get masks, boxes or clicks, and where clicks correct predictions.

Shapes: T frames, N objects (of all clips in a batch), S the model's image size. The procedure and the order of random
numbers are those of facebookresearch/sam2@2b90b9f:training/model/sam2.py (`SAM2Train`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pe_spatial.errors import ConfigError
from pe_spatial.tracking.sam2.losses import Prediction

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


class Plan(NamedTuple):
    """The prompts of a clip."""

    prompts: dict[int, str]  # conditioning frame -> 'mask', 'box' or 'click', the first frame first
    corrections: dict[int, tuple[bool, ...]]  # frame -> for each click whether it ignores the prediction


@dataclass(frozen=True, kw_only=True)
class Prompting:
    """Sampling of prompts; the defaults are those of SAM 2.1 on MOSE (sam2.1_hiera_b+_MOSE_finetune.yaml).

    Args:
        clicks: probability that a clip is prompted by clicks or boxes instead of masks; single frames always are.
        boxes: probability of a box instead of a click on such a frame.
        prompted_frames: maximum number of prompted frames; the first frame is always one of them.
        corrected_frames: maximum number of corrected frames in a clip prompted by clicks; prompted frames always are.
        corrections: number of clicks on each corrected frame, after the prompt.
        from_truth: probability that such a click is anywhere on the object instead of where the prediction is wrong.
    """

    clicks: float = 0.5
    boxes: float = 0.5
    prompted_frames: int = 2
    corrected_frames: int = 2
    corrections: int = 7
    from_truth: float = 0.1

    def __post_init__(self) -> None:
        if not 1 <= self.prompted_frames <= self.corrected_frames:
            raise ConfigError(
                f"prompted_frames is {self.prompted_frames} and corrected_frames {self.corrected_frames}; every "
                "prompted frame is corrected, so 1 <= prompted_frames <= corrected_frames"
            )

    def draw(self, frames: int, rng: np.random.Generator) -> Plan:
        """Draw the prompts of a clip; the plan depends on the generator alone, not on the clip's content."""
        single = frames == 1
        clicks = rng.random() < (1.0 if single else self.clicks)
        prompted = 1 if single else min(self.prompted_frames, frames - 1)  # at least one frame is tracked
        corrected = 1 if single else min(self.corrected_frames, frames)
        if prompted > 1:
            prompted = int(rng.integers(1, prompted, endpoint=True))
        if clicks and corrected > prompted:
            corrected = int(rng.integers(prompted, corrected, endpoint=True))
        first = [0]
        if prompted > 1:
            first += rng.choice(range(1, frames), prompted - 1, replace=False).tolist()
        if not clicks:
            return Plan(dict.fromkeys(first, "mask"), {})
        prompts = {t: "box" if rng.random() < self.boxes else "click" for t in first}
        where = first
        if corrected > prompted:
            others = [t for t in range(frames) if t not in first]
            where = first + rng.choice(others, corrected - prompted, replace=False).tolist()
        order = [t for t in processing_order(frames, prompts) if t in where]
        corrections = {}
        for t in order:  # a probability of 0 draws no number, as in the release
            drawn = (self.from_truth > 0 and rng.random() < self.from_truth for _ in range(self.corrections))
            corrections[t] = tuple(map(bool, drawn))
        return Plan(prompts, corrections)

    def most(self, frames: int) -> Plan:
        """Return the plan with the largest memory that `draw` may return."""
        prompts = dict.fromkeys(range(min(self.prompted_frames, frames)), "click" if self.clicks else "mask")
        corrected = dict.fromkeys(range(min(self.corrected_frames, frames)), (False,) * self.corrections)
        return Plan(prompts, corrected if self.clicks else {})


def processing_order(frames: int, prompts: Mapping[int, str]) -> list[int]:
    """Return the prompted frames, then the others in temporal order."""
    return [*prompts, *(t for t in range(frames) if t not in prompts)]


def predict_clip(
    model: SAM2Base, images: Tensor, targets: Tensor, clip_of: Tensor, plan: Plan, *, recompute: bool = False
) -> list[list[Prediction]]:
    """Return the predictions that are trained, for each frame: the first one, and one after each correction.

    A corrected frame becomes a conditioning frame for the frames processed after it.

    Args:
        model: in training mode it also reads pointers of later frames, and clicks are anywhere on the object or on the
            errors; in evaluation mode they are at the center.
        images: (B, T, 3, S, S) of B clips, normalized with ImageNet's statistics.
        targets: (T, N, S, S) bool.
        clip_of: (N,) long, index of the clip of each object.
        plan: prompts of all clips.
        recompute: decode corrections again in the backward pass to save memory.
    """
    clip = _Clip(model, images, targets, clip_of, plan, recompute=recompute)
    predictions = {t: clip.predict(t) for t in processing_order(len(targets), plan.prompts)}
    return [predictions[t] for t in range(len(targets))]


class _Clip:
    def __init__(
        self, model: SAM2Base, images: Tensor, targets: Tensor, clip_of: Tensor, plan: Plan, *, recompute: bool
    ) -> None:
        self.model, self.targets, self.clip_of, self.plan = model, targets, clip_of, plan
        decode = model._forward_sam_heads
        self.decode = partial(checkpoint, decode, use_reentrant=False) if recompute else decode
        encoded = model.forward_image(images.flatten(0, 1))
        _, self.levels, self.positions, self.sizes = model._prepare_backbone_features(encoded)  # (hw, B T, C) each
        self.history: dict[str, dict[int, Any]] = {"cond_frame_outputs": {}, "non_cond_frame_outputs": {}}
        self.clicks = {t: self._prompt(kind, targets[t][:, None]) for t, kind in plan.prompts.items()}

    def predict(self, t: int) -> list[Prediction]:
        """Predict frame `t`, correct it as planned, and store its memory."""
        model, target, prompt = self.model, self.targets[t][:, None], self.plan.prompts.get(t)
        picked = self.clip_of * len(self.targets) + t
        levels = [level[:, picked] for level in self.levels]
        clicks = self.clicks.get(t)
        output, sam, high_res, features = model._track_step(
            frame_idx=t,
            is_init_cond_frame=prompt is not None,
            current_vision_feats=levels,
            current_vision_pos_embeds=[position[:, picked] for position in self.positions],
            feat_sizes=self.sizes,
            point_inputs=clicks,
            mask_inputs=target if prompt == "mask" else None,
            output_dict=self.history,
            num_frames=len(self.targets),
            track_in_reverse=False,
            prev_sam_mask_logits=None,
        )
        sams = [sam]
        for from_truth in self.plan.corrections.get(t, ()):
            clicks = self._correction(clicks, target, None if from_truth else sam[4] > 0)
            sam = self.decode(
                backbone_features=features,
                point_inputs=clicks,
                mask_inputs=sam[3],
                high_res_features=high_res,
                multimask_output=model._use_multimask(prompt is not None, clicks),
            )
            sams.append(sam)
        output["obj_ptr"] = sam[5]
        model._encode_memory_in_output(levels, self.sizes, clicks, True, sam[4], sam[6], output)
        conditioning = prompt is not None or t in self.plan.corrections
        self.history["cond_frame_outputs" if conditioning else "non_cond_frame_outputs"][t] = output
        # candidates' logits at low and high resolution and IoUs, best candidate's logits at both, pointers, scores
        return [Prediction(sam[1], sam[2], sam[6]) for sam in sams]

    def _prompt(self, kind: str, target: Tensor) -> dict[str, Tensor] | None:
        from sam2.modeling.sam2_utils import sample_box_points

        if kind == "box":
            # An object that is absent on this frame gets an inverted box, as in the release that this equals.
            points, labels = sample_box_points(target)
            return {"point_coords": points, "point_labels": labels}
        return self._correction(None, target, None) if kind == "click" else None

    def _correction(
        self, clicks: dict[str, Tensor] | None, target: Tensor, predicted: Tensor | None
    ) -> dict[str, Tensor]:
        from sam2.modeling.sam2_utils import get_next_point
        from sam2.utils.misc import concat_points

        return concat_points(clicks, *get_next_point(target, predicted, "uniform" if self.model.training else "center"))
