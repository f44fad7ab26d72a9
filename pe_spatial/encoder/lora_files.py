"""Checkpoints of adapters: they name the frozen base by its hash instead of holding it, and get it back when loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor, nn

from .checkpoint import base_hash, load_checkpoint
from .files import CheckpointError
from .lora import LoRA, get_lora
from .vit import PerceptionEncoder

State = MutableMapping[str, Tensor]


def describe_adapters(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return for each encoder with adapters, by its place: options, source and hash of its base.

    The hash is None if the base is not what `load_checkpoint` loaded: then no one can restore it, and it must be saved.
    With sharded parameters, all ranks must call this.
    """
    facts = {}
    for place, encoder in model.named_modules():
        if isinstance(encoder, PerceptionEncoder) and encoder.lora is not None:
            found = base_hash(encoder)
            base = found if found == encoder.base_hash else None
            facts[place] = dict(lora=asdict(encoder.lora), base=base, source=encoder.base_source)
    return facts


def omit_base(model: nn.Module, facts: Mapping[str, Mapping[str, Any]], states: Iterable[State]) -> None:
    """Remove the base of adapters from state dicts of `model`, where it can be restored; `facts` describe them."""
    names = {
        _at(place, name)
        for place, about in facts.items()
        if about["base"] is not None
        for name in model.get_submodule(place).base_names  # type: ignore[union-attr]
    }
    for state in states:
        for name in [name for name in state if name.removeprefix("module.") in names]:
            del state[name]


def _at(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def add_base(model: nn.Module, meta: Any, states: Mapping[str, State], path: object, *, inside: str = "") -> None:
    """Put the base back into the state dicts of a checkpoint, from the weights of `model` or its `base_source`.

    Args:
        model: the model that will load the checkpoint.
        meta: the checkpoint's 'meta'; without an entry 'lora' of this package nothing happens.
        states: state dicts, by the prefix of their names.
        path: the checkpoint, for errors.
        inside: place of `model` in the model of the checkpoint.

    Raises CheckpointError if the model has no such adapters, or another base.
    """
    found = meta.get("lora") if isinstance(meta, Mapping) else None
    facts: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
    facts = {place: x for place, x in facts.items() if isinstance(x, Mapping) and {"lora", "base"} <= {*x}}
    encoders = {f"{inside}{place}": x for place, x in model.named_modules() if isinstance(x, PerceptionEncoder)}
    for place, about in facts.items():
        encoder, options = encoders.get(place), get_lora(about["lora"])
        assert options is not None
        if encoder is None or encoder.lora is None:
            raise CheckpointError(
                f"{path} holds LoRA adapters, and the encoder of this model has none; give the option lora="
                f"{_written(options)} of its backbone, or merge them first: pe-spatial merge_lora {path} FILE"
            )
        if replace(options, dropout=0.0) != replace(encoder.lora, dropout=0.0):
            raise CheckpointError(
                f"{path} was trained with lora={_written(options)}, but the config has {_written(encoder.lora)}; "
                "give the first"
            )
        if about["base"] is None:
            continue
        _restore(encoder, about, path)
        tensors = encoder.state_dict()
        for prefix, state in states.items():
            state.update({prefix + _at(place, name): tensors[name] for name in encoder.base_names})


def _written(options: LoRA) -> str:
    """Return the options as a config has them, without defaults."""
    given = {name: value for name, value in asdict(options).items() if name == "rank" or value != getattr(LoRA, name)}
    return f"dict({', '.join(f'{name}={value!r}' for name, value in given.items())})"


def _restore(encoder: PerceptionEncoder, about: Mapping[str, Any], path: object) -> None:
    """Load the base of adapters unless the encoder has it already."""
    if base_hash(encoder) == about["base"]:
        return
    wanted = f"the weights {about['source']} (SHA-256 {about['base'][:12]})"
    remedy = "set init_cfg.checkpoint of the backbone (a tracker: model.encoder_weights) to that file by --cfg-options"
    sharded = any(hasattr(parameter, "full_tensor") for parameter in encoder.parameters())
    if encoder.base_source is None or sharded:
        raise CheckpointError(f"{path} holds LoRA adapters for {wanted}, which this model was not given; {remedy}")
    try:
        load_checkpoint(encoder, encoder.base_source)
    except CheckpointError as error:
        raise CheckpointError(f"{path} holds LoRA adapters for {wanted}: {error}; then {remedy}") from error
    if encoder.base_hash != about["base"]:
        raise CheckpointError(
            f"{path} holds LoRA adapters for {wanted}, but {encoder.base_source} holds other weights (SHA-256 "
            f"{str(encoder.base_hash)[:12]}); {remedy}"
        )
