"""Track objects through a stream of frames with a SAM 2 model, in memory that does not grow.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, H x W pixels of a frame.
What a frame writes and the next ones read is as in facebookresearch/sam2@2b90b9f:sam2/modeling/sam2_base.py. That class
gives all objects of a batch the same history; here each has its own, so that objects which came at different frames
still run together.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.model import IMAGENET_MEAN, IMAGENET_STD

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
"""Flags of the model on which this tracker relies: SAM 2.1's."""

_CORNER = 2  # label of a box's first corner
_LOGITS = 32.0  # bound of the logits that clicks correct, the predictor's


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Where an object is on a frame: a mask, or clicks and a box, in pixels of the frame.

    Args:
        points: (n, 2), x and y of each click; the top left pixel is 0, 0.
        labels: (n,), 1 for a click on the object and 0 for one beside it.
        box: x0, y0, x1, y1.
        mask: (H, W), true or 1 on the object.
    """

    points: ArrayLike | None = None
    labels: ArrayLike | None = None
    box: ArrayLike | None = None
    mask: ArrayLike | None = None


class _Clicks(NamedTuple):
    points: Tensor  # (n, 2), in pixels of the model's image
    labels: Tensor  # (n,): 0 beside, 1 on the object, 2 and 3 corners of a box


@dataclass
class _Memory:
    """What a frame leaves of an object; `features` go when no later frame will read them."""

    pointer: Tensor  # (d,)
    features: Tensor | None  # (m, g, g)


@dataclass
class _Object:
    prompted: dict[int, _Memory] = field(default_factory=dict)  # by frame: conditioning frames
    tracked: dict[int, _Memory] = field(default_factory=dict)


class _Bank(NamedTuple):
    """What an object reads on a frame."""

    memories: list[tuple[int, Tensor]]  # (row of the temporal encoding, (m, g, g))
    pointers: list[tuple[int, Tensor]]  # (frames back, (d,))


class _Input(NamedTuple):
    """What an object is decoded from on a frame."""

    mask: Tensor | None = None  # (1, S, S), is the result as it stands
    clicks: _Clicks | None = None
    bank: _Bank | None = None  # None where the object begins: no memory is read
    before: Tensor | None = None  # (h, w), the logits that clicks correct

    @property
    def shape(self) -> tuple[object, ...]:
        """What inputs have in common that run as one batch."""
        clicks = self.clicks and len(self.clicks.labels)
        bank = self.bank and (len(self.bank.memories), len(self.bank.pointers))
        return self.mask is None, clicks, bank, self.before is None


class _Output(NamedTuple):
    logits: Tensor  # (h, w), at stride 4
    score: Tensor  # (1,), positive where the object is in the frame
    memory: _Memory


class _Frame(NamedTuple):
    """The last frame, kept for corrections until the next one."""

    frame_rgb: np.ndarray  # (H, W, 3) uint8
    features: dict[str, Any] | None  # of the model's `forward_image`; None where nothing has needed them
    inputs: dict[int, _Input]
    outputs: dict[int, _Output]


class StreamingTracker:
    """Objects through frames from any source, one at a time; time and memory do not depend on how many there were.

    A prompt makes its frame a conditioning frame of the object, decoded from the prompt alone, for a new object and for
    a known one. On all other frames an object is decoded from its memories: of the conditioning frames and of the last
    frames, as many as the model was built for. Objects with equally many memories run as one batch; that is all of them
    some frames after the last one came. What a frame gave can be corrected by `refine` until the next one is taken.

    Args:
        model: of `build_pe_sam2`, in evaluation mode.
        max_prompted_frames: conditioning frames kept for an object: the first one and the latest. One that is dropped
            stays as any other frame does.
        non_overlapping: give every pixel to one object at most, the likeliest.
        num_frames: of the video, if it is known and shorter than the model's `max_obj_ptrs_in_encoder`: SAM 2 scales
            the positions of pointers by it.
        memory_dtype: in which memories are kept; None as they come. sam2's own predictor takes torch.bfloat16.

    Raises ConfigError for a model with other flags than SAM 2.1's where they matter here.
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
            raise ConfigError(
                f"the model has num_maskmem={model.num_maskmem} and max_obj_ptrs_in_encoder="
                f"{model.max_obj_ptrs_in_encoder}; streaming needs at least 1 and 2"
            )
        if max_prompted_frames < 2:
            raise ConfigError(f"max_prompted_frames is {max_prompted_frames}; 2 is the least: the first and the latest")
        self.model = model
        self.max_prompted_frames = max_prompted_frames
        self.non_overlapping = non_overlapping
        self.num_frames = num_frames
        self.memory_dtype = memory_dtype
        self.reset()

    def reset(self) -> None:
        """Forget all objects; the next frame is the first of another video."""
        self._objects: dict[int, _Object] = {}
        self._frame = 0
        self._last: _Frame | None = None

    @property
    def objects(self) -> tuple[int, ...]:
        """Ids of the objects that are tracked."""
        return tuple(self._objects)

    def remove(self, object_id: int) -> None:
        """Stop tracking an object; DatasetError if there is none of that id."""
        if object_id not in self._objects:
            raise DatasetError(f"there is no object {object_id!r} to remove; tracked are {list(self._objects)}")
        del self._objects[object_id]
        assert self._last is not None  # objects come with frames
        for known in (self._last.inputs, self._last.outputs):
            known.pop(object_id, None)

    def step(self, frame: ArrayLike, prompts: Mapping[int, Prompt] | None = None) -> dict[int, Tensor]:
        """Take the next frame and return the mask of every object, (H, W) bool on the model's device, by its id.

        Args:
            frame: (H, W, 3) uint8, R, G, B.
            prompts: by object id; an id that is not yet tracked begins an object.

        Raises DatasetError for a frame or prompt that cannot be used; the tracker then stands as before the call.
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
        features, outputs = None, {}
        if inputs:
            features = self._encode(frame_rgb)
            outputs = self._track(features, inputs)
        masks = self._masks(outputs, frame_rgb)
        # nothing below fails, and nothing above has changed the state
        self._commit(t, outputs, set(given))
        self._frame += 1
        self._last = _Frame(frame_rgb, features, inputs, outputs)
        return masks

    def refine(self, prompts: Mapping[int, Prompt]) -> dict[int, Tensor]:
        """Correct objects, or begin some, on the frame that `step` took last; return the masks of all its objects.

        It may be called again and again before the next `step`. Only the objects of `prompts` are decoded anew, and the
        frame becomes a conditioning frame of theirs. Clicks add up to those that the object was given on this frame
        before, and correct its latest mask there, seen with the memories that the frame was decoded from; a box begins
        the clicks anew. A mask takes the place of all that.
        (facebookresearch/sam2@2b90b9f:sam2/sam2_video_predictor.py, `add_new_points_or_box` and `add_new_mask`, with
        add_all_frames_to_correct_as_cond=True)

        Args:
            prompts: by object id; an id that is not yet tracked begins an object.

        Raises DatasetError before the first frame and for a prompt that cannot be used; the tracker then stands as
        before the call.
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

    # -- what comes in

    def _check_mode(self) -> None:
        if self.model.training:
            raise ConfigError("the model is in training mode; call its eval() before tracking")

    def _checked(self, frame: ArrayLike) -> np.ndarray:
        # a copy: the caller may read the next frame into the same array before this one is corrected
        frame_rgb = np.array(frame.cpu().numpy() if isinstance(frame, Tensor) else frame)
        if frame_rgb.dtype != np.uint8 or frame_rgb.ndim != 3 or frame_rgb.shape[2] != 3 or not frame_rgb.size:
            raise DatasetError(
                f"frame {self._frame} is {frame_rgb.dtype} of shape {frame_rgb.shape}, not an image; "
                "expected (H, W, 3) uint8 in the order R, G, B"
            )
        size = frame_rgb.shape if self._last is None else self._last.frame_rgb.shape
        if frame_rgb.shape != size:
            raise DatasetError(
                f"frame {self._frame} is {frame_rgb.shape[0]}x{frame_rgb.shape[1]} but those before it are "
                f"{size[0]}x{size[1]}; resize it, or call reset() for another video"
            )
        return frame_rgb

    def _prompts(self, t: int, prompts: Mapping[int, Prompt], frame_rgb: np.ndarray) -> dict[int, _Input]:
        height, width, _ = frame_rgb.shape
        where = f"prompt of object {{}} on frame {t}".format
        return {self._id(i): self._prompt(where(i), new, (height, width)) for i, new in prompts.items()}

    def _id(self, object_id: Any) -> int:
        try:
            return operator.index(object_id)
        except TypeError:
            raise DatasetError(f"object id {object_id!r} is no integer") from None

    def _prompt(self, where: str, prompt: Prompt, size: tuple[int, int]) -> _Input:
        if not isinstance(prompt, Prompt):
            raise DatasetError(f"{where} is a {type(prompt).__name__}; give a Prompt(points=, labels=, box=, mask=)")
        clicks = prompt.points is not None or prompt.box is not None
        if clicks == (prompt.mask is not None):
            raise DatasetError(f"{where} needs points, a box or both, or else a mask")
        if (prompt.points is None) != (prompt.labels is None):
            raise DatasetError(f"{where} has points without labels or labels without points; give one label to a point")
        if prompt.mask is not None:
            return _Input(mask=self._mask(where, prompt.mask, size))
        return _Input(clicks=self._clicks(where, prompt, size))

    def _clicks(self, where: str, prompt: Prompt, size: tuple[int, int]) -> _Clicks:
        height, width = size
        points, labels = np.zeros((0, 2), np.float32), np.zeros(0, np.int32)
        if prompt.points is not None:
            points, labels = _numbers(where, prompt.points), _numbers(where, prompt.labels)
            if points.ndim != 2 or points.shape[1] != 2 or labels.shape != points.shape[:1] or not points.size:
                raise DatasetError(f"{where} has points {points.shape} and labels {labels.shape}; give (n, 2) and (n,)")
            if not np.isin(labels, (0, 1)).all():
                raise DatasetError(f"{where} has labels {labels.tolist()}; 1 is on the object and 0 beside it")
            inside = (points >= 0) & (points < (width, height))
            if not inside.all():
                outside = points[~inside.all(axis=1)][0].tolist()
                raise DatasetError(f"{where} has a point at {outside}, outside of the frame of {width}x{height} (x, y)")
        if prompt.box is not None:
            box = _numbers(where, prompt.box)
            if box.shape != (4,) or not (0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height):
                raise DatasetError(
                    f"{where} has the box {box.tolist()}; expected x0 < x1 and y0 < y1 within the frame of "
                    f"{width}x{height}"
                )
            points, labels = np.concatenate((box.reshape(2, 2), points)), np.concatenate(((2, 3), labels))
        scaled = torch.from_numpy(points).float() / torch.tensor([width, height]) * self.model.image_size
        device = self.model.device
        return _Clicks(scaled.to(device), torch.from_numpy(labels).to(device, torch.int32))

    def _mask(self, where: str, mask: ArrayLike, size: tuple[int, int]) -> Tensor:
        values = _numbers(where, mask)
        if values.shape != size or not ((values == 0) | (values == 1)).all():
            raise DatasetError(
                f"{where} has a mask of shape {values.shape} with values from {values.min(initial=0):g} to "
                f"{values.max(initial=0):g}; expected {size}, the frame's, with 0 and 1 (palette == id)"
            )
        if not values.any():
            raise DatasetError(f"{where} has an empty mask; leave the prompt out where the object is absent")
        side = self.model.image_size
        small = torch.from_numpy(values).float()[None].to(self.model.device)
        if size != (side, side):
            small = F.interpolate(small[None], (side, side), mode="bilinear", align_corners=False, antialias=True)[0]
        # sam2 takes what is covered by half; a smaller object than a pixel of the model keeps what is covered most
        return (small >= small.max().clamp(max=0.5)).float()

    def _encode(self, frame_rgb: np.ndarray) -> dict[str, Any]:
        side, device = self.model.image_size, self.model.device
        # PIL's bicubic, as sam2 reads frames
        resized = np.array(Image.fromarray(frame_rgb).resize((side, side), Image.Resampling.BICUBIC))
        image = torch.from_numpy(resized).to(device).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
        features = self.model.forward_image(((image - mean) / std)[None])
        # the frame is kept for corrections, and encodings of finer levels, which nothing reads, are most of it
        return {**features, "vision_pos_enc": features["vision_pos_enc"][-1:]}

    # -- one frame

    def _inputs(self, t: int, prompts: Mapping[int, _Input]) -> dict[int, _Input]:
        """Return what every object is decoded from on frame `t`; history may lie on both sides of it."""
        ids = dict.fromkeys([*self._objects, *prompts])
        return {i: prompts[i] if i in prompts else _Input(bank=self._bank(self._objects[i], t)) for i in ids}

    def _track(self, features: Mapping[str, Any], inputs: Mapping[int, _Input]) -> dict[int, _Output]:
        """Decode objects on a frame and encode their memories; `features` are of `forward_image`, for one image."""
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
        """Return what the model's `_forward_sam_heads` gives for inputs of one shape."""
        masks = [one.mask for one in batch if one.mask is not None]
        clicks = [one.clicks for one in batch if one.clicks is not None]
        banks = [one.bank for one in batch if one.bank is not None]
        before = [one.before for one in batch if one.before is not None]
        image, high_res, points = _expand(features, len(batch)), self._high_res(features), None
        if masks:
            return self.model._use_mask_as_output(image, high_res, torch.stack(masks))
        if clicks:
            coords, labels = (torch.stack(values) for values in zip(*clicks, strict=True))
            points = {"point_coords": coords, "point_labels": labels}
        if banks:
            image = self._condition(features, banks)
        else:
            image = image + self.model.no_mem_embed.view(1, -1, 1, 1)
        return self.model._forward_sam_heads(
            backbone_features=image,
            point_inputs=points,
            mask_inputs=torch.stack(before)[:, None].clamp(-_LOGITS, _LOGITS) if before else None,
            high_res_features=high_res,
            multimask_output=self.model._use_multimask(not banks, points),
        )

    def _high_res(self, features: Mapping[str, Any]) -> list[Tensor] | None:
        return features["backbone_fpn"][-3:-1] if self.model.use_high_res_features_in_sam else None

    def _condition(self, features: Mapping[str, Any], banks: list[_Bank]) -> Tensor:
        """Attend from the frame to the memories of each object; (B, d, g, g)."""
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
        pointer_pos = model.obj_ptr_tpos_proj(_sine(back / (self._reach() - 1), model.hidden_dim))  # (B, p, m)
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
            # copies, because a slice would keep the whole batch alive
            yield _Output(logits, score, _Memory(pointer.clone(), memory.clone()))

    def _masks(self, outputs: Mapping[int, _Output], frame_rgb: np.ndarray) -> dict[int, Tensor]:
        if not outputs:
            return {}
        low = torch.stack([out.logits for out in outputs.values()])[:, None]
        logits = F.interpolate(low, frame_rgb.shape[:2], mode="bilinear", align_corners=False)  # (B, 1, H, W)
        if self.non_overlapping:
            logits = self.model._apply_non_overlapping_constraints(logits)
        return dict(zip(outputs, logits[:, 0], strict=True))

    # -- history

    def _reach(self) -> int:
        """One more than the frames back from which pointers are read."""
        reach = self.model.max_obj_ptrs_in_encoder
        return reach if self.num_frames is None else min(reach, self.num_frames)

    def _slots(self, t: int) -> list[tuple[int, int]]:
        """Return (row of the temporal encoding, frame) of the memories that frame `t` reads if they exist, in order.

        The last frame always, and before it every frame whose number is a multiple of the temporal stride.
        """
        stride = self.model.memory_temporal_stride_for_eval
        older = [((t - 2) // stride - k) * stride for k in range(self.model.num_maskmem - 2)]
        frames = [t - 1, *older][: self.model.num_maskmem - 1]
        return list(enumerate(frames))[::-1]

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
        """Write what frame `t` leaves, and drop what no later frame will read."""
        later = range(t + 1, t + 1 + self.model.memory_temporal_stride_for_eval)
        read = {frame for following in later for _, frame in self._slots(following)}
        for i, output in outputs.items():
            tracked = self._objects.setdefault(i, _Object())
            tracked.tracked.pop(t, None)  # of a frame that is corrected
            (tracked.prompted if i in prompted else tracked.tracked)[t] = output.memory
            if len(tracked.prompted) > self.max_prompted_frames:
                second = list(tracked.prompted)[1]
                tracked.tracked[second] = tracked.prompted.pop(second)
            for frame in list(tracked.tracked):
                if frame not in read:
                    tracked.tracked[frame].features = None
                    if frame <= t + 1 - self._reach():
                        del tracked.tracked[frame]


def _corrected(last: _Frame, object_id: int, new: _Input) -> _Input:
    """Add a prompt to what an object was decoded from on the last frame, if it was there."""
    if object_id not in last.inputs:
        return new
    known = last.inputs[object_id]
    if new.clicks is None:
        return new._replace(bank=known.bank)  # for clicks that come after the mask
    clicks = new.clicks
    if known.clicks is not None and _CORNER not in clicks.labels:
        clicks = _Clicks(*(torch.cat(pair) for pair in zip(known.clicks, clicks, strict=True)))
    return _Input(clicks=clicks, bank=known.bank, before=last.outputs[object_id].logits)


def _expand(features: Mapping[str, Any], count: int) -> Tensor:
    """Return the frame's coarsest features for `count` objects, (B, d, g, g)."""
    return features["backbone_fpn"][-1].expand(count, -1, -1, -1)


def _sine(positions: Tensor, dim: int) -> Tensor:
    from sam2.modeling.sam2_utils import get_1d_sine_pe

    return get_1d_sine_pe(positions, dim)


def _numbers(where: str, values: ArrayLike) -> np.ndarray:
    """Return finite float32 numbers."""
    try:
        array = values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
        array = array.astype(np.float32)
    except (TypeError, ValueError):
        array = np.full(1, np.nan, np.float32)
    if not np.isfinite(array).all():
        raise DatasetError(f"{where} holds something else than finite numbers")
    return array
