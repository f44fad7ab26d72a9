"""AdamW8bit: trains as AdamW does, with states of a quarter, which are saved, restored and planned exactly."""

import sys

import pytest
import torch
from helpers.encoders import TINY
from mmengine.config import ConfigDict
from torch import nn
from torch.testing import assert_close

pytest.importorskip("mmengine")
pytest.importorskip("torchao")
from mmengine.optim import LinearLR, build_optim_wrapper

import pe_spatial.integrations.openmmlab  # noqa: F401  (registers)
from pe_spatial import PerceptionEncoder
from pe_spatial.engine.eight_bit import _optimizer_class, adamw_8bit
from pe_spatial.engine.weights import load_from_file
from pe_spatial.errors import ConfigError
from pe_spatial.planning.planner import can_be_sharded, measure_weights


def encoder(device="cpu", **options):
    torch.manual_seed(0)
    with torch.device(device):
        return PerceptionEncoder(TINY, **options).train()


def wrap(model, **changes):
    cfg = dict(
        type="OptimWrapper",
        optimizer=dict(type="AdamW8bit", lr=1e-3, weight_decay=0.1),
        constructor="LayerDecayOptimWrapperConstructor",
        paramwise_cfg=dict(layer_decay_rate=0.5),
    )
    return build_optim_wrapper(model, ConfigDict(cfg, **changes))


def steps(model, wrapper, number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(number):
        images = torch.rand(2, 3, 64, 64, generator=generator)
        wrapper.update_params((model(images)[0] - 1).square().mean())


def parts(state):
    return [getattr(state, name) for name in state.tensor_attrs] if hasattr(state, "tensor_attrs") else [state]


@pytest.mark.parametrize("options", [{}, dict(lora=dict(rank=32, targets=("fc1",)))], ids=["all", "lora"])
def test_trains_as_adamw_with_rates_of_layers_and_schedules(options):
    losses = {}
    for kind in ("AdamW", "AdamW8bit"):
        model = encoder(**options)
        wrapper = wrap(model, optimizer=dict(type=kind, lr=1e-3, weight_decay=0.1), clip_grad=dict(max_norm=1.0))
        rates = [group["lr"] for group in wrapper.param_groups]
        assert len(set(rates)) > 1
        schedule = LinearLR(wrapper, start_factor=0.5, by_epoch=False, end=5)
        for _ in range(6):
            steps(model, wrapper, 2)
            schedule.step()
        assert [group["lr"] for group in wrapper.param_groups] == pytest.approx(rates, rel=1e-12)
        losses[kind] = (model(torch.ones(1, 3, 64, 64))[0] - 1).square().mean().item()
    before = (encoder(**options)(torch.ones(1, 3, 64, 64))[0] - 1).square().mean().item()
    assert abs(losses["AdamW8bit"] - losses["AdamW"]) < 0.02 * (before - losses["AdamW"])


def test_resuming_is_exact_and_its_file_is_plain(tmp_path):
    model = encoder()
    wrapper = wrap(model)
    steps(model, wrapper, 2)
    assert any(hasattr(x, "qmap") for state in wrapper.optimizer.state.values() for x in state.values())
    torch.save(dict(model=model.state_dict(), optimizer=wrapper.state_dict()), tmp_path / "run.pth")
    assert b"torchao" not in (tmp_path / "run.pth").read_bytes()
    steps(model, wrapper, 2, seed=1)

    saved = load_from_file(str(tmp_path / "run.pth"))
    resumed = encoder()
    resumed.load_state_dict(saved["model"])
    again = wrap(resumed)
    again.load_state_dict(saved["optimizer"])
    steps(resumed, again, 2, seed=1)
    assert_close(resumed.state_dict(), model.state_dict(), rtol=0, atol=0)
    for ours, theirs in zip(again.optimizer.state.values(), wrapper.optimizer.state.values(), strict=True):
        for name in theirs:
            assert_close(parts(ours[name]), parts(theirs[name]), rtol=0, atol=0)


@pytest.mark.parametrize("options", [{}, dict(lora=dict(rank=4))], ids=["all", "lora"])
def test_states_are_planned_exactly(options):
    model = encoder(**options)
    wrapper = wrap(model)
    steps(model, wrapper, 1)
    real = sum(x.nbytes for state in wrapper.optimizer.state.values() for s in state.values() for x in parts(s))
    planned = encoder("meta", **options)
    weights = measure_weights(planned, wrap(planned).optimizer, shards=None)
    assert weights.states == real
    if not options:
        assert real < 0.5 * sum(2 * p.nbytes for p in model.parameters())
    assert not can_be_sharded(planned, wrap(planned).optimizer)


def test_bytes_of_a_large_tensor():
    """Of 64 x 256 values: a code for each, a scale for 256, a table of 256; twice, and the step."""
    weight = nn.Parameter(torch.zeros(64, 256))
    weight.grad = torch.ones_like(weight)
    optimizer = adamw_8bit([weight], lr=1e-3)
    optimizer.step()
    state = optimizer.state[weight]
    assert sum(x.nbytes for s in state.values() for x in parts(s)) == 2 * (64 * 256 + 64 * 4 + 1024) + 4


def test_torchao_that_is_missing_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    _optimizer_class.cache_clear()
    with pytest.raises(ConfigError, match=r"AdamW8bit needs torchao, which cannot be imported .*: pip install torchao"):
        wrap(encoder())
    _optimizer_class.cache_clear()
