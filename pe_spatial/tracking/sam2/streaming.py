"""Track objects through a stream of frames with a SAM 2 model, in constant memory.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, H x W pixels of a frame.
What a frame stores and later frames read is as in facebookresearch/sam2@2b90b9f:sam2/modeling/sam2_base.py. There all
objects of a batch share one history; here each object has its own, so that objects which began on different frames
still run as one batch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.model import IMAGENET_MEAN, IMAGENET_STD
from pe_spatial.tracking.sam2.prompts import BOX_CORNERS, Clicks, Prompt, read_prompt

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
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
_MAX_LOGIT = 32.0  # bound of the logits that clicks correct, as in sam2's predictor


@dataclass
class _Memory:
    """What a frame stores of an object; `features` are dropped when no later frame will read them."""

    pointer: Tensor  # (d,)
    features: Tensor | None  # (m, g, g)


@dataclass
class _Object:
    prompted: dict[int, _Memory] = field(default_factory=dict)  # conditioning frames, by number
    tracked: dict[int, _Memory] = field(default_factory=dict)


class _Bank(NamedTuple):
    """What an object reads on a frame."""

    memories: list[tuple[int, Tensor]]  # (row of the temporal encoding, (m, g, g))
    pointers: list[tuple[int, Tensor]]  # (frames back, (d,))


class _Input(NamedTuple):
    """What an object is decoded from on a frame."""

    mask: Tensor | None = None  # (1, S, S), becomes the result unchanged
    clicks: Clicks | None = None
    bank: _Bank | None = None  # None where the object begins
    before: Tensor | None = None  # (h, w), the logits that clicks correct

    @property
    def shape(self) -> tuple[object, ...]:
        """Inputs with the same value can run as one batch."""
        clicks = self.clicks and len(self.clicks.labels)
        bank = self.bank and (len(self.bank.memories), len(self.bank.pointers))
        return self.mask is None, clicks, bank, self.before is None


class _Output(NamedTuple):
    logits: Tensor  # (h, w), at stride 4
    score: Tensor  # (1,), positive where the object is in the frame
    memory: _Memory


class _Frame(NamedTuple):
    """The last frame, kept for corrections until the next frame."""

    frame_rgb: np.ndarray  # (H, W, 3) uint8
    features: dict[str, Any] | None  # from the model's `forward_image`; None if nothing has needed them
    inputs: dict[int, _Input]
    outputs: dict[int, _Output]


class Snapshot(NamedTuple):
    """What a tracker knows after a frame; see `StreamingTracker.snapshot`."""

    objects: dict[int, _Object]
    frame: int
    last: _Frame | None


class StreamingTracker:
    """Tracks objects through frames from any source, one by one; time and memory do not depend on their number.

    A prompt makes its frame a conditioning frame of the object, decoded from the prompt alone, for a new object as for
    a tracked one. On all other frames an object is decoded from its memories: those of the conditioning frames and of
    the last frames, as many as the model was built for. Objects with equally many memories run as one batch; some
    frames after the last prompt that is all of them. `refine` corrects the result of the last frame.

    Args:
        model: from `build_pe_sam2`, in evaluation mode.
        max_prompted_frames: conditioning frames kept for an object: the first and the latest ones. A dropped one
            becomes an ordinary frame.
        non_overlapping: assign every pixel to at most one object, the likeliest.
        num_frames: length of the video, if it is known and shorter than the model's `max_obj_ptrs_in_encoder`: SAM 2
            scales the positions of pointers by it.
        memory_dtype: dtype in which memories are kept; None keeps the model's. sam2's predictor uses torch.bfloat16.

    Raises ConfigError if an option of the model differs from SAM 2.1's where it matters.
    """

    def __init__(
        self,
        model: SAM2Base,
        *,
        max_prompted_frames: int = 4,
        non_overlapping: bool = False,
        num_frames: int | None = None,
        memory_dtype: torch.dtype | None = None,
    ) -> None:
        wrong = [f"{name}={getattr(model, name)}" for name, value in _NEEDED.items() if getattr(model, name) != value]
        if wrong:
            raise ConfigError(f"the model has {', '.join(wrong)}; streaming needs these flags as in SAM 2.1")
        if model.num_maskmem < 1 or model.max_obj_ptrs_in_encoder < 2:
            given = f"num_maskmem={model.num_maskmem} and max_obj_ptrs_in_encoder={model.max_obj_ptrs_in_encoder}"
            raise ConfigError(f"the model has {given}; streaming needs at least 1 and 2")
        if max_prompted_frames < 2:
            raise ConfigError(f"max_prompted_frames is {max_prompted_frames}; 2 is the least: the first and the latest")
        self.model, self.num_frames, self.max_prompted_frames = model, num_frames, max_prompted_frames
        self.non_overlapping, self.memory_dtype = non_overlapping, memory_dtype
        self.reset()

    def reset(self) -> None:
        """Remove all objects; the next frame is the first of another video."""
        self._objects: dict[int, _Object] = {}
        self._frame = 0
        self._last: _Frame | None = None

    def snapshot(self) -> Snapshot:
        """Return the state after the last frame, to which `restore` goes back; it holds that frame and its memories.

        Features of the image are not kept: a correction after `restore` encodes the frame again.
        """
        return Snapshot(_copied(self._objects), self._frame, self._last and self._last._replace(features=None))

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to a snapshot of this tracker; it can be used again."""
        self._objects, self._frame, self._last = _copied(snapshot.objects), snapshot.frame, snapshot.last

    @property
    def objects(self) -> tuple[int, ...]:
        """Ids of the tracked objects."""
        return tuple(self._objects)

    def remove(self, object_id: int) -> None:
        """Stop tracking an object; DatasetError for an unknown id."""
        if object_id not in self._objects:
            raise DatasetError(f"there is no object {object_id!r} to remove; tracked are {list(self._objects)}")
        del self._objects[object_id]
        assert self._last is not None  # objects come with frames
        inputs, outputs = dict(self._last.inputs), dict(self._last.outputs)  # a snapshot may hold the old ones
        inputs.pop(object_id, None)
        outputs.pop(object_id, None)
        self._last = self._last._replace(inputs=inputs, outputs=outputs)

    def step(self, frame: ArrayLike, prompts: Mapping[int, Prompt] | None = None) -> dict[int, Tensor]:
        """Take the next frame and return the mask of every object, (H, W) bool on the model's device, by its id.

        `frame` is (H, W, 3) uint8 RGB; an id in `prompts` that is not tracked yet begins an object. Raises DatasetError
        for a frame or prompt that cannot be used; the tracker is then unchanged.
        """
        return {i: logits > 0 for i, logits in self.step_logits(frame, prompts).items()}

    @torch.no_grad()
    def step_logits(self, frame: ArrayLike, prompts: Mapping[int, Prompt] | None = None) -> dict[int, Tensor]:
        """As `step`, but logits, (H, W) float: positive inside."""
        self._check_mode()
        t = self._frame
        if self.num_frames is not None and t >= self.num_frames:
            raise DatasetError(f"this is frame {t} of a video of num_frames={self.num_frames}; reset() first")
        frame_rgb = self._checked(frame)
        given = self._prompts(t, prompts or {}, frame_rgb)
        inputs = self._inputs(t, given)
        features = self._encode(frame_rgb) if inputs else None
        outputs = self._track(features, inputs) if features else {}
        masks = self._masks(outputs, frame_rgb)
        # nothing below fails, and nothing above has changed the state
        self._commit(t, outputs, set(given))
        self._frame += 1
        self._last = _Frame(frame_rgb, features, inputs, outputs)
        return masks

    def refine(self, prompts: Mapping[int, Prompt]) -> dict[int, Tensor]:
        """Correct objects, or begin new ones, on the frame of the last `step`; return the masks of all its objects.

        It may be called repeatedly before the next `step`. Only the objects in `prompts` are decoded again, and the
        frame becomes a conditioning frame for them. Clicks are added to the object's earlier clicks on this frame and
        correct its latest mask there, with the memories that the frame was decoded from. A box discards earlier
        clicks, and a mask replaces everything. (facebookresearch/sam2@2b90b9f:sam2/sam2_video_predictor.py,
        `add_new_points_or_box` and `add_new_mask`, with add_all_frames_to_correct_as_cond=True)

        Raises DatasetError before the first frame and for a prompt that cannot be used; the tracker is then unchanged.
        """
        return {i: logits > 0 for i, logits in self.refine_logits(prompts).items()}

    @torch.no_grad()
    def refine_logits(self, prompts: Mapping[int, Prompt]) -> dict[int, Tensor]:
        """As `refine`, but logits, (H, W) float: positive inside."""
        self._check_mode()
        last, t = self._last, self._frame - 1
        if last is None:
            raise DatasetError("there is nothing to refine; give a frame to step() first")
        if not prompts:
            raise DatasetError("refine() got no prompt; give a Prompt for each object to correct")
        given = self._prompts(t, prompts, last.frame_rgb)
        inputs = {i: _corrected(last, i, new) for i, new in given.items()}
        features = self._encode(last.frame_rgb) if last.features is None else last.features
        corrected = self._track(features, inputs)
        outputs = {**last.outputs, **corrected}
        masks = self._masks(outputs, last.frame_rgb)
        # nothing below fails, and nothing above has changed the state
        self._commit(t, corrected, set(given))
        self._last = _Frame(last.frame_rgb, features, {**last.inputs, **inputs}, outputs)
        return masks

    def _check_mode(self) -> None:
        if self.model.training:
            raise ConfigError("the model is in training mode; call its eval() before tracking")

    def _checked(self, frame: ArrayLike) -> np.ndarray:
        # a copy, because the caller may reuse the array before this frame is corrected
        frame_rgb = np.array(frame.cpu().numpy() if isinstance(frame, Tensor) else frame)
        if frame_rgb.dtype != np.uint8 or frame_rgb.ndim != 3 or frame_rgb.shape[2] != 3 or not frame_rgb.size:
            got = f"{frame_rgb.dtype} of shape {frame_rgb.shape}"
            raise DatasetError(f"frame {self._frame} is {got}, not an image; expected (H, W, 3) uint8 RGB")
        h, w, _ = frame_rgb.shape if self._last is None else self._last.frame_rgb.shape
        if frame_rgb.shape[:2] != (h, w):
            sizes = f"{frame_rgb.shape[0]}x{frame_rgb.shape[1]} but earlier frames are {h}x{w}"
            raise DatasetError(f"frame {self._frame} is {sizes}; resize it, or call reset() for another video")
        return frame_rgb

    def _prompts(self, t: int, prompts: Mapping[int, Prompt], frame_rgb: np.ndarray) -> dict[int, _Input]:
        height, width, _ = frame_rgb.shape
        device = self.model.device
        inputs = {}
        for i, prompt in prompts.items():
            try:
                number = operator.index(i)
            except TypeError:
                raise DatasetError(f"object id {i!r} is not an integer") from None
            value = read_prompt(f"prompt of object {i} on frame {t}", prompt, (height, width), self.model.image_size)
            if isinstance(value, Clicks):
                inputs[number] = _Input(clicks=Clicks(*(part.to(device) for part in value)))
            else:
                inputs[number] = _Input(mask=value.to(device))
        return inputs

    def _encode(self, frame_rgb: np.ndarray) -> dict[str, Any]:
        side, device = self.model.image_size, self.model.device
        # PIL's bicubic, as sam2 reads frames
        resized = np.array(Image.fromarray(frame_rgb).resize((side, side), Image.Resampling.BICUBIC))
        image = torch.from_numpy(resized).to(device).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.model.forward_image(((image - mean) / std)[None])
        # drop the encodings of finer levels, which nothing reads and which are most of what is kept for corrections
        return {**features, "vision_pos_enc": features["vision_pos_enc"][-1:]}

    def _inputs(self, t: int, prompts: Mapping[int, _Input]) -> dict[int, _Input]:
        ids = dict.fromkeys([*self._objects, *prompts])
        return {i: prompts[i] if i in prompts else _Input(bank=self._bank(self._objects[i], t)) for i in ids}

    def _track(self, features: Mapping[str, Any], inputs: Mapping[int, _Input]) -> dict[int, _Output]:
        """Decode objects on a frame and encode their memories; `features` come from `forward_image` for one image."""
        batches: dict[tuple[object, ...], dict[int, _Input]] = {}
        for i, one in inputs.items():
            batches.setdefault(one.shape, {})[i] = one
        outputs: dict[int, _Output] = {}
        for batch in batches.values():
            sam = self._decode(features, list(batch.values()))
            clicks = next(iter(batch.values())).clicks is not None
            outputs |= zip(batch, self._outputs(features, sam, clicks=clicks), strict=True)
        return {i: outputs[i] for i in inputs}

    def _decode(self, features: Mapping[str, Any], batch: list[_Input]) -> tuple[Tensor, ...]:
        """Return the model's `_forward_sam_heads` for inputs of one `shape`."""
        masks = [one.mask for one in batch if one.mask is not None]
        clicks = [one.clicks for one in batch if one.clicks is not None]
        banks = [one.bank for one in batch if one.bank is not None]
        before = [one.before for one in batch if one.before is not None]
        image, points = _expand(features, len(batch)), None
        high_res = features["backbone_fpn"][-3:-1] if self.model.use_high_res_features_in_sam else None
        if masks:
            return self.model._use_mask_as_output(image, high_res, torch.stack(masks))
        if clicks:
            coords, labels = (torch.stack(values) for values in zip(*clicks, strict=True))
            points = {"point_coords": coords, "point_labels": labels}
        image = self._condition(features, banks) if banks else image + self.model.no_mem_embed.view(1, -1, 1, 1)
        return self.model._forward_sam_heads(
            backbone_features=image,
            point_inputs=points,
            mask_inputs=torch.stack(before)[:, None].clamp(-_MAX_LOGIT, _MAX_LOGIT) if before else None,
            high_res_features=high_res,
            multimask_output=self.model._use_multimask(not banks, points),
        )

    def _condition(self, features: Mapping[str, Any], banks: list[_Bank]) -> Tensor:
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

    def _outputs(self, features: Mapping[str, Any], sam: tuple[Tensor, ...], *, clicks: bool) -> Iterator[_Output]:
        _, _, _, low, high, pointers, scores = sam
        image = _expand(features, len(low))
        memories, _ = self.model._encode_new_memory(
            current_vision_feats=[image.flatten(2).permute(2, 0, 1)],
            feat_sizes=[image.shape[-2:]],
            pred_masks_high_res=high,
            object_score_logits=scores,
            is_mask_from_pts=clicks,
        )
        memories = memories.to(self.memory_dtype or memories.dtype)
        for logits, score, pointer, memory in zip(low[:, 0], scores, pointers, memories, strict=True):
            # clones, because a slice would keep the complete batch alive
            yield _Output(logits, score, _Memory(pointer.clone(), memory.clone()))

    def _masks(self, outputs: Mapping[int, _Output], frame_rgb: np.ndarray) -> dict[int, Tensor]:
        if not outputs:
            return {}
        low = torch.stack([out.logits for out in outputs.values()])[:, None]
        logits = F.interpolate(low, frame_rgb.shape[:2], mode="bilinear", align_corners=False)  # (B, 1, H, W)
        if self.non_overlapping:
            logits = self.model._apply_non_overlapping_constraints(logits)
        return dict(zip(outputs, logits[:, 0], strict=True))

    def _reach(self) -> int:
        """Return the smallest distance in frames from which no pointer is read."""
        reach = self.model.max_obj_ptrs_in_encoder
        return reach if self.num_frames is None else min(reach, self.num_frames)

    def _slots(self, t: int) -> list[tuple[int, int]]:
        """Return (row of the temporal encoding, frame number) of the memories that frame `t` reads if they exist.

        These are the last frame and, before it, the frames with numbers that are multiples of the temporal stride.
        """
        stride = self.model.memory_temporal_stride_for_eval
        older = [((t - 2) // stride - k) * stride for k in range(self.model.num_maskmem - 2)]
        return list(enumerate([t - 1, *older][: self.model.num_maskmem - 1]))[::-1]

    def _bank(self, tracked: _Object, t: int) -> _Bank:
        from sam2.modeling.sam2_utils import select_closest_cond_frames

        model = self.model
        prompted, others = select_closest_cond_frames(t, tracked.prompted, model.max_cond_frames_in_attn)
        earlier = {**others, **tracked.tracked}
        memories = [(-1, memory.features) for memory in prompted.values()]
        memories += [(row, earlier[frame].features) for row, frame in self._slots(t) if frame in earlier]
        pointers = [(t - frame, memory.pointer) for frame, memory in prompted.items() if frame <= t]
        pointers += [(k, earlier[t - k].pointer) for k in range(1, self._reach()) if t - k in earlier]
        return _Bank(memories, pointers)

    def _commit(self, t: int, outputs: Mapping[int, _Output], prompted: set[int]) -> None:
        """Store the memories of frame `t`, and drop what no later frame will read."""
        later = range(t + 1, t + 1 + self.model.memory_temporal_stride_for_eval)
        read = {frame for following in later for _, frame in self._slots(following)}
        for i, output in outputs.items():
            tracked = self._objects.setdefault(i, _Object())
            tracked.tracked.pop(t, None)  # if the frame is corrected
            (tracked.prompted if i in prompted else tracked.tracked)[t] = output.memory
            if len(tracked.prompted) > self.max_prompted_frames:
                second = list(tracked.prompted)[1]
                tracked.tracked[second] = tracked.prompted.pop(second)
            for frame in list(tracked.tracked):
                if frame not in read:
                    tracked.tracked[frame].features = None
                    if frame <= t + 1 - self._reach():
                        del tracked.tracked[frame]


def _copied(objects: Mapping[int, _Object]) -> dict[int, _Object]:
    """Copy what later frames change: which memories there are and which have features; tensors are shared."""
    return {
        i: _Object(*({t: replace(m) for t, m in memories.items()} for memories in (one.prompted, one.tracked)))
        for i, one in objects.items()
    }


def _corrected(last: _Frame, object_id: int, new: _Input) -> _Input:
    """Combine a prompt with what an object was decoded from on the last frame, if it was tracked there."""
    if object_id not in last.inputs:
        return new
    earlier, clicks = last.inputs[object_id], new.clicks
    if clicks is None:
        return new._replace(bank=earlier.bank)  # read by clicks that follow the mask
    if earlier.clicks is not None and BOX_CORNERS[0] not in clicks.labels:
        clicks = Clicks(*(torch.cat(pair) for pair in zip(earlier.clicks, clicks, strict=True)))
    return _Input(clicks=clicks, bank=earlier.bank, before=last.outputs[object_id].logits)


def _expand(features: Mapping[str, Any], count: int) -> Tensor:
    return features["backbone_fpn"][-1].expand(count, -1, -1, -1)
