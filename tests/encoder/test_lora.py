"""Adapters start as the plain encoder, alone train, and merge into it; checkpoints without the base restore it."""

import re

import pytest
import torch
from helpers.encoders import TINY
from helpers.versions import SELECTIVE
from torch.testing import assert_close

from pe_spatial import PerceptionEncoder, from_pretrained, load_checkpoint
from pe_spatial.encoder.checkpoint import base_hash
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.layer_decay import is_norm_or_bias, lr_factors
from pe_spatial.encoder.lora import LoRA, LoRALinear, is_adapter, merge_adapters
from pe_spatial.encoder.lora_files import add_base, describe_adapters, omit_base
from pe_spatial.errors import ConfigError

DORA = dict(rank=3, alpha=6.0, dora=True)


def images(side=64):
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


def with_adapters(plain, lora=DORA, **options):
    """Return an encoder with the weights of `plain` and new adapters."""
    model = PerceptionEncoder(TINY, lora=lora, **options)
    model.load_state_dict(plain.state_dict())
    return model


@torch.no_grad()
def trained(model):
    """Give the adapters values as after a training."""
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise * (parameter if name.endswith("magnitude") else 1))
    return model


@pytest.fixture
def base(tiny, tmp_path):
    """A file of plain weights."""
    torch.save(tiny().state_dict(), tmp_path / "base.pt")
    return tmp_path / "base.pt"


@pytest.mark.parametrize("lora", [dict(rank=2), DORA, dict(rank=2, dropout=0.5, targets=["qkv"])])
def test_outputs_start_as_those_of_the_plain_encoder_to_the_last_bit(tiny, lora):
    plain = tiny()
    model = with_adapters(plain, lora).train()
    assert torch.equal(model(images())[0], plain(images())[0])
    assert torch.equal(model.eval()(images(96))[0], plain(images(96))[0])
    assert not torch.equal(trained(model)(images())[0], plain(images())[0])
    model.load_state_dict(plain.state_dict())  # the adapters start anew
    assert torch.equal(model(images())[0], plain(images())[0])


@pytest.mark.parametrize("lora", [dict(rank=2, alpha=8), DORA])
def test_a_layer_computes_what_the_paper_says(lora):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 5)
    weight, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = trained(LoRALinear(linear, LoRA(**lora)))
    update = layer.lora_b @ layer.lora_a * (lora["alpha"] / lora["rank"])
    expected = weight + update
    if "dora" in lora:
        expected = layer.lora_magnitude[:, None] * expected / expected.norm(dim=1, keepdim=True)
    x = torch.randn(7, 6)
    assert_close(layer(x), x @ expected.T + bias)
    assert_close(layer.merged().weight, expected)


def test_dora_treats_the_norm_as_a_constant():
    layer = trained(LoRALinear(torch.nn.Linear(6, 5), LoRA(**DORA)))
    x = torch.randn(7, 6)
    layer(x).sum().backward()
    a, b, m = (p.detach().clone().requires_grad_() for p in (layer.lora_a, layer.lora_b, layer.lora_magnitude))
    summed = layer.weight + layer.scale * b @ a
    (x @ (m[:, None] * summed / summed.detach().norm(dim=1, keepdim=True)).T).sum().backward()
    for ours, theirs in ((layer.lora_a, a), (layer.lora_b, b), (layer.lora_magnitude, m)):
        assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("recomputed", [False, True, pytest.param("selective", marks=SELECTIVE)])
@pytest.mark.parametrize("stages", [-1, 2])
def test_gradients_reach_adapters_alone(tiny, stages, recomputed):
    options = dict(frozen_stages=stages, grad_checkpointing=recomputed)
    model = trained(with_adapters(tiny(), dict(rank=2, train_norms=True), **options)).train()
    model(images())[0].square().mean().backward()
    found = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    blocks = range(max(stages, 0), 4)
    assert found == {name for name, p in model.named_parameters() if p.requires_grad}
    assert found == {
        name for name, _ in model.named_parameters()
        if any(name.startswith(f"blocks.{i}.") for i in blocks) and (is_adapter(name) or "norm" in name)
    }  # fmt: skip
    assert set(model.base_names) == {name for name, _ in model.named_parameters()} - found


@SELECTIVE
def test_recomputing_changes_no_gradient(tiny):
    grads = []
    for recomputed in (False, True, "selective"):
        torch.manual_seed(0)
        model = trained(with_adapters(tiny(), dict(DORA, dropout=0.3), grad_checkpointing=recomputed)).train()
        torch.manual_seed(0)
        model(images())[0].square().mean().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for recomputed in grads[1:]:
        assert_close(grads[0], recomputed, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("lora", [dict(rank=2, alpha=5, dropout=0.5), DORA, dict(DORA, train_norms=True)])
def test_merged_weights_give_the_same_outputs(tiny, lora):
    model = trained(with_adapters(tiny(), lora)).eval()
    expected = model(images())[0]
    merge_adapters(model)
    plain = PerceptionEncoder(TINY).eval()
    plain.load_state_dict(model.state_dict())
    assert_close(plain(images())[0], expected, rtol=1e-5, atol=1e-5)
    assert not torch.equal(plain(images())[0], tiny()(images())[0])
    assert model.lora is None
    assert not any(isinstance(layer, LoRALinear) for layer in model.modules())
    with pytest.raises(ConfigError, match="no LoRA adapters: it never had any, or they are merged already"):
        merge_adapters(model)


def test_layer_decay_counts_adapters_with_their_blocks(tiny):
    model = with_adapters(tiny())
    factors = lr_factors(model, 0.5)
    for i in range(4):
        assert factors[f"blocks.{i}.attn.qkv.lora_a"] == factors[f"blocks.{i}.norm1.weight"] == 0.5 ** (4 - i)
    assert factors.keys() == dict(model.named_parameters()).keys()
    kinds = {
        name.rpartition(".")[2]: is_norm_or_bias(name, p) for name, p in model.named_parameters() if is_adapter(name)
    }
    assert kinds == {"lora_a": False, "lora_b": False, "lora_magnitude": True}


def test_loading_stays_strict(tiny, base, tmp_path):
    model = PerceptionEncoder(TINY, lora=DORA)
    load_checkpoint(model, base)
    assert torch.equal(model.eval()(images())[0], tiny()(images())[0])
    on_meta = from_pretrained(base, variant=TINY, lora=DORA)
    assert torch.equal(on_meta(images())[0], tiny()(images())[0])
    assert all(p.requires_grad is is_adapter(name) for name, p in on_meta.named_parameters())
    state = tiny().state_dict()
    torch.save({**state, "blocks.0.extra": state["norm_pre.bias"]}, tmp_path / "more.pt")
    with pytest.raises(CheckpointError, match=r"unknown to the model: blocks\.0\.extra"):
        load_checkpoint(model, tmp_path / "more.pt")
    torch.save({name: x for name, x in state.items() if name != "blocks.3.mlp.fc1.weight"}, tmp_path / "less.pt")
    with pytest.raises(CheckpointError, match=r"missing in the file: blocks\.3\.mlp\.fc1\.weight"):
        load_checkpoint(model, tmp_path / "less.pt")
    torch.save(model.state_dict(), tmp_path / "adapters.pt")
    with pytest.raises(CheckpointError, match=r"holds LoRA adapters; merge them first: pe-spatial merge_lora"):
        load_checkpoint(PerceptionEncoder(TINY), tmp_path / "adapters.pt")


def saved(model):
    """Return the 'meta' and the state dict of a checkpoint without the base."""
    facts, state = describe_adapters(model), model.state_dict()
    omit_base(model, facts, [state])
    return dict(lora=facts), state


def test_a_checkpoint_of_adapters_names_its_base_and_gets_it_back(base):
    model = PerceptionEncoder(TINY, lora=dict(rank=2, train_norms=True))
    load_checkpoint(model, base)
    meta, state = saved(trained(model))
    assert all(is_adapter(name) or ".norm" in name for name in state)
    assert meta["lora"][""] == dict(lora=meta["lora"][""]["lora"], base=base_hash(model), source=str(base))
    other = PerceptionEncoder(TINY, lora=dict(rank=2, train_norms=True, dropout=0.1))
    other.base_source = str(base)
    add_base(other, meta, {"": state}, "file.pth")
    other.load_state_dict(state)
    assert torch.equal(other.eval()(images())[0], model.eval()(images())[0])


def test_another_base_is_refused(tiny, base, tmp_path):
    model = PerceptionEncoder(TINY, lora=dict(rank=2))
    load_checkpoint(model, base)
    meta, state = saved(model)
    changed = tiny().state_dict()
    changed["blocks.2.mlp.fc2.bias"][3] += 1e-6
    torch.save(changed, tmp_path / "other.pt")
    other = PerceptionEncoder(TINY, lora=dict(rank=2))
    for source, said in (
        (
            None,
            r"file\.pth holds LoRA adapters for the weights .*base\.pt \(SHA-256 \w{12}\), which this model was not",
        ),
        (tmp_path / "other.pt", r"other\.pt holds other weights \(SHA-256 \w{12}\); set init_cfg\.checkpoint"),
        (tmp_path / "gone.pt", r"no checkpoint at .*gone\.pt.*; then set init_cfg\.checkpoint"),
    ):
        other.base_source = source and str(source)
        with pytest.raises(CheckpointError, match=said) as error:
            add_base(other, meta, {"": dict(state)}, "file.pth")
        assert "\n" not in str(error.value)


def test_other_adapters_are_refused(base):
    model = PerceptionEncoder(TINY, lora=dict(rank=2, alpha=4))
    load_checkpoint(model, base)
    meta, state = saved(model)
    with pytest.raises(
        CheckpointError,
        match=r"trained with lora=dict\(rank=2, alpha=4\), but the config has dict\(rank=2\); give the first",
    ):
        add_base(PerceptionEncoder(TINY, lora=dict(rank=2)), meta, {"": state}, "file.pth")
    with pytest.raises(
        CheckpointError,
        match=r"this model has none; give the option lora=dict\(rank=2, alpha=4\).*merge_lora file\.pth",
    ):
        add_base(PerceptionEncoder(TINY), meta, {"": state}, "file.pth")


@pytest.mark.parametrize("meta", [None, "text", dict(lora=True), dict(lora=dict(rank=4)), dict(lora={"": dict(r=4)})])
def test_what_other_projects_call_lora_changes_nothing(meta):
    state = {}
    add_base(PerceptionEncoder(TINY), meta, {"": state}, "file.pth")
    assert not state


def test_a_base_that_no_file_holds_is_saved(tiny, base):
    random = PerceptionEncoder(TINY, lora=dict(rank=2))
    replaced = PerceptionEncoder(TINY, lora=dict(rank=2))
    load_checkpoint(replaced, base)
    replaced.load_state_dict({name: x + 1 for name, x in tiny().state_dict().items()})
    for model in (random, replaced):
        meta, state = saved(model)
        assert meta["lora"][""]["base"] is None
        assert state.keys() == model.state_dict().keys()
        add_base(model, meta, {"": state}, "file.pth")


@pytest.mark.parametrize(
    ("lora", "error", "said"),
    [
        (dict(rank=0), ConfigError, "lora.rank is 0; give at least 1, for example 8, or lora=None for no adapters"),
        (dict(rank=-3), ConfigError, "lora.rank is -3"),
        (dict(rank=2.5), TypeError, "lora.rank is 2.5; give an integer"),
        (dict(rank=33), ConfigError, "lora.rank is 33, but a weight of this encoder has rank 32; lower it"),
        (dict(alpha=0), ConfigError, "lora.alpha is 0; give a positive number"),
        (dict(dropout=1.0), ConfigError, "lora.dropout is 1.0; it is a probability below 1"),
        (dict(targets=()), ConfigError, "lora.targets is empty"),
        (dict(targets=["attn.qkv", "q_proj"]), ConfigError,
         "lora.targets: no layer is called q_proj; a block has attn.qkv, attn.proj, mlp.fc1, mlp.fc2"),
        (dict(r=8), ConfigError, "lora has no r; write lora=dict(rank=8) with any of rank, alpha"),
        ("rank=8", ConfigError, "lora has no rank=8; write lora=dict(rank=8)"),
    ],
)  # fmt: skip
def test_bad_options(lora, error, said):
    with pytest.raises(error, match=re.escape(said)):
        PerceptionEncoder(TINY, lora=lora)


def test_a_frozen_encoder_has_no_place_for_adapters():
    with pytest.raises(ConfigError, match="frozen_stages freezes all blocks"):
        PerceptionEncoder(TINY, lora=dict(rank=2), frozen_stages=4)
