"""The parts of a tracker and what streams through them equal the tracker in torch, frame by frame."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers.exported import EagerSession
from helpers.golden import read_arrays, read_weights
from torch.testing import assert_close

from pe_spatial import EncoderConfig
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import bilinear_weights
from pe_spatial.tracking.sam2.model import build_pe_sam2, load_sam2_weights
from pe_spatial.tracking.sam2.online import History, Memory
from pe_spatial.tracking.sam2.prompts import Prompt
from pe_spatial.tracking.sam2.streaming import StreamingTracker

pytest.importorskip("sam2")
from pe_spatial.export.certificate import reference_cases
from pe_spatial.export.tracker import PARTS, export_tracker, stream_options, tracker_parts
from pe_spatial.export.tracker_certificate import certify_tracker
from pe_spatial.runtime.compare import LIMITS, problems
from pe_spatial.runtime.loading import load_exported
from pe_spatial.runtime.tracker import ExportedStream, ExportedTracker
from pe_spatial.runtime.verify import compare, verify

TINY = EncoderConfig(img_size=64, patch_size=8, embed_dim=32, depth=2, num_heads=2)
BACKENDS = ("onnxruntime", "openvino")
CLICK = Prompt(points=[[30, 20]], labels=[1])
CLICKS = Prompt(points=[[30, 20], [50, 40]], labels=[1, 0])
BOX = Prompt(box=[10, 5, 60, 40])


def build(randomize, *, true_stride=False, **flags):
    torch.manual_seed(0)
    sizes = dict(d_model=32, mem_dim=8, layers=2, feedforward=32)
    model = randomize(build_pe_sam2(TINY, 4, true_stride=true_stride, flags=flags, **sizes))
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)
    return model


class Modules:
    """The parts as modules in torch, in the place of an `ExportedTracker`."""

    def __init__(self, model):
        self.parts, self.manifest = tracker_parts(model), SimpleNamespace(options=stream_options(model))
        self.mask_size = 4 * model.sam_image_embedding_size

    def run(self, part, **values):
        one = self.parts[part]
        with torch.no_grad():
            found = one.module(*(torch.from_numpy(np.ascontiguousarray(values[name])) for name in one.inputs))
        return {name: value.numpy() for name, value in zip(one.outputs, found, strict=True)}


def clip(frames, size=(60, 80)):
    small = torch.from_numpy(np.random.default_rng(0).random((1, 3, 6, 8 + frames)))
    wide = torch.nn.functional.interpolate(small, (size[0], size[1] + 4 * frames), mode="bicubic")[0].clamp(0, 1)
    views = [wide[:, :, 4 * t : 4 * t + size[1]] for t in range(frames)]
    return [(view.permute(1, 2, 0) * 255).byte().numpy() for view in views]


def square():
    mask = np.zeros((60, 80), bool)
    mask[10:40, 20:60] = True
    return Prompt(mask=mask)


def run(tracker, frames):
    """Logits of every frame: clicks, a mask and a box, on new and tracked objects, and corrections."""
    steps = {0: {1: CLICK, 2: square()}, 3: {1: CLICKS, 7: BOX}}
    corrections = {1: {1: CLICK}, 5: {2: CLICKS}}
    for t, frame in enumerate(frames):
        yield tracker.step_logits(frame, steps.get(t))
        if t in corrections:
            yield tracker.refine_logits(corrections[t])


def check_stream(model, network, *, atol, frames=9, **options):
    streams = (StreamingTracker(model, **options), ExportedStream(network, **options))
    for theirs, ours in zip(*(run(stream, clip(frames)) for stream in streams), strict=True):
        assert set(ours) == set(theirs)
        for i, logits in theirs.items():
            assert_close(torch.from_numpy(ours[i]), logits, rtol=0, atol=atol)
    assert all(0.02 < (x > 0).double().mean() < 0.98 for x in theirs.values())


@pytest.mark.parametrize(
    "flags",
    [
        {},
        dict(num_maskmem=3, max_obj_ptrs_in_encoder=4, memory_temporal_stride_for_eval=2, max_cond_frames_in_attn=2),
        dict(binarize_mask_from_pts_for_mem_enc=True, use_high_res_features_in_sam=False),
        dict(multimask_max_pt_num=0, sam_mask_decoder_extra_args=dict(dynamic_multimask_via_stability=True)),
    ],
    ids=["release", "short memory", "binarized", "stability"],
)
def test_parts_and_runtime_equal_the_tracker(randomize, flags):
    model = build(randomize, **flags)
    check_stream(model, Modules(model), atol=2e-3, non_overlapping="num_maskmem" in flags)


def test_masks_and_clicks_together_at_another_stride(randomize):
    """The logits of masks are S / 4 wide, those of the decoder 4g: 8 and 16 here."""
    model = build(randomize, true_stride=True)
    assert model.image_size // 4 != 4 * model.sam_image_embedding_size
    together, exported, alone = StreamingTracker(model), ExportedStream(Modules(model)), StreamingTracker(model)
    prompts = {1: CLICK, 2: square()}
    for stream in (together, exported):
        steps = [stream.step_logits(frame, prompts if t == 0 else None) for t, frame in enumerate(clip(1))]
        steps.append(stream.refine_logits({1: CLICKS, 2: CLICKS}))
        steps.append(stream.step_logits(clip(2)[1]))
        if stream is together:
            expected = steps
    for ours, theirs in zip(steps, expected, strict=True):
        for i, logits in theirs.items():
            assert_close(torch.from_numpy(ours[i]), logits, rtol=0, atol=2e-3)
    (frame,) = clip(1)
    assert_close(alone.step_logits(frame, {2: square()})[2], expected[0][2], rtol=1e-4, atol=1e-3)
    assert_close(alone.refine_logits({2: CLICKS})[2], expected[1][2], rtol=1e-4, atol=1e-3)


def test_an_object_that_is_not_there(randomize):
    model = build(randomize)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(-50)
    streams = (StreamingTracker(model), ExportedStream(Modules(model)))
    for frame in clip(3):
        prompts = {1: CLICK} if frame is not None and not streams[0].objects else None
        theirs, ours = (stream.step_logits(frame, prompts)[1] for stream in streams)
        assert (theirs == -1024).all()
        assert (ours == -1024).all()
        memory = [stream._objects[1] for stream in streams]
        for a, b in zip(*({**m.prompted, **m.tracked}.values() for m in memory), strict=True):
            assert_close(torch.from_numpy(b.features), a.features, rtol=0, atol=1e-4)
            assert_close(torch.from_numpy(b.pointer), a.pointer, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def folder(randomize, tmp_path_factory):
    pytest.importorskip("onnxruntime")
    out = tmp_path_factory.mktemp("exported") / "tracker"
    export_tracker(build(randomize), out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_stream_in_another_runtime_equals_the_tracker(randomize, folder, backend):
    network = ExportedTracker(folder, backend=backend, threads=1)
    check_stream(build(randomize), network, atol=5e-3)


@pytest.mark.slow
def test_masks_of_a_clip_are_those_of_the_tracker(randomize, folder):
    """IoU of at least 0.999 on each frame."""
    model = build(randomize)
    streams = (StreamingTracker(model, non_overlapping=True), ExportedTracker(folder, threads=1).start())
    for t, frame in enumerate(clip(30)):
        theirs, ours = (stream.step(frame, {1: CLICK, 2: square()} if t == 0 else None) for stream in streams)
        for i, mask in theirs.items():
            assert (ours[i] & mask.numpy()).sum() >= 0.999 * (ours[i] | mask.numpy()).sum()


@pytest.mark.slow
def test_track_takes_an_exported_folder(randomize, folder, tmp_path):
    from helpers.repository import command
    from PIL import Image

    (tmp_path / "clip").mkdir()
    for t, frame in enumerate(clip(4)):
        Image.fromarray(frame).save(tmp_path / "clip" / f"{t:05d}.png")
    given = ("--checkpoint", folder, "--out", tmp_path / "out.mp4", "--box", "1:10,5,60,40")
    printed = command("track", tmp_path / "clip", *given, "--masks", tmp_path / "masks", cwd=tmp_path)
    assert "1 objects through 4 frames" in printed
    stream = StreamingTracker(build(randomize), non_overlapping=True)
    for t, frame in enumerate(clip(4)):
        mask = stream.step(frame, {1: BOX} if t == 0 else None)[1].numpy()
        found = np.asarray(Image.open(tmp_path / "masks" / f"{t:05d}.png")) == 1
        assert (found != mask).mean() < 2e-3
    with pytest.raises(SystemExit, match="is an exported model, which has no --config"):
        command("track", tmp_path / "clip", *given, "--config", "a.py", cwd=tmp_path)


@pytest.mark.slow
def test_folders_and_prompts_that_do_not_fit_are_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="not empty"):
        export_tracker(None, folder)
    tracker = ExportedTracker(folder)
    with pytest.raises(DatasetError, match="no object to track"):
        tracker(tmp_path)
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "mask_decoder" / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"do not belong together: mask_decoder/manifest.json"):
        ExportedTracker(copy)


# -- reference values


SMALL = dict(d_model=32, mem_dim=8, layers=2, feedforward=96)
GOLDEN = (
    "mask_prompt_stride16",
    "mask_prompt_stride14",
    "point_prompt_stride16",
    "two_conditioning_frames_short_memory",
)


class Recorded:
    """An exported tracker whose image encoder gives the recorded pyramid of one frame after the other."""

    def __init__(self, network, model, levels):
        self.network, self.frame, self.no_memory = network, 0, model.no_mem_embed.detach().numpy().reshape(1, -1, 1, 1)
        self.manifest, self.mask_size = network.manifest, network.mask_size
        with torch.no_grad():
            fine, middle = (getattr(model.sam_mask_decoder, f"conv_s{i}")(levels[i]).numpy() for i in (0, 1))
        self.levels = dict(image=levels[2].numpy(), middle=middle, fine=fine)

    def run(self, part, **values):
        if part != "image_encoder":
            return self.network.run(part, **values)
        found = {name: level[self.frame : self.frame + 1] for name, level in self.levels.items()}
        return {**found, "fresh": found["image"] + self.no_memory}


def golden_case(golden, name, tmp_path):
    """Return the model, the recorded features and the recorded values."""
    changed = {}
    if "short_memory" in name:
        changed = dict(num_maskmem=3, max_obj_ptrs_in_encoder=4, memory_temporal_stride_for_eval=2)
        changed |= dict(max_cond_frames_in_attn=-1)
    size = 224 if "stride14" in name else 256
    encoder = EncoderConfig(img_size=size, patch_size=size // 16, embed_dim=32, depth=1, num_heads=2)
    model = build_pe_sam2(encoder, 16, true_stride=True, flags=changed, **SMALL)
    weights = read_weights(golden / "weights.pt")
    weights["maskmem_tpos_enc"] = weights["maskmem_tpos_enc"][: model.num_maskmem]
    torch.save({"model": weights}, tmp_path / "weights.pt")
    load_sam2_weights(model, tmp_path / "weights.pt")
    features = read_arrays(golden / "features.npz")
    levels = [torch.from_numpy(features[f"stride{s}"]).float() / 24 for s in (4, 8, 16)]
    return model, levels, read_arrays(golden / f"{name}.npz")


def check_golden(model, levels, values, network, name):
    """Each frame from the recorded memories of the frames before it; and prompts."""
    stream = ExportedStream(Recorded(network, model, levels), num_frames=len(levels[0]))
    prompted = [0, 5] if "two" in name else [0]
    frame = np.zeros((model.image_size, model.image_size, 3), np.uint8)
    if name != "two_conditioning_frames_short_memory":
        points = "point" in name
        given = {
            i: Prompt(points=values["input/points_frame0"][i], labels=values["input/labels_frame0"][i])
            if points
            else Prompt(mask=np.unpackbits(values["input/mask_frame0"], axis=-1)[i])
            for i in range(2)
        }
        outputs = stream._track(stream._encode(frame), stream._inputs(0, stream._prompts(0, given, frame)))
        check_outputs(values, 0, outputs)
    for t in [t for t in range(len(levels[0])) if t not in prompted]:
        seen = [*prompted, *(f for f in range(t) if f not in prompted)]
        for i in range(2):
            names = ("obj_ptr", "maskmem_features")
            memories = {f: Memory(*(values[f"frame{f}/{key}"][i] for key in names)) for f in seen}
            stream._objects[i] = History(
                {f: m for f, m in memories.items() if f in prompted},
                {f: m for f, m in memories.items() if f not in prompted},
            )
        stream.network.frame = t
        check_outputs(values, t, stream._track(stream._encode(frame), stream._inputs(t, {})))


def check_outputs(values, t, outputs):
    for i, out in outputs.items():
        for name, value in {
            "low_res_masks": out.logits[None],
            "object_score_logits": out.score,
            "obj_ptr": out.memory.pointer,
            "maskmem_features": out.memory.features,
        }.items():
            np.testing.assert_allclose(value, values[f"frame{t}/{name}"][i], rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_values(golden, tmp_path, name):
    model, levels, values = golden_case(golden / "sam2", name, tmp_path)
    check_golden(model, levels, values, Modules(model), name)


@pytest.mark.long
@pytest.mark.parametrize("names", [GOLDEN[0:3:2], GOLDEN[1:2], GOLDEN[3:]], ids=["stride 16", "stride 14", "short"])
def test_golden_values_in_other_runtimes(golden, tmp_path, names):
    model, _, _ = golden_case(golden / "sam2", names[0], tmp_path)
    export_tracker(model, tmp_path / "out")
    for backend in BACKENDS:
        network = ExportedTracker(tmp_path / "out", backend=backend, threads=1)
        for name in names:
            model, levels, values = golden_case(golden / "sam2", name, tmp_path)
            check_golden(model, levels, values, network, name)


# -- the certificate


def turn_positions(parts):
    rotate = parts["memory_attention"].module.rotate
    cos, sin = (x.unflatten(0, (4, 4)).transpose(0, 1).flatten(0, 1).clone() for x in (rotate.cos, rotate.sin))
    rotate.cos, rotate.sin = cos, sin


def perturb(parts):
    parts["mask_decoder"].module.decoder.iou_prediction_head.layers[0].weight.data[0] += 0.5
    parts["mask_decoder"].module.decoder.mask_tokens.weight.data[2] += 0.5


def swap_channels(parts):
    module = parts["image_encoder"].module
    module.mean = module.mean.flip(0)


def shift_ages(parts):
    attention = parts["memory_attention"].module
    attention.times = torch.nn.Parameter(attention.times.roll(1, 0))


def without_antialias(parts):
    reduce = parts["mask_prompt"].module.reduce
    reduce.weights = torch.from_numpy(bilinear_weights(64, 16)).float()


MUTATIONS = dict(memory_attention=(turn_positions, shift_ages), mask_decoder=(perturb,), image_encoder=(swap_channels,),
                 mask_prompt=(without_antialias,))  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_certificate_catches_what_differs(randomize, part):
    def check():
        return problems(*compare(EagerSession(graph), cases), LIMITS["fp32"])

    for mutate in (None, *MUTATIONS.get(part, ())):
        parts = tracker_parts(build(randomize))
        graph, cases = parts[part], reference_cases(parts[part], 1, ())
        assert [len(inputs) for inputs, _ in cases] == [len(graph.inputs)] * 3
        assert check() == []
        if mutate:
            mutate(parts)
            assert check()


@pytest.mark.slow
def test_certificate_of_a_tracker_and_its_repetition(randomize, folder, tmp_path):
    model, copy = build(randomize), tmp_path / "copy"
    shutil.copytree(folder, copy)
    certificate = certify_tracker(model, copy, rounds=1)
    assert certificate["passed"]
    assert certificate["stream"]["iou"] >= 0.99
    assert "A video of 8 frames" in (copy / "certificate.md").read_text()
    for backend in BACKENDS:
        result = verify(copy, backend=backend)
        assert set(result["stages"]) == set(certificate["stages"])
    model.memory_encoder.out_proj.weight.data[0] += 0.1
    with pytest.raises(ConfigError, match="does not compute what PyTorch does: memory_encoder: memories differs by"):
        certify_tracker(model, copy, rounds=1)
    with pytest.raises(ConfigError, match="does not compute what PyTorch did"):
        verify(copy)
    assert load_exported(folder).task == "tracking"


def test_parts_are_those_that_are_written(randomize):
    assert tuple(tracker_parts(build(randomize))) == PARTS
