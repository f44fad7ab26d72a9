"""The streaming tracker: reference values frame by frame, the package's own predictor, bounded memory, bad input."""

import copy
import gc
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.golden import read_arrays, read_weights
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

from pe_spatial import EncoderConfig
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.tracking.sam2.model import build_pe_sam2, load_sam2_weights
from pe_spatial.tracking.sam2.online import History, Input, Memory, closest
from pe_spatial.tracking.sam2.prompts import Prompt, read_prompt
from pe_spatial.tracking.sam2.streaming import StreamingTracker

pytest.importorskip("sam2")

TINY = EncoderConfig(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2)
SMALL = dict(d_model=32, mem_dim=8, layers=2, feedforward=96)


def build(randomize, **flags):
    """A tiny tracker with random weights whose objects are always in the frame; of the class of sam2's predictor."""
    torch.manual_seed(0)  # of the prompt encoder's positions, which are a buffer
    model = randomize(build_pe_sam2(TINY, 4, cls="video", flags=flags, d_model=32, mem_dim=8, layers=1, feedforward=32))
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)
    return model


@pytest.fixture(scope="module")
def model(randomize):
    return build(randomize)


@pytest.fixture(scope="module")
def short(randomize):
    """The same with a short memory, which a few frames fill."""
    return build(randomize, num_maskmem=3, max_obj_ptrs_in_encoder=4)


def clip(frames, size=(60, 80), seed=0):
    """Noise that drifts, (T, H, W, 3) uint8."""
    rng = np.random.default_rng(seed)
    small = torch.from_numpy(rng.random((1, 3, 6, 8 + frames)))
    wide = torch.nn.functional.interpolate(small, (size[0], size[1] + 4 * frames), mode="bicubic")[0].clamp(0, 1)
    views = [wide[:, :, 4 * t : 4 * t + size[1]] for t in range(frames)]
    return [(view.permute(1, 2, 0) * 255).byte().numpy() for view in views]


GOOD = clip(1)[0]
CLICK = Prompt(points=[[30, 20]], labels=[1])
CLICKS = Prompt(points=[[30, 20], [50, 40]], labels=[1, 0])
BOX = Prompt(box=[10, 5, 60, 40])


def square(size=(60, 80)):
    mask = np.zeros(size, bool)
    mask[10:40, 20:60] = True
    return Prompt(mask=mask)


def run(model, frames, prompts, **options):
    """Logits of every frame; `prompts` by frame and object id."""
    tracker = StreamingTracker(model, **options)
    return [tracker.step_logits(frame, prompts.get(t)) for t, frame in enumerate(frames)]


# -- reference values


class Recorded(nn.Module):
    """Stands for the image encoder: gives the recorded pyramid of one frame after the other."""

    def __init__(self, levels, neck):
        super().__init__()
        self.neck, self.levels, self.frame = neck, levels, 0

    def forward(self, _: Tensor) -> dict[str, list[Tensor]]:
        maps = [level[self.frame : self.frame + 1] for level in self.levels]
        self.frame += 1
        return {"backbone_fpn": maps, "vision_pos_enc": [self.neck.position_encoding(x) for x in maps]}


class Case:
    """A reference case with its model, whose image encoder gives the recorded features."""

    def __init__(self, folder, name, tmp_path):
        self.values = read_arrays(folder / f"{name}.npz")
        changed = {}
        if "short_memory" in name:
            changed = dict(
                num_maskmem=3,
                max_obj_ptrs_in_encoder=4,
                memory_temporal_stride_for_eval=2,
                max_cond_frames_in_attn=-1,
            )
        self.size = 224 if "stride14" in name else 256
        encoder = EncoderConfig(img_size=self.size, patch_size=self.size // 16, embed_dim=32, depth=1, num_heads=2)
        self.model = build_pe_sam2(encoder, 16, true_stride=True, flags=changed, **SMALL)
        assert (self.model.image_size, self.model.backbone_stride) == (self.size, self.size // 16)
        weights = read_weights(folder / "weights.pt")
        weights["maskmem_tpos_enc"] = weights["maskmem_tpos_enc"][: self.model.num_maskmem]
        torch.save({"model": weights}, tmp_path / "weights.pt")
        load_sam2_weights(self.model, tmp_path / "weights.pt")
        features = read_arrays(folder / "features.npz")
        levels = [torch.from_numpy(features[f"stride{s}"]).float() / 24 for s in (4, 8, 16)]
        self.frames = len(levels[0])
        self.model.image_encoder = Recorded(levels, self.model.image_encoder.neck)
        self.tracker = StreamingTracker(self.model, num_frames=self.frames)

    def tensor(self, name):
        return torch.from_numpy(self.values[name])

    def mask(self, frame):
        bits = np.unpackbits(self.values[f"input/mask_frame{frame}"], axis=-1)
        return torch.from_numpy(bits).bool()  # (B, S, S)

    def features(self, frame):
        self.model.image_encoder.frame = frame
        return self.model.forward_image(torch.zeros(1))

    def check(self, frame, outputs, tolerance):
        for i, out in outputs.items():
            for name, value in {
                "low_res_masks": out.logits[None],
                "object_score_logits": out.score,
                "obj_ptr": out.memory.pointer,
                "maskmem_features": out.memory.features,
            }.items():
                assert_close(value, self.tensor(f"frame{frame}/{name}")[i], rtol=0, atol=tolerance)


@pytest.fixture
def outputs(monkeypatch):
    """What the tracker computed for each object on the latest frame."""
    latest = {}
    track = StreamingTracker._track

    def spy(self, *args):
        latest.clear()
        latest.update(track(self, *args))
        return dict(latest)

    monkeypatch.setattr(StreamingTracker, "_track", spy)
    return latest


@pytest.mark.parametrize("name", ["mask_prompt_stride16", "mask_prompt_stride14", "point_prompt_stride16"])
def test_equals_reference_frame_by_frame(golden, tmp_path, outputs, name):
    case = Case(golden / "sam2", name, tmp_path)
    if "point" in name:
        points, labels = case.values["input/points_frame0"], case.values["input/labels_frame0"]
        prompts = {i: Prompt(points=points[i], labels=labels[i]) for i in range(2)}
    else:
        prompts = {i: Prompt(mask=mask) for i, mask in enumerate(case.mask(0))}
    frame = np.zeros((case.size, case.size, 3), np.uint8)
    for t in range(case.frames):
        logits = case.tracker.step_logits(frame, prompts if t == 0 else None)
        case.check(t, outputs, 5e-4)
        if t or "point" in name:  # (of a mask prompt the mask itself is recorded)
            whole = torch.stack(list(logits.values())).double()
            mean_std = torch.stack((whole.mean(), whole.std()))
            assert_close(mean_std, case.tensor(f"frame{t}/high_res_mean_std"), rtol=0, atol=5e-4)


def test_equals_reference_with_two_conditioning_frames_and_short_memory(golden, tmp_path, outputs):
    """The later conditioning frame runs first, and on it an object is absent: not for a stream, but for its parts."""
    case = Case(golden / "sam2", "two_conditioning_frames_short_memory", tmp_path)
    for t in [0, 5, *(t for t in range(case.frames) if t not in (0, 5))]:
        masks = case.mask(t).float().numpy() if t in (0, 5) else ()
        prompts = {i: Input(mask=mask[None]) for i, mask in enumerate(masks)}
        inputs = case.tracker._inputs(t, prompts)
        case.tracker._commit(t, case.tracker._track(case.features(t), inputs), set(prompts))
        case.check(t, outputs, 5e-4)


@pytest.mark.parametrize(
    ("name", "prompted"),
    [
        ("mask_prompt_stride16", [0]),
        ("mask_prompt_stride14", [0]),
        ("point_prompt_stride16", [0]),
        ("two_conditioning_frames_short_memory", [0, 5]),
    ],
)
def test_each_frame_equals_reference_with_the_recorded_memories(golden, tmp_path, outputs, name, prompted):
    case = Case(golden / "sam2", name, tmp_path)
    for t in range(case.frames):
        if t in prompted:
            continue
        seen = [*prompted, *(f for f in range(t) if f not in prompted)]
        for i in range(2):
            keys = {f: (f"frame{f}/obj_ptr", f"frame{f}/maskmem_features") for f in seen}
            memories = {f: Memory(*(case.tensor(key)[i] for key in pair)) for f, pair in keys.items()}
            case.tracker._objects[i] = History(
                {f: m for f, m in memories.items() if f in prompted},
                {f: m for f, m in memories.items() if f not in prompted},
            )
        features = case.features(t)
        case.tracker._track(features, case.tracker._inputs(t, {}))
        case.check(t, outputs, 2e-4)
        if f"frame{t}/pix_feat_with_mem" in case.values:
            banks = [case.tracker._bank(tracked, t) for tracked in case.tracker._objects.values()]
            with torch.no_grad():
                attended = case.tracker._condition(features, banks)
            assert_close(attended, case.tensor(f"frame{t}/pix_feat_with_mem"), rtol=0, atol=2e-4)


# -- the package's own predictor


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """A clip as a folder of JPEG files, which is what the predictor reads, and its frames."""
    folder = tmp_path_factory.mktemp("clip")
    for t, frame in enumerate(clip(13)):
        Image.fromarray(frame).save(folder / f"{t:05d}.jpg")
    return str(folder), [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]


def give(model, state, frame, i, prompt):
    """Prompt the predictor, for a mask as in training: the memory is written from the mask itself.

    By default the predictor writes it from the mask reduced to stride 4 and enlarged again.
    """
    if prompt.mask is None:
        model.add_new_points_or_box(state, frame, i, points=prompt.points, labels=prompt.labels, box=prompt.box)
        return
    model.add_new_mask(state, frame, i, prompt.mask)
    index = state["obj_id_to_idx"][i]
    state["temp_output_dict_per_obj"][index]["cond_frame_outputs"][frame], _ = model._run_single_frame_inference(
        inference_state=state,
        output_dict=state["output_dict_per_obj"][index],
        frame_idx=frame,
        batch_size=1,
        is_init_cond_frame=True,
        point_inputs=None,
        mask_inputs=state["mask_inputs_per_obj"][index][frame],
        reverse=False,
        run_mem_encoder=True,
    )


def test_equals_the_predictor_of_the_package(model, video):
    """Clicks, a box and a mask; a second conditioning frame of one object; an object that comes later."""
    folder, frames = video
    prompts = {0: {1: CLICK, 2: square()}, 3: {1: CLICKS, 7: BOX}}
    state = model.init_state(folder)
    expected = {}
    for start, end in pairwise([*prompts, len(frames)]):
        with torch.inference_mode():
            for i, prompt in prompts[start].items():
                give(model, state, start, i, prompt)
        for t, ids, logits in model.propagate_in_video(state, start, end - start - 1):
            expected[t] = dict(zip(ids, logits[:, 0], strict=True))
    found = run(model, frames, prompts, num_frames=13, memory_dtype=torch.bfloat16)
    assert len(found) == len(expected) == 13
    for t, logits in enumerate(found):
        assert set(logits) == set(expected[t])
        for i, value in expected[t].items():
            assert_close(logits[i], value, rtol=0, atol=2e-3)
    assert all(0.02 < (x > 0).double().mean() < 0.98 for x in found[-1].values())


def predict(model, state, frame, i, prompt):
    """Correct by the predictor; return the logits of object `i`."""
    options = dict(points=prompt.points, labels=prompt.labels, box=prompt.box, clear_old_points=prompt.box is not None)
    _, ids, logits = model.add_new_points_or_box(state, frame, i, **options)
    return logits[ids.index(i), 0]


def test_refinement_equals_the_predictor_of_the_package(model, video, monkeypatch):
    """Two clicks on the first frame, one by one; then clicks, a mask and a box on frames that were tracked into."""
    monkeypatch.setattr(model, "add_all_frames_to_correct_as_cond", True)  # else the predictor reads them as any other
    folder, frames = video
    state = model.init_state(folder)
    tracker = StreamingTracker(model, num_frames=13, memory_dtype=torch.bfloat16)
    more = Prompt(points=[[12, 40], [44, 12]], labels=[1, 0])
    corrections = {
        0: [(1, CLICK), (2, BOX), (1, more), (1, Prompt(points=[[60, 50]], labels=[0])), (2, CLICK)],
        4: [(1, more), (1, CLICK), (1, BOX)],
        7: [(2, square()), (2, more), (7, BOX), (7, more), (1, CLICK)],
        10: [(7, square())],
    }
    change = []
    found = tracker.step_logits(frames[0])
    for start, end in pairwise([*corrections, 13]):
        for i, prompt in corrections[start]:
            before, found = found, tracker.refine_logits({i: prompt})
            if prompt.mask is None:
                assert_close(found[i], predict(model, state, start, i, prompt), rtol=0, atol=2e-3)
            elif start == 7:
                model.add_new_mask(state, start, i, prompt.mask)
            else:
                with torch.inference_mode():
                    give(model, state, start, i, prompt)
            assert all(torch.equal(found[k], value) for k, value in before.items() if k != i)
            change += [(found[i] - before[i]).abs().max()] if i in before else []
        for t, ids, logits in model.propagate_in_video(state, start, end - start):
            if t > start and t < 13:
                found = tracker.step_logits(frames[t])
            assert set(found) == set(ids)
            for i, value in zip(ids, logits[:, 0], strict=True):
                assert_close(found[i], value, rtol=0, atol=2e-3)
    assert min(change) > 0.01  # five times the tolerance


def test_non_overlapping_gives_each_pixel_to_the_likeliest(model):
    frames, prompts = clip(4), {0: {1: CLICK, 2: square()}}
    apart = run(model, frames, prompts, non_overlapping=True)[-1]
    logits = torch.stack(list(run(model, frames, prompts)[-1].values()))
    assert ((logits > 0).sum(0) == 2).any()
    for i, k in enumerate([1, 2]):
        assert_close(apart[k] > 0, (logits[i] > 0) & (logits.argmax(0) == i))


# -- refinement


def test_objects_begin_by_refinement_as_by_a_step(model):
    frames, later = clip(4), {1: CLICK, 2: square()}
    expected = run(model, frames, {1: later})[1:]
    tracker = StreamingTracker(model)
    assert tracker.step(frames[0]) == {}
    buffer = frames[1].copy()
    assert tracker.step(buffer) == {}
    buffer[:] = 0  # the caller reads the next frame into the same array
    found = [{**tracker.refine_logits({1: CLICK}), **tracker.refine_logits({2: square()})}]
    found += [tracker.step_logits(frame) for frame in frames[2:]]
    assert_close(found, expected, rtol=1e-4, atol=1e-3)
    masks = tracker.refine({1: CLICKS})
    assert {i: mask.dtype for i, mask in masks.items()} == {1: torch.bool, 2: torch.bool}


def test_only_what_is_refined_is_decoded_anew(model, monkeypatch):
    tracker = StreamingTracker(model, non_overlapping=True)
    frames = clip(3)
    tracker.step(frames[0], {1: CLICK, 2: square(), 3: BOX})
    tracker.step(frames[1])
    others = tracker._objects[1], tracker._objects[3]
    kept = copy.deepcopy(others)
    monkeypatch.setattr(model, "forward_image", None)  # nor is the frame encoded again
    masks = tracker.refine({2: square()})
    assert list(masks) == [1, 2, 3]
    assert torch.stack(list(masks.values())).sum(0).max() == 1
    assert_close([vars(one.tracked[1]) for one in others], [vars(one.tracked[1]) for one in kept], rtol=0, atol=0)
    assert (list(tracker._objects[2].prompted), list(tracker._objects[2].tracked)) == ([0, 1], [])


def test_refining_again_and_again_does_not_grow(short):
    frames = clip(4)
    tracker = StreamingTracker(short, max_prompted_frames=3)
    bytes_held, bytes_live = [], []
    for t in range(14):
        tracker.step(frames[t % 4], {1: CLICK, 2: square()} if t == 0 else None)
        for k in range(3):
            tracker.refine({1: CLICK, 2: square()} if k else {1: BOX})
        assert list(tracker._objects[1].prompted)[-1] == t
        bytes_held.append(held(tracker))
        if t in (9, 13):
            bytes_live.append(live())
    assert len(set(bytes_held[6:])) == 1
    assert bytes_live[0] == bytes_live[1]


def test_what_is_removed_begins_anew_on_the_same_frame(model):
    frames = clip(2)
    tracker = StreamingTracker(model)
    for t, frame in enumerate(frames):
        tracker.step(frame, {1: CLICK, 2: square()} if t == 0 else None)
    tracker.remove(1)
    assert set(tracker.refine({2: CLICK})) == {2}
    expected = StreamingTracker(model).step_logits(frames[1], {1: CLICKS})
    assert_close(tracker.refine_logits({1: CLICKS})[1], expected[1], rtol=1e-4, atol=1e-3)
    assert list(tracker._objects[1].prompted) == [1]


def test_there_must_be_a_frame_and_a_prompt_to_refine(model):
    tracker = StreamingTracker(model)
    with pytest.raises(DatasetError, match=r"nothing to refine; give a frame to step\(\) first"):
        tracker.refine({1: CLICK})
    tracker.step(GOOD)
    with pytest.raises(DatasetError, match="no prompt"):
        tracker.refine({})
    tracker.reset()
    with pytest.raises(DatasetError, match="give a frame"):
        tracker.refine({1: CLICK})


# -- objects together and alone

LATE = {0: {1: CLICK, 2: square()}, 2: {3: BOX}, 4: {4: CLICKS, 1: square()}, 5: {5: CLICKS}}


def test_objects_together_equal_each_alone(short):
    frames = clip(9)
    together = run(short, frames, LATE)
    for i in range(1, 6):
        first = min(t for t, prompts in LATE.items() if i in prompts)
        mine = {t - first: {i: prompts[i]} for t, prompts in LATE.items() if i in prompts}
        alone = run(short, frames[first:], mine)
        assert [i in logits for logits in together] == [False] * first + [True] * len(alone)
        for logits, expected in zip(together[first:], alone, strict=True):
            assert_close(logits[i], expected[i], rtol=1e-4, atol=1e-3)


def test_objects_of_all_ages_run_as_one_batch(short, monkeypatch):
    batches = []
    attend = short.memory_attention.forward

    def spy(**inputs):
        batches.append(inputs["curr"].shape[1])
        return attend(**inputs)

    monkeypatch.setattr(short.memory_attention, "forward", spy)
    tracker = StreamingTracker(short)
    prompts = {0: {1: CLICK}, 1: {2: CLICK}, 3: {3: CLICK}}
    for t, frame in enumerate(clip(8)):
        batches.clear()
        tracker.step(frame, prompts.get(t))
    assert batches == [3]


def test_an_object_leaves_and_comes_again(model):
    frames = clip(8)
    tracker = StreamingTracker(model)
    tracker.step(frames[0], {1: CLICK, 2: square()})
    tracker.step(frames[1])
    tracker.remove(2)
    assert tracker.objects == (1,)
    assert set(tracker.step(frames[2])) == {1}
    masks = tracker.step(frames[3], {2: square()})
    assert set(masks) == {1, 2}
    with pytest.raises(DatasetError, match=r"no object 9 to remove; tracked are \[1, 2\]"):
        tracker.remove(9)
    assert len(tracker._objects[2].prompted) == 1
    assert len(tracker._objects[2].tracked) == 0


def test_without_objects_nothing_runs(model, monkeypatch):
    monkeypatch.setattr(model, "forward_image", None)
    tracker = StreamingTracker(model)
    assert tracker.step(clip(1)[0]) == {}
    assert tracker.step(clip(1)[0], {}) == {}


def test_reset_begins_another_video(model):
    frames = clip(4)
    tracker = StreamingTracker(model)
    first = [tracker.step_logits(frame, {1: CLICK} if t == 0 else None)[1] for t, frame in enumerate(frames)]
    tracker.reset()
    assert tracker.objects == ()
    tracker.step(clip(1, size=(40, 50))[0])
    tracker.reset()
    again = [tracker.step_logits(frame, {1: CLICK} if t == 0 else None)[1] for t, frame in enumerate(frames)]
    assert_close(again, first, rtol=0, atol=0)


def test_masks_are_where_logits_are_positive(model):
    frame = clip(1)[0]
    logits = StreamingTracker(model).step_logits(frame, {1: CLICK})[1]
    mask = StreamingTracker(model).step(torch.from_numpy(frame), {np.int64(1): CLICK})[1]
    assert mask.dtype == torch.bool
    assert mask.shape == (60, 80)
    assert_close(mask, logits > 0)


def test_a_mask_smaller_than_a_pixel_of_the_model_is_not_lost(model):
    mask = np.zeros((600, 800), np.uint8)
    mask[300, 400] = 1
    small = read_prompt("prompt", Prompt(mask=mask), mask.shape, model.image_size)
    assert 1 <= small.sum() <= 4
    assert small[0, 31:33, 31:33].any()


def test_runs_under_autocast(model):
    frames = clip(5)
    expected = run(model, frames, {0: {1: CLICK}, 2: {2: square()}})
    with torch.autocast("cpu", torch.bfloat16):
        found = run(model, frames, {0: {1: CLICK}, 2: {2: square()}})
    agree = ((found[-1][2] > 0) == (expected[-1][2] > 0)).double().mean()
    assert agree > 0.9


# -- memory


def held(tracker):
    """Bytes of all tensors that the tracker's objects keep alive, each storage once."""
    storages = {}
    for tracked in tracker._objects.values():
        for memory in [*tracked.prompted.values(), *tracked.tracked.values()]:
            for tensor in (memory.pointer, memory.features):
                if tensor is not None:
                    storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def live():
    gc.collect()
    return sum(x.untyped_storage().nbytes() for x in gc.get_objects() if type(x) is torch.Tensor)


def test_memory_is_bounded_and_flat(short):
    frames = clip(4)
    tracker = StreamingTracker(short)
    bytes_held, bytes_live = [], []
    for t in range(16):
        tracker.step(frames[t % 4], {0: {1: CLICK}, 3: {2: square()}}.get(t))
        bytes_held.append(held(tracker))
        if t in (9, 15):
            bytes_live.append(live())
    features, pointer = 8 * 16 * 4, 32 * 4  # m x g x g and d, float32
    # one prompted frame, the two last memories, the three last pointers
    assert set(bytes_held[6:]) == {2 * (features * 3 + pointer * 4)}
    assert bytes_live[0] == bytes_live[1]


@pytest.mark.parametrize("stride", [1, 3])
def test_memory_is_flat_over_10000_frames_with_an_object_from_frame_5000(model, monkeypatch, stride):
    """The histories alone, without the network: what is read is there, and little else is kept."""
    monkeypatch.setattr(model, "memory_temporal_stride_for_eval", stride)
    tracker = StreamingTracker(model)
    for t in range(10_000):
        for i, tracked in tracker._objects.items():
            if t > i + 30 and t % 97 < 4:
                bank = tracker._bank(tracked, t)
                nearest = (t - 2) // stride * stride
                assert [x for _, x in bank.memories] == [i, *(nearest - k * stride for k in range(4, -1, -1)), t - 1]
                assert [row for row, _ in bank.memories] == [-1, 5, 4, 3, 2, 1, 0]
                assert bank.pointers == [(t - i, i), *((k, t - k) for k in range(1, 16))]
                assert len(tracked.tracked) <= 15 + 6 * stride
                assert sum(memory.features is not None for memory in tracked.tracked.values()) <= 7
        prompted = {t} & {0, 5000}
        outputs = {i: SimpleNamespace(memory=Memory(t, t)) for i in {*tracker._objects, *prompted}}
        tracker._commit(t, outputs, prompted)


def test_prompted_frames_are_the_first_and_the_latest(short):
    tracker = StreamingTracker(short, max_prompted_frames=3)
    for t, frame in enumerate(clip(9)):
        tracker.step(frame, {1: CLICK} if t in (0, 2, 6, 7) else None)
    history = tracker._objects[1]
    assert list(history.prompted) == [0, 6, 7]
    assert set(history.tracked) == {8}


def test_a_prompted_frame_that_is_dropped_counts_as_any_other(short):
    tracker = StreamingTracker(short, max_prompted_frames=2)
    for frame in clip(3):
        tracker.step(frame, {1: CLICK})
    history = tracker._objects[1]
    assert list(history.prompted) == [0, 2]
    assert history.tracked[1].features is not None
    assert len(tracker._bank(history, 3).memories) == 3
    assert [back for back, _ in tracker._bank(history, 3).pointers] == [3, 1, 2]


def test_the_model_may_read_fewer_prompted_frames_than_are_kept(model, monkeypatch):
    monkeypatch.setattr(model, "max_cond_frames_in_attn", 2)
    frames = {t: Memory(f"pointer {t}", f"features {t}") for t in (0, 3, 6)}
    bank = StreamingTracker(model)._bank(History(prompted=frames), 8)
    # 0 is among the last memories no more, but among the last pointers
    assert bank.memories == [(-1, "features 6"), (-1, "features 3")]
    assert bank.pointers == [(2, "pointer 6"), (5, "pointer 3"), (8, "pointer 0")]


@pytest.mark.parametrize("count", [-1, 2, 3, 9])
def test_the_prompted_frames_that_are_read_are_those_of_the_package(count):
    from sam2.modeling.sam2_utils import select_closest_cond_frames

    rng = np.random.default_rng(0)
    for _ in range(50):
        frames = rng.permutation(20)[: rng.integers(1, 7)].tolist()
        expected, _ = select_closest_cond_frames(10, dict.fromkeys(frames), count)
        assert closest(frames, 10, count) == list(expected)


def test_an_object_that_is_removed_leaves_nothing(short):
    tracker = StreamingTracker(short)
    for t, frame in enumerate(clip(3)):
        tracker.step(frame, {1: CLICK, 2: CLICK} if t == 0 else None)
    both = held(tracker)
    tracker.remove(2)
    assert held(tracker) == both / 2


def test_prompting_each_frame_does_not_grow(short):
    tracker = StreamingTracker(short)
    sizes = []
    for _ in range(12):
        tracker.step(GOOD, {1: CLICK})
        sizes.append(held(tracker))
    assert len(set(sizes[8:])) == 1


# -- bad input


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (None, "frame 2 is object of shape"),
        (GOOD[:50], "50x80 but earlier frames are 60x80"),
        (GOOD[..., 0], r"uint8 of shape \(60, 80\)"),
        (GOOD.astype(np.float32), "frame 2 is float32"),
        (np.zeros((0, 0, 3), np.uint8), "not an image"),
        (np.moveaxis(GOOD, 2, 0), "not an image"),
        (np.zeros((60, 80, 4), np.uint8), "not an image"),
    ],
)
def test_a_frame_that_cannot_be_used_leaves_all_as_it_was(started, frame, message):
    check_intact(started, frame, None, message)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (Prompt(), "needs either a mask, or points, a box or both"),
        (Prompt(points=[[1, 2]]), "points without labels"),
        (Prompt(labels=[1]), "needs either a mask, or points"),
        (Prompt(box=[1, 2, 3, 4], labels=[1]), "labels without points"),
        (Prompt(points=[[1, 2]], labels=[1], mask=np.ones((60, 80))), "needs either a mask"),
        (Prompt(points=[[1, 2]], labels=[1, 0]), r"points \(1, 2\) and labels \(2,\)"),
        (Prompt(points=[1, 2], labels=[1]), "points"),
        (Prompt(points=np.zeros((0, 2)), labels=[]), "points"),
        (Prompt(points=[[1, 2]], labels=[2]), "1 is on the object"),
        (Prompt(points=[[1, 2], [80, 2]], labels=[1, 1]), r"point at \[80.0, 2.0\], outside the frame of 80x60"),
        (Prompt(points=[[1, 60]], labels=[1]), "outside the frame"),
        (Prompt(points=[[-1, 2]], labels=[1]), "outside the frame"),
        (Prompt(points=[[np.nan, 2]], labels=[1]), "finite numbers"),
        (Prompt(points="here", labels=[1]), "finite numbers"),
        (Prompt(box=[10, 10, 5, 20]), "x0 < x1"),
        (Prompt(box=[10, 10, 90, 20]), "within the frame of 80x60"),
        (Prompt(box=[10, -1, 20, 20]), "within the frame"),
        (Prompt(box=[10, 20, 30]), "the box"),
        (Prompt(mask=np.zeros((60, 80))), "empty mask"),
        (Prompt(mask=np.ones((80, 60))), r"expected \(60, 80\), the frame's"),
        (Prompt(mask=np.full((60, 80), 7)), "with 0 and 1"),
        ([[1, 2]], "is a list; give a Prompt"),
    ],
)
def test_a_prompt_that_cannot_be_used_leaves_all_as_it_was(started, prompt, message):
    check_intact(started, GOOD, {3: CLICK, 2: prompt}, f"^prompt of object 2 on frame 2 .*{message}")


def test_an_id_that_is_no_integer_leaves_all_as_it_was(started):
    check_intact(started, GOOD, {"cat": CLICK}, "object id 'cat' is not an integer")


@pytest.fixture(scope="module")
def started(model):
    """A tracker after two frames with one object."""
    tracker = StreamingTracker(model)
    for t, frame in enumerate(clip(2)):
        tracker.step(frame, {1: CLICK} if t == 0 else None)
    return tracker


def check_intact(tracker, frame, prompts, message):
    before = state(tracker)
    calls = [lambda: tracker.step(frame, prompts)]
    if prompts:
        calls.append(lambda: tracker.refine(prompts))
        message = message.replace("frame 2", "frame [12]")
    for call in calls:
        with pytest.raises(DatasetError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
        assert state(tracker) == before


def state(tracker):
    history = tracker._objects[1]
    memories = {**history.prompted, **history.tracked}
    return (
        tracker.objects,
        tracker._frame,
        id(tracker._last),
        list(history.prompted),
        {t: (id(memory), id(memory.features)) for t, memory in memories.items()},
    )


def test_a_failure_in_the_network_leaves_all_as_it_was(model, monkeypatch):
    frames = clip(4)
    expected = run(model, frames, {0: {1: CLICK}})
    tracker = StreamingTracker(model)
    tracker.step(frames[0], {1: CLICK})
    with monkeypatch.context() as patch:
        patch.setattr(StreamingTracker, "_masks", None)  # the last thing that can fail
        with pytest.raises(TypeError):
            tracker.step(frames[1], {2: square()})
        with pytest.raises(TypeError):
            tracker.refine({1: CLICKS, 2: square()})
    found = [tracker.step_logits(frame) for frame in frames[1:]]
    assert_close(found, expected[1:], rtol=0, atol=0)


def test_more_frames_than_announced(model):
    tracker = StreamingTracker(model, num_frames=2)
    for frame in clip(2):
        tracker.step(frame)
    with pytest.raises(DatasetError, match="frame 2 of a video of num_frames=2"):
        tracker.step(GOOD)


def test_models_that_do_not_stream(model):
    training = copy.deepcopy(model).train()
    for call in (lambda: StreamingTracker(training).step(GOOD), lambda: StreamingTracker(training).refine({1: CLICK})):
        with pytest.raises(ConfigError, match="call its eval"):
            call()
    with pytest.raises(ConfigError, match="directly_add_no_mem_embed=False"):
        StreamingTracker(build_pe_sam2(TINY, 4, flags=dict(directly_add_no_mem_embed=False), **SMALL))
    with pytest.raises(ConfigError, match="num_maskmem=0"):
        StreamingTracker(build_pe_sam2(TINY, 4, flags=dict(num_maskmem=0), **SMALL))
    with pytest.raises(ConfigError, match="max_prompted_frames is 1"):
        StreamingTracker(model, max_prompted_frames=1)
