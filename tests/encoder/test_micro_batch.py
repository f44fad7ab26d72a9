"""micro_batch: images are encoded a few at a time, and nothing else changes."""

import sys

import pytest
import torch
from helpers.encoders import TINY, TINY_NO_CLASS
from helpers.processes import start
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder, PerceptionEncoderPyramid
from pe_spatial.errors import ConfigError

WINDOWS = dict(window_size=3, global_attn_indexes=(1, 3))
PYRAMID = dict(pyramid=dict(strides=(8, 16, 32), out_channels=16, unused=(1,)), any_size=True)


def build(kind, config, **options):
    torch.manual_seed(0)
    extra = PYRAMID if kind is PerceptionEncoderPyramid else dict(out_indices=(1, 3))
    return kind(config, **extra, **options).train()


def step(model, images, seed=1):
    """Return maps and gradients."""
    torch.manual_seed(seed)
    maps = model(images)
    loss = sum((i + 1) * x.square().mean() for i, x in enumerate(maps))
    loss.backward()
    return [x.detach() for x in maps], {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", [PerceptionEncoder, PerceptionEncoderPyramid])
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(grad_checkpointing=True, **WINDOWS),
        dict(grad_checkpointing=[1], frozen_stages=2),
        dict(lora=dict(rank=2, dora=True)),
    ],
    ids=["plain", "recomputed", "frozen", "lora"],
)
@pytest.mark.parametrize("config", [TINY, TINY_NO_CLASS], ids=["class", "no class"])
def test_maps_and_gradients_are_those_of_the_complete_batch(kind, options, config):
    images = torch.rand(5, 3, 64, 96)
    whole, parts = (build(kind, config, micro_batch=size, **options) for size in (None, 2))
    seen = []
    (parts if kind is PerceptionEncoder else parts.encoder).patch_embed.register_forward_hook(
        lambda _, args, __: seen.append(len(args[0]))
    )
    maps, grads = step(whole, images)
    maps_of_parts, grads_of_parts = step(parts, images)
    assert seen == [2, 2, 1, 1, 2, 2]  # and again backwards
    assert_close(maps_of_parts, maps, rtol=1e-5, atol=1e-6)
    assert grads.keys() == grads_of_parts.keys()
    for name, grad in grads.items():
        assert (grads_of_parts[name] - grad).norm() <= 1e-6 * grad.norm().clamp(min=1e-3), name
    with torch.no_grad():
        parts(images)
    assert seen[6:] == [5]


def test_class_tokens_come_in_parts_too():
    whole, parts = (build(PerceptionEncoder, TINY, micro_batch=size) for size in (None, 2))
    images = torch.rand(5, 3, 64, 64)
    assert_close(parts.forward_with_class_tokens(images), whole.forward_with_class_tokens(images), rtol=1e-5, atol=1e-6)


def test_unused_levels_stay_views_of_one_zero():
    levels = build(PerceptionEncoderPyramid, TINY, micro_batch=2)(torch.rand(5, 3, 64, 64))
    assert levels[1].shape == (5, 16, 4, 4)
    assert not any(levels[1].stride())


def test_random_numbers_are_drawn_once():
    """As if the micro-batches had been encoded one after the other, with all activations kept."""
    options = dict(drop_path_rate=0.5, lora=dict(rank=2, dropout=0.3))
    whole, parts = (build(PerceptionEncoder, TINY, micro_batch=size, **options) for size in (None, 2))
    images = torch.rand(4, 3, 64, 64)
    encode = whole.forward
    whole.forward = lambda x: [torch.cat(maps) for maps in zip(*(encode(part) for part in x.split(2)), strict=True)]
    assert_close(step(parts, images), step(whole, images), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("recomputed", [False, True])
def test_activations_are_those_of_one_micro_batch(recomputed):
    ledger = pytest.importorskip("pe_spatial.planning.ledger")

    def highest(images, size):
        model = build(PerceptionEncoder, TINY_NO_CLASS, micro_batch=size, grad_checkpointing=recomputed)
        batch = torch.zeros(images, 3, 128, 128)
        with ledger.Ledger(model) as counted:
            maps = model(batch)
            (maps[0].sum() + maps[1].sum()).backward()
        return counted.highest["activations"]

    image, maps = 3 * 128 * 128 * 4, 2 * 64 * 32 * 4  # bytes
    assert highest(8, 2) - highest(4, 2) <= 4 * (image + 1.5 * maps)
    assert highest(8, None) - highest(4, None) > 4 * (image + (2 if recomputed else 20) * maps)


def train_a_half(rank, folder, images):
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    model = build(PerceptionEncoder, TINY, micro_batch=1, lora=dict(rank=2))
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with torch.autocast("cpu", torch.bfloat16):
        step(wrapped, images[2 * rank : 2 * rank + 2])
    torch.save({name: p.grad for name, p in model.named_parameters() if p.grad is not None}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="gloo")
def test_two_processes_under_autocast(tmp_path):
    images = torch.rand(4, 3, 64, 64)
    start(train_a_half, (tmp_path, images), number=2)
    model = build(PerceptionEncoder, TINY, lora=dict(rank=2))
    with torch.autocast("cpu", torch.bfloat16):
        _, grads = step(model, images)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert first.keys() == grads.keys()
    for name, grad in grads.items():
        assert (first[name] - grad).norm() <= 0.02 * grad.norm(), name  # sums in bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(micro_batch=0), "micro_batch is 0; give a number of images"),
        (dict(micro_batch=True), "micro_batch is True"),
        (dict(micro_batch=1.5), "micro_batch is 1.5"),
        (dict(micro_batch=2, grad_checkpointing="selective"), "micro_batch saves nothing beside .*'selective'"),
    ],
)
@pytest.mark.parametrize("kind", [PerceptionEncoder, PerceptionEncoderPyramid])
def test_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(TINY, **options)
