"""What is planned on the meta device is what runs take: bytes, operations."""

import json
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers.encoders import TINY, TINY_NO_CLASS
from helpers.repository import REPO
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torch", minversion="2.4")
from pe_spatial import PerceptionEncoder
from pe_spatial.planning.ledger import Ledger
from pe_spatial.planning.planner import build_on_meta, measure_step, measure_weights, set_checkpointing

ADAPTERS = dict(rank=2, dora=True, train_norms=True, targets=("qkv", "fc2"))
WINDOWS = dict(window_size=3, global_attn_indexes=(1, 3))  # that do not divide a grid of 4 or 8


def on_meta(build):
    with torch.device("meta"):
        return build().to("meta")


def really(model, forward):
    """Run a step with real numbers; return what is alive between forward and backward, and the highest numbers."""
    with Ledger(model) as ledger:
        loss = forward(model)
        saved = ledger.alive
        loss.backward()
    return saved, ledger.highest


@pytest.mark.parametrize(
    ("make", "in_passing"),
    [
        (lambda p: torch.optim.AdamW(p, lr=1e-3), 1),  # the root of the second moments
        (lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9, weight_decay=0.1), 1),  # gradients with the decay
        (lambda p: torch.optim.SGD(p, lr=1e-3), 0),
    ],
)
@pytest.mark.parametrize("options", [dict(frozen_stages=1), dict(lora=ADAPTERS)], ids=["frozen", "lora"])
def test_weights_gradients_and_states_are_exact(make, in_passing, options):
    model = PerceptionEncoder(TINY, **options)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model(torch.rand(1, 3, 64, 64))[0].sum().backward()
    optimizer.step()
    planned = on_meta(lambda: PerceptionEncoder(TINY, **options))
    weights = measure_weights(planned, make([p for p in planned.parameters() if p.requires_grad]), shards=None)
    assert weights.parameters == sum(p.nbytes for p in model.parameters())
    assert weights.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    states = [x for state in optimizer.state.values() for x in state.values() if x is not None]
    assert weights.states == sum(x.nbytes for x in states)
    assert weights.extra == 0
    assert weights.update == pytest.approx(in_passing * weights.gradients, rel=0.01)
    assert weights.kept == weights.parameters + weights.gradients + weights.states
    assert all(p.grad is None for p in planned.parameters())


def test_sharded_weights_are_the_first_parts():
    """FSDP2 cuts as torch.chunk does: pos_embed, whose first dimension is 1, stays whole on the first GPU."""
    model = on_meta(lambda: PerceptionEncoder(TINY))
    weights = measure_weights(model, torch.optim.SGD(model.parameters(), momentum=0.9), shards=3)
    part = sum(p.chunk(3)[0].numel() * 4 for p in model.parameters())
    assert weights.parameters == weights.gradients == weights.states == part
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    root = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks."))
    assert weights.extra == 2 * root + 3 * block + block + block
    halved = measure_weights(model, torch.optim.SGD(model.parameters()), shards=3, bfloat16=True)
    assert halved.extra == 2 * root + 1.5 * block + 0.5 * block + block


@pytest.mark.parametrize(("bfloat16", "factor"), [(False, 1), (True, 0.5)])
def test_sharded_units_have_gradients_of_adapters_alone(bfloat16, factor):
    model = on_meta(lambda: PerceptionEncoder(TINY, lora=ADAPTERS))
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = measure_weights(model, torch.optim.SGD(trained), shards=3, bfloat16=bfloat16)
    block = sum(p.nbytes for p in model.blocks[0].parameters())
    gradients = sum(p.nbytes for p in model.blocks[0].parameters() if p.requires_grad)
    root = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("blocks."))
    assert weights.extra == int(root + 3 * factor * block + (factor + 1) * gradients)


def test_frozen_weights_are_cast_at_every_use_and_counted_as_copies():
    plans = []
    for last in (2, 3):
        model = on_meta(lambda: PerceptionEncoder(TINY_NO_CLASS, out_indices=[last], lora=dict(rank=2)))  # noqa: B023
        plans.append(measure_step(model, 1, (64, 64), bfloat16=True))
    copies = [plan.activations - plan.activations_without_copies for plan in plans]
    linear = sum(p.nbytes for p in on_meta(lambda: PerceptionEncoder(TINY)).blocks[0].parameters() if p.ndim == 2) // 2
    assert copies[1] - copies[0] > 0.95 * linear


def test_buckets_hold_the_gradients_once_more():
    model = on_meta(lambda: PerceptionEncoder(TINY))
    weights = measure_weights(model, torch.optim.SGD(model.parameters()), shards=None, buckets=True)
    assert weights.extra == weights.gradients


@pytest.mark.parametrize("recomputed", [False, True, "selective"])
@pytest.mark.parametrize(
    "options",
    [{}, WINDOWS, dict(drop_path_rate=0.2, frozen_stages=2), dict(lora=ADAPTERS), dict(lora=dict(rank=4))],
    ids=["plain", "windows", "frozen", "dora", "lora"],
)
@pytest.mark.parametrize("config", [TINY, TINY_NO_CLASS], ids=["class", "no class"])
def test_encoder_keeps_what_was_planned(config, options, recomputed):
    def build():
        return PerceptionEncoder(config, grad_checkpointing=recomputed, **options)

    images = torch.rand(2, 3, 128, 128)
    saved, highest = really(build().train(), lambda model: model(images)[0].sum())
    plan = measure_step(on_meta(build), 2, (128, 128), bfloat16=False)
    assert_close(plan.saved, saved, rtol=0.01, atol=0)
    assert_close(plan.activations, highest["activations"], rtol=0.05, atol=0)
    assert_close(plan.peak, highest["peak"], rtol=0.05, atol=0)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("side", [32, 128], ids=["gradients dominate", "activations dominate"])
def test_micro_batches_keep_what_was_planned(side, recomputed):
    """Gradients that micro-batches add up are gradients, not activations, before they are complete."""

    def build():
        return PerceptionEncoder(TINY, micro_batch=1, grad_checkpointing=recomputed)

    images = torch.rand(3, 3, side, side)
    saved, highest = really(build().train(), lambda model: model(images)[0].sum())
    plan = measure_step(on_meta(build), 3, (side, side), bfloat16=False)
    assert_close(plan.saved, saved, rtol=0.01, atol=0)
    assert_close(plan.activations, highest["activations"], rtol=0.05, atol=0)
    assert_close(plan.peak, highest["peak"], rtol=0.05, atol=0)
    if side == 32:
        assert plan.activations < 0.5 * sum(p.nbytes for p in build().parameters())


@pytest.mark.parametrize("class_token", [True, False])
def test_operations_equal_the_arithmetic(class_token):
    config = TINY if class_token else TINY_NO_CLASS
    n, c, depth = 64 + class_token, config.embed_dim, config.depth
    plan = measure_step(on_meta(lambda: PerceptionEncoder(config)), 1, (128, 128), bfloat16=False)
    patches = 2 * 64 * 3 * 16**2 * c
    assert sum(plan.forward_flops.values()) == patches + depth * (2 * n * 12 * c**2 + 4 * n**2 * c)
    model = PerceptionEncoder(config)
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(torch.rand(1, 3, 128, 128))
    assert sum(plan.forward_flops.values()) == counter.get_total_flops()


def test_bfloat16_keeps_what_cuda_keeps():
    """By hand, for one block: of N x C numbers the stream twice in float32, and what its layers read in bfloat16."""
    n, c = 1024, 32
    plans = []
    for depth in (2, 3):
        model = on_meta(lambda: PerceptionEncoder(TINY_NO_CLASS, out_indices=[depth - 1]))  # noqa: B023
        model.blocks.apply(lambda block: [setattr(block, f"gamma_{i}", None) for i in (1, 2) if hasattr(block, "attn")])
        plans.append(measure_step(model, 1, (512, 512), bfloat16=True))
    stream = 2 * 4  # before each norm
    read = 2 * (1 + 3 + 2 + 1 + 1 + 4 + 4)  # by qkv; q, k, v as made; q, k turned; output; fc1; GELU; fc2
    logarithms, statistics = 2 * n * 4, 2 * 2 * n * 4  # of two heads; of two norms
    weights = 12 * c**2 * 2
    block = n * c * (stream + read) + logarithms + statistics + weights
    assert_close(plans[1].saved - plans[0].saved, block, rtol=1e-3, atol=0)
    blocks = 2 * (12 * c**2 + 9 * c)  # weights and biases that autocast makes for one block
    difference = [plan.activations - plan.activations_without_copies for plan in plans]
    assert_close(difference[1] - difference[0], blocks, rtol=0.1, atol=0)
    assert set(plans[0].forward_flops) == {torch.bfloat16}


class Types(nn.Module):
    """A backbone that notes the types of what comes out of its layers."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 1)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 8)
        self.neck = None

    @property
    def backbone(self):
        return self.run

    def run(self, images):
        y = self.conv(images).permute(0, 2, 3, 1)
        z = self.linear(self.norm(y))
        with torch.autocast("meta", enabled=False):
            full = self.linear(z.float())
        outputs = [y, self.norm(y), z, F.gelu(z), z.softmax(-1), z @ z.transpose(-1, -2), full]
        self.types = [x.dtype for x in outputs]
        return outputs


@pytest.mark.parametrize("bfloat16", [True, False])
def test_autocast_casts_what_cuda_casts(bfloat16):
    model = on_meta(Types)
    measure_step(model, 1, (16, 16), bfloat16=bfloat16)
    half, full = (torch.bfloat16 if bfloat16 else torch.float32), torch.float32
    assert model.types == [half, full, half, half, full, half, full]


def test_memory_grows_with_the_batch_by_equal_steps():
    model = on_meta(lambda: PerceptionEncoder(TINY, grad_checkpointing=True, **WINDOWS))
    one, two, four = (measure_step(model, b, (128, 128), bfloat16=True).activations for b in (1, 2, 4))
    assert_close(four, one + 3 * (two - one), rtol=0.01, atol=0)


def test_giant_at_1824_px():
    """The arithmetic of the DETA recipe: 53 T in linear layers, 4 T in global attention; inputs of 50 blocks."""
    model = on_meta(lambda: PerceptionEncoder("pe_spatial_g14_448", geometry="deta", grad_checkpointing=True))
    plan = measure_step(model, 1, (1824, 1824), bfloat16=True)
    tokens, padded = 114**2, 120**2
    linear = sum(2 * p.numel() for p in model.blocks[0].parameters() if p.ndim == 2) * (46 * padded + 4 * tokens)
    attention = 4 * 1536 * (4 * tokens**2 + 46 * padded * 576)
    patches = 2 * tokens * 3 * 16**2 * 1536
    assert linear == pytest.approx(53e12, rel=0.01)
    assert plan.forward_flops == {torch.bfloat16: linear + attention + patches}
    inputs = 1536 * 4 * (46 * padded + 4 * tokens)
    assert_close(plan.saved, inputs, rtol=0.05, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "recomputed"), [("pe_spatial_t16_512", False), ("pe_spatial_s16_512", True)])
def test_allocator_measures_what_was_planned(variant, recomputed, tmp_path):
    """The highest number of bytes that the CPU's allocator gave out in a step, within 15 %."""
    model = PerceptionEncoder(variant, grad_checkpointing=recomputed).train()
    images = torch.rand(1, 3, 512, 512)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        model(images)[0].sum().backward()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    memory = sorted((e["ts"], e["args"]) for e in events if e["name"] == "[memory]")
    before = memory[0][1]["Total Allocated"] - memory[0][1]["Bytes"]
    measured = max(args["Total Allocated"] for _, args in memory) - before
    plan = measure_step(
        on_meta(lambda: PerceptionEncoder(variant, grad_checkpointing=recomputed)), 1, (512, 512), bfloat16=False
    )
    assert_close(plan.peak, measured, rtol=0.15, atol=0)


class RealDeformable(torch.autograd.Function):
    """Deformable attention with numbers that keeps what MMCV's CUDA kernel keeps."""

    @staticmethod
    def forward(ctx, value, shapes, locations, weights):
        ctx.save_for_backward(value, shapes, locations, weights)
        return RealDeformable.sample(value, shapes, locations, weights)

    @staticmethod
    def backward(ctx, grad):
        value, shapes, locations, weights = (x.detach() for x in ctx.saved_tensors)
        inputs = [x.requires_grad_() for x in (value, locations, weights)]
        with torch.enable_grad():
            out = RealDeformable.sample(value, shapes, locations, weights)
        grads = torch.autograd.grad(out, inputs, grad)
        return grads[0], None, *grads[1:]


@pytest.mark.mmdet
@pytest.mark.parametrize("recomputed", [False, True])
def test_deta_keeps_what_was_planned(recomputed):
    pytest.importorskip("mmdet")
    from helpers.tiny_deta import tiny_deta
    from mmcv.ops import multi_scale_deform_attn
    from mmdet.structures import DetDataSample
    from mmengine.registry import MODELS, init_default_scope

    RealDeformable.sample = staticmethod(multi_scale_deform_attn.multi_scale_deformable_attn_pytorch)
    cfg = tiny_deta()
    cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4))
    init_default_scope("mmdet")
    planned, optimizer = build_on_meta(cfg)
    model = MODELS.build(cfg.model).train()
    for x in (model, planned):
        set_checkpointing(x, recomputed)
    samples = [DetDataSample(metainfo=dict(img_shape=(96, 80), batch_input_shape=(128, 128))) for _ in range(2)]

    images = torch.rand(2, 3, 128, 128)

    def forward(model):
        outputs = model.forward_transformer(model.extract_feat(images), samples)
        logits, boxes = model.bbox_head(outputs["hidden_states"], outputs["references"])
        first = outputs["proposals"]
        return logits.square().sum() + first["enc_logits"].square().sum() + boxes.sum() + first["enc_boxes"].sum()

    with mock.patch.object(multi_scale_deform_attn, "multi_scale_deformable_attn_pytorch", RealDeformable.apply):
        saved, highest = really(model, forward)
    plan = measure_step(planned, 2, (128, 128), bfloat16=False)
    assert_close(plan.saved, saved, rtol=0.02, atol=0)
    if recomputed:  # backward passes of deformable attention differ: with numbers it samples anew
        assert plan.activations < 1.2 * highest["activations"]
    assert measure_weights(planned, optimizer, shards=None).parameters == sum(p.nbytes for p in model.parameters())
    assert plan.counted == "backbone, neck, transformer, heads and focal losses"


class Unknown(nn.Module):
    """A model that nobody has heard of."""

    def __init__(self):
        super().__init__()
        self.backbone = PerceptionEncoder(TINY)
        self.neck = None
        self.head = nn.Linear(32, 1)


def test_gradients_are_counted_apart():
    def build():
        model = Unknown()
        model.backbone = nn.Sequential(nn.Flatten(), *(nn.Linear(192, 192) for _ in range(20)))
        return model

    plan = measure_step(on_meta(build), 1, (8, 8), bfloat16=False)
    layer = 192 * 192 * 4
    assert plan.activations < 2 * layer  # one is made before it becomes a gradient
    assert plan.peak > 20 * layer


def test_unknown_heads_are_said_not_to_be_counted():
    plan = measure_step(on_meta(Unknown), 1, (64, 64), bfloat16=False)
    assert plan.counted == "backbone and neck; THE HEADS ARE NOT COUNTED"
    alone = measure_step(on_meta(lambda: PerceptionEncoder(TINY)), 1, (64, 64), bfloat16=False)
    assert plan.step_flops == alone.step_flops


def train_step(model, batch):
    """Run a real step; return the bytes that autograd says it saves, besides weights, and the highest numbers."""
    weights = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    saved = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    def forward(model):
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            return model.parse_losses(model(**batch, mode="loss"))[0]

    highest = really(model, forward)[1]
    return sum(size for place, size in saved.items() if place not in weights), highest


def config_with(name, variant):
    from mmengine.config import Config
    from mmengine.registry import init_default_scope
    from mmengine.utils import import_modules_from_strings

    cfg = Config.fromfile(REPO / "configs" / name)
    import_modules_from_strings(**cfg.custom_imports)
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.update(variant=variant, init_cfg=None)
    return cfg


@pytest.mark.mmseg
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("variant", ["pe_spatial_t16_512", "pe_spatial_s16_512"])
def test_depth_keeps_what_was_planned_losses_too(variant, frozen):
    pytest.importorskip("mmseg")
    from mmengine.registry import MODELS
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    cfg = config_with("pe_spatial_dpt_nyu.py", variant)
    cfg.model.frozen = frozen
    planned, _ = build_on_meta(cfg)
    model = MODELS.build(cfg.model).train()
    depth = [torch.rand(1, 112, 144) for _ in range(2)]
    samples = [SegDataSample(gt_depth_map=PixelData(data=data)) for data in depth]
    saved, highest = train_step(model, dict(inputs=torch.rand(2, 3, 112, 144), data_samples=samples))
    plan = measure_step(planned, 2, (112, 144), bfloat16=False)
    assert_close(plan.saved, saved, rtol=0.03, atol=0)
    assert_close(plan.activations, highest["activations"], rtol=0.03, atol=0)
    assert plan.counted == "backbone, depth head and losses"


@pytest.mark.mmdet
def test_two_stage_detector_keeps_what_was_planned_losses_too():
    """With as many objects as the samplers want, so that their quotas are full in reality too.

    The pyramid gives the heads the same maps whatever the variant.
    """
    pytest.importorskip("mmdet")
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmengine.registry import MODELS
    from mmengine.structures import InstanceData

    cfg = config_with("pe_spatial_cascade_coco.py", "pe_spatial_t16_512")
    cfg.model.train_cfg.rcnn[0].sampler.num = 64
    planned, _ = build_on_meta(cfg)
    model = MODELS.build(cfg.model).train()
    corner = torch.rand(20, 2) * 128
    boxes = torch.cat((corner, corner + 32 + torch.rand(20, 2) * 96), 1)
    sample = DetDataSample(metainfo=dict(img_shape=(256, 256), batch_input_shape=(256, 256), pad_shape=(256, 256)))
    masks = BitmapMasks(torch.ones(20, 256, 256, dtype=torch.uint8).numpy(), 256, 256)
    sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.arange(20), masks=masks)
    sample.ignored_instances = InstanceData(bboxes=boxes[:0], labels=torch.arange(0))
    saved, highest = train_step(model, dict(inputs=torch.rand(1, 3, 256, 256), data_samples=[sample]))
    plan = measure_step(planned, 1, (256, 256), bfloat16=False)
    assert_close(plan.saved, saved, rtol=0.02, atol=0)
    assert_close(plan.activations, highest["activations"], rtol=0.02, atol=0)


def test_tracker_keeps_what_was_planned():
    """Of a clip with all the clicks that can be drawn."""
    pytest.importorskip("sam2")
    from pe_spatial.tracking.sam2.tracker import PESAM2
    from pe_spatial.tracking.sam2.training import Prompting

    def build(recompute=False):
        small = dict(d_model=32, mem_dim=16, layers=1, feedforward=64)
        tracker = dict(variant=vars(TINY), grid=4, **small)
        return PESAM2(tracker, prompting=dict(corrections=3), recompute=recompute).train()

    inputs = [torch.randint(0, 255, (3, 3, 64, 64), dtype=torch.uint8)]
    masks = [torch.rand(2, 3, 64, 64) > 0.5]
    with mock.patch.object(Prompting, "draw", lambda self, frames, _: self.most(frames)):
        saved, highest = train_step(build(), dict(inputs=inputs, masks=masks))
    plan = measure_step(on_meta(build), 1, (64, 64), bfloat16=False, frames=3, objects=2)
    assert_close(plan.saved, saved, rtol=0.15, atol=0)
    assert_close(plan.activations, highest["activations"], rtol=0.15, atol=0)
    assert "2 objects in a clip" in plan.counted
    recomputed = measure_step(on_meta(lambda: build(recompute=True)), 1, (64, 64), bfloat16=True, frames=3, objects=2)
    assert recomputed.saved < plan.saved


@pytest.mark.mmdet
def test_two_stage_heads_run_on_as_many_boxes_as_they_sample():
    pytest.importorskip("mmdet")
    from helpers.tiny_deta import CONFIG
    from mmengine.config import Config

    import pe_spatial.detection  # noqa: F401  (registers)

    cfg = Config.fromfile(CONFIG.with_name("mask_rcnn_pe.py"))
    cfg.default_scope = "mmdet"
    cfg.model.backbone.update(variant=vars(TINY), geometry="release", drop_path_rate=0.0)
    cfg.optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="SGD", lr=1e-3))
    operations = []
    for number in (512, 640):
        cfg.model.train_cfg.rcnn.sampler.num = number
        model, _ = build_on_meta(cfg)
        plan = measure_step(model, 1, (128, 128), bfloat16=False)
        operations.append(sum(plan.forward_flops.values()))
    head = model.roi_head.bbox_head
    box = 2 * sum(p.numel() * (49 if p.ndim == 4 else 1) for p in head.parameters() if p.ndim > 1)
    convolutions = sum(p.numel() for p in model.roi_head.mask_head.convs.parameters() if p.ndim == 4)
    upsample, logits = (
        getattr(model.roi_head.mask_head, name).weight.numel() * side**2
        for name, side in (("upsample", 14), ("conv_logits", 28))
    )
    mask = 2 * (convolutions * 14**2 + upsample + logits)
    assert operations[1] - operations[0] == 128 * box + 32 * mask
    assert plan.counted.startswith("backbone, neck, proposals, RoI heads and losses with 20 objects on an image")


@pytest.mark.mmseg
def test_frozen_encoder_under_a_segmentor_keeps_nothing():
    pytest.importorskip("mmseg")
    from mmengine.config import Config

    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_linear_ade20k.py")
    cfg.model.backbone.update(variant=vars(TINY), init_cfg=None)
    model, _ = build_on_meta(cfg)
    plan = measure_step(model, 2, (512, 512), bfloat16=False)
    maps = 2 * 32 * 32 * 32 * 4  # read by the norm, and again by the convolution
    logarithms = 2 * 150 * 512 * 512 * 4  # of the softmax at the size of the labels
    labels = 2 * 512 * 512 * 8  # as they come, and stacked
    assert_close(plan.saved, 2 * maps + logarithms + 2 * labels, rtol=0.01, atol=0)


def test_operations_leave_real_ones_as_they_are():
    """A plan changes nothing for what runs after it."""
    sample, bias = torch.rand(1, 2, 5, 8), torch.rand(2)
    before = F.scaled_dot_product_attention(sample, sample, sample)
    measure_step(on_meta(lambda: PerceptionEncoder(TINY)), 1, (64, 64), bfloat16=True)
    assert_close(F.scaled_dot_product_attention(sample, sample, sample), before, rtol=0, atol=0)
    assert bool(bias.sum() > -1)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(sample, torch.rand(3, 8)).dtype == torch.bfloat16
