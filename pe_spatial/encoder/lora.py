"""LoRA and DoRA: small adapters train beside the frozen linear maps of an encoder.

Sources: LoRA (arXiv 2106.09685, section 4.1), DoRA (arXiv 2402.09353, sections 4.2 and 4.3). peft would bring
transformers and accelerate into a core that needs torch alone, and would rename the weights that it wraps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pe_spatial.errors import ConfigError, integer


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Options of the adapters; ConfigError for values that are not allowed.

    Args:
        rank: rank of the update of each weight.
        alpha: the update is scaled by alpha / rank; None: by 1.
        dropout: probability on the input of the adapters, in training.
        targets: the linear layers of a block that get one, by their names or the ends of them ('qkv').
        dora: also train the norm of each row of the weights, apart from its direction.
        train_norms: also train the norms of the blocks that have adapters.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: Sequence[str] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    dora: bool = False
    train_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple([self.targets] if isinstance(self.targets, str) else self.targets))
        if integer("lora.rank", self.rank) < 1:
            raise ConfigError(f"lora.rank is {self.rank}; give at least 1, for example 8, or lora=None for no adapters")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"lora.alpha is {self.alpha}; give a positive number, or None for the rank")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}; it is a probability below 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty; name linear layers of a block, such as attn.qkv")


def get_lora(options: LoRA | Mapping[str, Any] | None) -> LoRA | None:
    """Return the options as a `LoRA`; ConfigError for names that it does not have."""
    if options is None or isinstance(options, LoRA):
        return options
    allowed = [field.name for field in fields(LoRA)]
    unknown = [str(name) for name in options if name not in allowed] if isinstance(options, Mapping) else [str(options)]
    if unknown:
        raise ConfigError(f"lora has no {', '.join(unknown)}; write lora=dict(rank=8) with any of {', '.join(allowed)}")
    return LoRA(**options)


class LoRALinear(nn.Linear):
    """`linear`, frozen, with an adapter: weight and bias keep their names, and its output is at first the same.

    A state dict of the plain layer loads, and the adapter then starts anew.
    """

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter

    def __init__(self, linear: nn.Linear, options: LoRA) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        linear.requires_grad_(False)
        self.weight, self.bias = linear.weight, linear.bias
        if options.rank > (limit := min(linear.weight.shape)):
            raise ConfigError(f"lora.rank is {options.rank}, but a weight of this encoder has rank {limit}; lower it")
        self.scale, self.dropout = (options.alpha or options.rank) / options.rank, options.dropout
        shapes = dict(lora_a=(options.rank, linear.in_features), lora_b=(linear.out_features, options.rank))
        self._shapes = shapes | (dict(lora_magnitude=(linear.out_features,)) if options.dora else {})
        self.dora = options.dora
        self._create()
        self.reset()

    def _create(self) -> None:
        for name, shape in self._shapes.items():
            self.register_parameter(name, nn.Parameter(self.weight.new_empty(shape)))
        nn.init.kaiming_uniform_(self.lora_a, a=5**0.5)  # as nn.Linear

    def reset(self) -> None:
        """Let the output be that of the plain layer."""
        if self.lora_a.is_meta and not self.weight.is_meta:
            self._create()
        with torch.no_grad():
            self.lora_b.zero_()
            if self.dora and not self.weight.is_meta:
                self.lora_magnitude.copy_(self._row_norms())

    def _row_norms(self) -> Tensor:
        """Return the norm of each row of weight + update, (out,), as a constant: section 4.3 of DoRA."""
        with torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            a, b = self.lora_a, self.lora_b * self.scale
            squares = torch.linalg.vector_norm(self.weight, dim=1).square()
            return (squares + ((self.weight @ a.T * 2 + b @ (a @ a.T)) * b).sum(1)).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        out = super().forward(x)
        update = F.linear(F.linear(F.dropout(x, self.dropout, self.training), self.lora_a) * self.scale, self.lora_b)
        if not self.dora:
            return out + update
        ratio = (self.lora_magnitude / self._row_norms()).to(out.dtype)
        return out + (ratio - 1) * (out if self.bias is None else out - self.bias.to(out.dtype)) + ratio * update

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a plain layer with the same outputs as this one in evaluation."""
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        weight = torch.addmm(self.weight, self.lora_b, self.lora_a, alpha=self.scale)
        if self.dora:
            weight *= (self.lora_magnitude / self._row_norms())[:, None]
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return plain

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        *lists: Any,
    ) -> None:  # fmt: skip
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *lists)
        names = {prefix + name for name in self._shapes}
        if f"{prefix}weight" in state_dict and not names & state_dict.keys():
            missing_keys[:] = [name for name in missing_keys if name not in names]
            self.reset()


def is_adapter(name: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return name.rpartition(".")[2].startswith("lora_")


def add_adapters(blocks: Sequence[nn.Module], options: LoRA) -> None:
    """Replace the target layers of `blocks`, and freeze all other parameters, but for the norms if they train.

    Raises ConfigError if there is no block, or for a target that no block has.
    """
    if not blocks:
        raise ConfigError("frozen_stages freezes all blocks, so that none is left for lora; lower it, for example -1")
    names = [name for name, layer in blocks[0].named_modules() if isinstance(layer, nn.Linear)]
    chosen = {target: [n for n in names if f".{n}".endswith(f".{target}")] for target in options.targets}
    unknown = [str(target) for target, found in chosen.items() if not found]
    if unknown:
        raise ConfigError(f"lora.targets: no layer is called {', '.join(unknown)}; a block has {', '.join(names)}")
    targets = [name for name in names if any(name in found for found in chosen.values())]
    for block in blocks:
        block.requires_grad_(False)
        for norm in block.modules():
            if isinstance(norm, nn.LayerNorm):
                norm.requires_grad_(options.train_norms)
        for name in targets:
            parent, _, child = name.rpartition(".")
            linear: Any = block.get_submodule(name)
            setattr(block.get_submodule(parent), child, LoRALinear(linear, options))


def merge_adapters(model: nn.Module) -> None:
    """Replace every layer with an adapter by a plain one, in place; the outputs in evaluation stay the same.

    Parameters that were frozen stay so. Raises ConfigError if there is no adapter.
    """
    if not has_adapters(model):
        raise ConfigError("the model has no LoRA adapters: it never had any, or they are merged already")
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, LoRALinear):
                setattr(module, name, child.merged())
        if getattr(module, "lora", None) is not None:
            module.lora, module.base_names = None, ()  # type: ignore[assignment]


def has_adapters(model: nn.Module) -> bool:
    """Whether any layer of `model` has an adapter."""
    return any(isinstance(module, LoRALinear) for module in model.modules())
