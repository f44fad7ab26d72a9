"""One encoder for several models: it encodes an image once, for the layers that all of them read."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError

ROUNDING = 1e-4
"""Largest difference of two inputs that are one image: normalizations differ in their last bits, pixels by 0.008."""

_Encoded = tuple[dict[int, Tensor], dict[int, Tensor]]  # layer -> its map, layer -> its class token


@dataclass(eq=False)
class Group:
    """Models whose encoders have the same weights and the same geometry, so that one of them computes for all."""

    encoder: PerceptionEncoder
    members: list[str] = field(default_factory=list)
    layers: set[int] = field(default_factory=set)

    def add(self, name: str, encoder: PerceptionEncoder) -> None:
        """Let a model read from the group; the encoder with the most blocks computes."""
        self.members.append(name)
        self.layers |= set(encoder.out_indices)
        if encoder.depth > self.encoder.depth:
            self.encoder = encoder

    def encode(self, images: Tensor) -> _Encoded:
        """(B, 3, H, W) -> the maps and the class tokens of all layers that are read."""
        self.encoder.out_indices = layers = tuple(sorted(self.layers))
        maps, tokens = self.encoder.forward_with_class_tokens(images)
        return dict(zip(layers, maps, strict=True)), dict(zip(layers, tokens, strict=False))


@dataclass(eq=False)
class _Input:
    """An image as the encoder gets it, and what is encoded of it, by group."""

    images: Tensor
    precision: tuple[bool, torch.dtype]
    encoded: dict[Group, _Encoded] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)


class SharedEncoder:
    """Takes the place of the encoders of several models, and computes what any of them asks for at most once.

    `attach` a model, call `begin` for each new image, and run the models. What a model asks for is found again by the
    input itself, so models that resize or normalize an image differently do not share, and get what they would alone.

    Args:
        loaded: whether the encoders have their weights, which are then compared; False to load them afterwards.

    Attributes:
        groups: models by geometry.
        inputs: the different images that the models have encoded since `begin`.
        seconds: time of encoding since `begin`.
        alone: the same if no model had shared, from the times of what they share.
        encodes: how often an encoder has run since `begin`.
    """

    def __init__(self, *, loaded: bool = True) -> None:
        self.loaded = loaded
        self.groups: list[Group] = []
        self.begin()

    def begin(self) -> None:
        """Forget the last image."""
        self.inputs: list[_Input] = []
        self.seconds = self.alone = 0.0
        self._times: dict[tuple[int, int], float] = {}

    @property
    def encodes(self) -> int:
        return len(self._times)

    def attach(self, name: str, model: nn.Module) -> None:
        """Replace the encoders of a model, in place.

        Raises ConfigError if it has none, or another one than the models before, or adapters.
        """
        places = list(encoders(model))
        if not places:
            raise ConfigError(f"{name} has no Perception Encoder, which the models could share; predict with it alone")
        for parent, child, encoder in places:
            group = self._group(name, encoder)
            group.add(name, encoder)
            setattr(parent, child, Reader(self, group, name, encoder))

    def _group(self, name: str, encoder: PerceptionEncoder) -> Group:
        if encoder.lora is not None:
            raise ConfigError(
                f"{name} has LoRA adapters in its encoder (base {str(encoder.base_hash)[:12]}), so no other model can "
                "read its maps; predict with it alone"
            )
        for group in self.groups:
            problem = _difference(group.encoder, encoder, weights=self.loaded)
            if problem:
                raise ConfigError(
                    f"{group.members[0]} and {name} have different encoders ({problem}); give models whose heads were "
                    "trained on one frozen encoder (train --freeze K), or predict with each alone"
                )
        for group in self.groups:
            if group.encoder.geometry == encoder.geometry:
                return group
        self.groups.append(Group(encoder))
        return self.groups[-1]

    def encode(self, group: Group, name: str, images: Tensor) -> _Encoded:
        """Return all layers of a group for images (B, 3, H, W)."""
        kind = images.device.type
        precision = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        known = next((x for x in self.inputs if x.precision == precision and _same_image(x.images, images)), None)
        if known is None:
            known = _Input(images, precision)
            self.inputs.append(known)
        known.readers.append(name)
        key = (self.inputs.index(known), self.groups.index(group))
        if group not in known.encoded:
            start = now(images.device)
            known.encoded[group] = group.encode(images)
            self._times[key] = now(images.device) - start
            self.seconds += self._times[key]
        self.alone += self._times[key]
        return known.encoded[group]


class Reader(nn.Module):
    """Stands where the encoder of a model was, and has its attributes.

    Attributes:
        reads_tokens: the model has asked for class tokens.
    """

    def __init__(self, shared: SharedEncoder, group: Group, name: str, encoder: PerceptionEncoder) -> None:
        super().__init__()
        self.out_indices, self.reads_tokens = encoder.out_indices, False
        self._read = shared, group, name  # a tuple, so that the weights are not those of every model

    def __getattr__(self, name: str) -> Any:
        if name == "_read" or name.startswith("__"):
            raise AttributeError(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._read[1].encoder, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Reader:
        """Return itself: a copy of a model reads from the same encoder."""
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """As `PerceptionEncoder.forward`."""
        return self._encoded(images)[0]

    def forward_with_class_tokens(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """As `PerceptionEncoder.forward_with_class_tokens`."""
        self.reads_tokens = True
        return self._encoded(images)

    def _encoded(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        shared, group, name = self._read
        maps, tokens = shared.encode(group, name, images)
        return tuple(maps[i] for i in self.out_indices), tuple(tokens[i] for i in self.out_indices if tokens)


def now(device: torch.device | str) -> float:
    """Return the time in seconds after all work on a device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def encoders(model: nn.Module) -> Iterator[tuple[nn.Module, str, PerceptionEncoder]]:
    """Yield the parent, the name in it, and each encoder of a model."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, PerceptionEncoder):
                yield parent, name, child


def _difference(first: PerceptionEncoder, second: PerceptionEncoder, *, weights: bool) -> str | None:
    """Say in which weights, or at least in which variant, two encoders differ; None for one encoder.

    With different geometries positions and the patch kernel may differ: they are resized when they are loaded.
    """
    if first.config != second.config:
        return f"{first.variant or first.config} and {second.variant or second.config}"
    if not weights:
        return None
    resized = set() if first.geometry == second.geometry else {"pos_embed", "patch_embed.proj.weight"}
    ours, others = dict(first.named_parameters()), dict(second.named_parameters())
    names = [name for name in ours if name in others and name not in resized]
    return next((f"{name} differs" for name in names if not torch.equal(ours[name], others[name])), None)


def _same_image(first: Tensor, second: Tensor) -> bool:
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return torch.equal(first, second) or torch.allclose(first, second, rtol=0, atol=ROUNDING)
