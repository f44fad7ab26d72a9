"""Tracking of objects through a stream of frames, but for the network: what is remembered, prompted and corrected.

Shapes: B objects, g the model's grid, d its width, m channels of a memory, S its image size, H x W pixels of a frame.
What a frame stores and later frames read is as in facebookresearch/sam2@2b90b9f:sam2/modeling/sam2_base.py. There all
objects of a batch share one history; here each object has its own, so that objects which began on different frames
still run as one batch. Arrays of the network may be tensors of torch or numpy's; importing this needs numpy alone.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.prompts import BOX_CORNERS, Clicks, Prompt, read_prompt
from pe_spatial.tracking.vos.masks import join_masks

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from pe_spatial.tracking.vos.clip import Clip

_log = logging.getLogger(__name__)

MAX_LOGIT = 32.0
"""Bound of the logits that clicks correct, as in sam2's predictor."""


@dataclass(frozen=True, kw_only=True)
class MemorySettings:
    """What a model remembers; the names are those of `SAM2Base`."""

    image_size: int
    num_maskmem: int
    max_obj_ptrs_in_encoder: int
    max_cond_frames_in_attn: int
    memory_temporal_stride_for_eval: int

    def __post_init__(self) -> None:
        if self.num_maskmem < 1 or self.max_obj_ptrs_in_encoder < 2:
            given = f"num_maskmem={self.num_maskmem} and max_obj_ptrs_in_encoder={self.max_obj_ptrs_in_encoder}"
            raise ConfigError(f"the model has {given}; streaming needs at least 1 and 2")


@dataclass
class Memory:
    """What a frame stores of an object; `features` are dropped when no later frame will read them."""

    pointer: Any  # (d,)
    features: Any | None  # (m, g, g)


@dataclass
class History:
    """What is stored of an object."""

    prompted: dict[int, Memory] = field(default_factory=dict)  # conditioning frames, by number
    tracked: dict[int, Memory] = field(default_factory=dict)


class Bank(NamedTuple):
    """What an object reads on a frame."""

    memories: list[tuple[int, Any]]  # (row of the temporal encoding, (m, g, g))
    pointers: list[tuple[int, Any]]  # (frames back, (d,))


class Input(NamedTuple):
    """What an object is decoded from on a frame."""

    mask: Any | None = None  # (1, S, S), becomes the result unchanged
    clicks: Clicks | None = None
    bank: Bank | None = None  # None where the object begins
    before: Any | None = None  # (h, w), the logits that clicks correct

    @property
    def shape(self) -> tuple[object, ...]:
        """Inputs with the same value can run as one batch."""
        clicks = self.clicks and len(self.clicks.labels)
        bank = self.bank and (len(self.bank.memories), len(self.bank.pointers))
        return self.mask is None, clicks, bank, self.before is None


class Output(NamedTuple):
    """What an object is on a frame."""

    logits: Any  # (h, w), at stride 4
    score: Any  # (1,), positive where the object is in the frame
    memory: Memory


class Frame(NamedTuple):
    """The last frame, kept for corrections until the next frame."""

    frame_rgb: np.ndarray  # (H, W, 3) uint8
    features: Any  # from `_encode`; None if nothing has needed them
    inputs: dict[int, Input]
    outputs: dict[int, Output]


class Snapshot(NamedTuple):
    """What a tracker knows after a frame; see `OnlineTracker.snapshot`."""

    objects: dict[int, History]
    frame: int
    last: Frame | None


class OnlineTracker:
    """Tracks objects through frames from any source, one by one; time and memory do not depend on their number.

    A prompt makes its frame a conditioning frame of the object, decoded from the prompt alone, for a new object as for
    a tracked one. On all other frames an object is decoded from its memories: those of the conditioning frames and of
    the last frames, as many as the model was built for. Objects with equally many memories run as one batch; some
    frames after the last prompt that is all of them. `refine` corrects the result of the last frame.

    A subclass runs the network: `_encode`, `_run` and `_masks`.

    Args:
        settings: what the model remembers.
        max_prompted_frames: conditioning frames kept for an object: the first and the latest ones. A dropped one
            becomes an ordinary frame.
        non_overlapping: assign every pixel to at most one object, the likeliest.
        num_frames: length of the video, if it is known and shorter than the model's `max_obj_ptrs_in_encoder`: SAM 2
            scales the positions of pointers by it.
    """

    def __init__(
        self, settings: MemorySettings, *, max_prompted_frames: int = 4, non_overlapping: bool = False,
        num_frames: int | None = None,
    ) -> None:  # fmt: skip
        if max_prompted_frames < 2:
            raise ConfigError(f"max_prompted_frames is {max_prompted_frames}; 2 is the least: the first and the latest")
        self.settings, self.num_frames, self.max_prompted_frames = settings, num_frames, max_prompted_frames
        self.non_overlapping = non_overlapping
        self.reset()

    def _check_mode(self) -> None:
        """Raise ConfigError if the network cannot run now."""

    def _encode(self, frame_rgb: np.ndarray) -> Any:
        """Return the features of an image (H, W, 3)."""
        raise NotImplementedError

    def _run(self, features: Any, batch: Sequence[Input]) -> Sequence[Output]:
        """Decode objects, whose inputs have one `shape`, on a frame, and encode their memories."""
        raise NotImplementedError

    def _masks(self, outputs: Mapping[int, Output], frame_rgb: np.ndarray) -> dict[int, Any]:
        """Return logits (H, W) of each object."""
        raise NotImplementedError

    def reset(self) -> None:
        """Remove all objects; the next frame is the first of another video."""
        self._objects: dict[int, History] = {}
        self._frame = 0
        self._last: Frame | None = None

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

    @property
    def confidence(self) -> dict[int, float]:
        """How sure the model is of each object on the last frame, 0 to 1: of its presence, times of the mask's pixels.

        1 for an object that is surely absent.
        """
        found = {}
        for i, out in (self._last.outputs if self._last else {}).items():
            present = (1 + float(np.tanh(float(out.score) / 2))) / 2
            inside = np.array(out.logits[out.logits > 0].tolist())
            sure = float(np.tanh(inside / 2).mean()) if inside.size else 0.0
            found[i] = max(present * sure, 1 - present)
        return found

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

    def step(self, frame: ArrayLike, prompts: Mapping[int, Prompt] | None = None) -> dict[int, Any]:
        """Take the next frame and return the mask of every object, (H, W) bool on the model's device, by its id.

        `frame` is (H, W, 3) uint8 RGB; an id in `prompts` that is not tracked yet begins an object. Raises DatasetError
        for a frame or prompt that cannot be used; the tracker is then unchanged.
        """
        return {i: logits > 0 for i, logits in self.step_logits(frame, prompts).items()}

    def step_logits(self, frame: ArrayLike, prompts: Mapping[int, Prompt] | None = None) -> dict[int, Any]:
        """As `step`, but logits, (H, W) float: positive inside."""
        self._check_mode()
        t = self._frame
        if self.num_frames is not None and t >= self.num_frames:
            raise DatasetError(f"this is frame {t} of a video of num_frames={self.num_frames}; reset() first")
        frame_rgb = self._checked(frame)
        given = self._prompts(t, prompts or {}, frame_rgb)
        inputs = self._inputs(t, given)
        features = self._encode(frame_rgb) if inputs else None
        outputs = self._track(features, inputs) if inputs else {}
        masks = self._masks(outputs, frame_rgb)
        # nothing below fails, and nothing above has changed the state
        self._commit(t, outputs, set(given))
        self._frame += 1
        self._last = Frame(frame_rgb, features, inputs, outputs)
        return masks

    def refine(self, prompts: Mapping[int, Prompt]) -> dict[int, Any]:
        """Correct objects, or begin new ones, on the frame of the last `step`; return the masks of all its objects.

        It may be called repeatedly before the next `step`. Only the objects in `prompts` are decoded again, and the
        frame becomes a conditioning frame for them. Clicks are added to the object's earlier clicks on this frame and
        correct its latest mask there, with the memories that the frame was decoded from. A box discards earlier
        clicks, and a mask replaces everything. (facebookresearch/sam2@2b90b9f:sam2/sam2_video_predictor.py,
        `add_new_points_or_box` and `add_new_mask`, with add_all_frames_to_correct_as_cond=True)

        Raises DatasetError before the first frame and for a prompt that cannot be used; the tracker is then unchanged.
        """
        return {i: logits > 0 for i, logits in self.refine_logits(prompts).items()}

    def refine_logits(self, prompts: Mapping[int, Prompt]) -> dict[int, Any]:
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
        self._last = Frame(last.frame_rgb, features, {**last.inputs, **inputs}, outputs)
        return masks

    def _checked(self, frame: ArrayLike) -> np.ndarray:
        # a copy, because the caller may reuse the array before this frame is corrected
        frame_rgb = _numpy(frame).copy()
        if frame_rgb.dtype != np.uint8 or frame_rgb.ndim != 3 or frame_rgb.shape[2] != 3 or not frame_rgb.size:
            got = f"{frame_rgb.dtype} of shape {frame_rgb.shape}"
            raise DatasetError(f"frame {self._frame} is {got}, not an image; expected (H, W, 3) uint8 RGB")
        h, w, _ = frame_rgb.shape if self._last is None else self._last.frame_rgb.shape
        if frame_rgb.shape[:2] != (h, w):
            sizes = f"{frame_rgb.shape[0]}x{frame_rgb.shape[1]} but earlier frames are {h}x{w}"
            raise DatasetError(f"frame {self._frame} is {sizes}; resize it, or call reset() for another video")
        return frame_rgb

    def _prompts(self, t: int, prompts: Mapping[int, Prompt], frame_rgb: np.ndarray) -> dict[int, Input]:
        height, width, _ = frame_rgb.shape
        inputs = {}
        for i, prompt in prompts.items():
            try:
                number = operator.index(i)
            except TypeError:
                raise DatasetError(f"object id {i!r} is not an integer") from None
            value = read_prompt(f"prompt of object {i} on frame {t}", prompt, (height, width), self.settings.image_size)
            inputs[number] = Input(clicks=value) if isinstance(value, Clicks) else Input(mask=value)
        return inputs

    def _inputs(self, t: int, prompts: Mapping[int, Input]) -> dict[int, Input]:
        ids = dict.fromkeys([*self._objects, *prompts])
        return {i: prompts[i] if i in prompts else Input(bank=self._bank(self._objects[i], t)) for i in ids}

    def _track(self, features: Any, inputs: Mapping[int, Input]) -> dict[int, Output]:
        """Decode objects on a frame and encode their memories; `features` come from `_encode`."""
        batches: dict[tuple[object, ...], dict[int, Input]] = {}
        for i, one in inputs.items():
            batches.setdefault(one.shape, {})[i] = one
        outputs: dict[int, Output] = {}
        for batch in batches.values():
            outputs |= zip(batch, self._run(features, list(batch.values())), strict=True)
        return {i: outputs[i] for i in inputs}

    def _reach(self) -> int:
        """Return the smallest distance in frames from which no pointer is read."""
        reach = self.settings.max_obj_ptrs_in_encoder
        return reach if self.num_frames is None else min(reach, self.num_frames)

    def _slots(self, t: int) -> list[tuple[int, int]]:
        """Return (row of the temporal encoding, frame number) of the memories that frame `t` reads if they exist.

        These are the last frame and, before it, the frames with numbers that are multiples of the temporal stride.
        """
        stride = self.settings.memory_temporal_stride_for_eval
        older = [((t - 2) // stride - k) * stride for k in range(self.settings.num_maskmem - 2)]
        return list(enumerate([t - 1, *older][: self.settings.num_maskmem - 1]))[::-1]

    def _bank(self, tracked: History, t: int) -> Bank:
        read = closest(tracked.prompted, t, self.settings.max_cond_frames_in_attn)
        prompted = {frame: tracked.prompted[frame] for frame in read}
        earlier = {**tracked.prompted, **tracked.tracked}
        for frame in prompted:
            del earlier[frame]
        memories = [(-1, memory.features) for memory in prompted.values()]
        memories += [(row, earlier[frame].features) for row, frame in self._slots(t) if frame in earlier]
        pointers = [(t - frame, memory.pointer) for frame, memory in prompted.items() if frame <= t]
        pointers += [(k, earlier[t - k].pointer) for k in range(1, self._reach()) if t - k in earlier]
        return Bank(memories, pointers)

    def _commit(self, t: int, outputs: Mapping[int, Output], prompted: set[int]) -> None:
        """Store the memories of frame `t`, and drop what no later frame will read."""
        later = range(t + 1, t + 1 + self.settings.memory_temporal_stride_for_eval)
        read = {frame for following in later for _, frame in self._slots(following)}
        for i, output in outputs.items():
            tracked = self._objects.setdefault(i, History())
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


def model_image(frame_rgb: np.ndarray, side: int) -> np.ndarray:
    """Resize a frame (H, W, 3) uint8 to (side, side, 3), by PIL's bicubic, as sam2 reads frames."""
    return np.array(Image.fromarray(frame_rgb).resize((side, side), Image.Resampling.BICUBIC))


def closest(frames: Collection[int], t: int, count: int) -> list[int]:
    """Return the `count` conditioning frames that frame `t` reads, -1 for all, in the order of sam2.

    They are the last one before `t`, the first one from `t` on, and the nearest of the others.
    (facebookresearch/sam2@2b90b9f:sam2/modeling/sam2_utils.py, `select_closest_cond_frames`)
    """
    if count == -1 or len(frames) <= count:
        return list(frames)
    around = [max((f for f in frames if f < t), default=None), min((f for f in frames if f >= t), default=None)]
    chosen = [frame for frame in around if frame is not None]
    others = sorted((frame for frame in frames if frame not in chosen), key=lambda frame: abs(frame - t))
    return [*chosen, *others[: count - len(chosen)]]


def _copied(objects: Mapping[int, History]) -> dict[int, History]:
    """Copy what later frames change: which memories there are and which have features; tensors are shared."""
    return {
        i: History(*({t: replace(m) for t, m in memories.items()} for memories in (one.prompted, one.tracked)))
        for i, one in objects.items()
    }


def _corrected(last: Frame, object_id: int, new: Input) -> Input:
    """Combine a prompt with what an object was decoded from on the last frame, if it was tracked there."""
    if object_id not in last.inputs:
        return new
    earlier, clicks = last.inputs[object_id], new.clicks
    if clicks is None:
        return new._replace(bank=earlier.bank)  # read by clicks that follow the mask
    if earlier.clicks is not None and BOX_CORNERS[0] not in clicks.labels:
        clicks = Clicks(*(np.concatenate(pair) for pair in zip(earlier.clicks, clicks, strict=True)))
    return Input(clicks=clicks, bank=earlier.bank, before=last.outputs[object_id].logits)


def track_clip(
    tracker: OnlineTracker, clip: Clip, prompts: Mapping[int, Mapping[int, Prompt]]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield the name, the image (H, W, 3) uint8 RGB and the index mask (H, W) uint8 of each frame.

    The masks of `tracker` must not overlap; those of `clip` are not read. `prompts` are frame number -> object id ->
    `Prompt`; DatasetError for a frame that does not exist, or a warning where only the end of a video file shows it.
    """
    last, count = max(prompts, default=0), 0
    if last >= len(clip) > 0:
        raise DatasetError(f"{clip.name} has {len(clip)} frames, so there is no frame {last} to prompt on")
    for name, rgb in clip.read():
        masks = tracker.step(rgb, prompts.get(count))
        count += 1
        yield name, rgb, join_masks({i: _numpy(mask) for i, mask in masks.items()}, rgb.shape[:2])
    if last >= count:
        _log.warning("%s has %d frames, so there is no frame %d to prompt on", clip.name, count, last)


def _numpy(array: Any) -> np.ndarray:
    return array.cpu().numpy() if hasattr(array, "cpu") else np.asarray(array)
