"""What the planner must know about models and pipelines. The task packages register it when they are imported."""

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

Example = Callable[[Any, Tensor, int, ExitStack], Tensor]

_examples: dict[type, tuple[Example, str]] = {}
_UNLIMITED = 100_000  # pixels; a larger scale leaves a side free
_steps: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}


def register_example(model_class: type, *, counted: str) -> Callable[[Example], Example]:
    """Register how models of a class and its subclasses compute their loss without values.

    The decorated function gets the model, images (B, 3, H, W) or clips (B, T, 3, H, W) on the meta device, a number of
    objects and an ExitStack, and returns the loss. Functions that need values are replaced in the ExitStack: it is
    closed after the backward pass, in which checkpointed blocks run again. `torch.autocast('meta')` acts as on CUDA.
    `counted` tells the report what the loss covers; its `{objects}` becomes the number of objects.
    """

    def register(example: Example) -> Example:
        _examples[model_class] = example, counted
        return example

    return register


def find_example(model: nn.Module) -> tuple[Example, str] | None:
    """Return the example of the nearest class of `model`, and what it counts."""
    return next((_examples[kind] for kind in type(model).__mro__ if kind in _examples), None)


def total_loss(model: Any, **batch: Any) -> Tensor:
    """Return the sum of the losses that an mmengine model computes under autocast."""
    with torch.autocast("meta"):
        return model.parse_losses(model(**batch, mode="loss"))[0]


def sum_outputs(outputs: Any) -> Tensor:
    """Return the sum of all values in nested outputs: a scalar that a backward pass can start from."""
    return torch.stack([x.float().sum() for x in tree_leaves(outputs) if isinstance(x, Tensor)]).sum()


def register_step(name: str, shape: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
    """Register a type of steps of training pipelines that decide the shape of a batch.

    `shape` returns, for the config of a step, any of size (h, w in pixels), frames and objects (in a clip).
    """
    _steps[name] = shape


def read_shape(pipeline: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the shape of a batch from the steps of a pipeline; of several the last one counts, of choices the largest.

    Where a step draws a size, the largest counts, in landscape.
    """
    shape: dict[str, Any] = {}
    for step in pipeline:
        if step["type"] == "RandomChoice":
            choices = [read_shape(steps if isinstance(steps, list) else [steps]) for steps in step["transforms"]]
            choices.sort(key=lambda choice: math.prod(choice.get("size", ())))
            shape.update(choices[-1] if choices else {})
        elif step["type"] in _steps:
            shape.update(_steps[step["type"]](step))
    return shape


def _resized(step: Mapping[str, Any]) -> dict[str, Any]:
    scales = step.get("scales") or step.get("scale") or ()
    scales = [scales] if scales and isinstance(scales[0], int) else scales
    factor = max(step.get("ratio_range") or (1,))
    if not scales:
        return {}
    w, h = max(scales, key=math.prod)
    keep_ratio = step.get("keep_ratio", (step.get("resize_cfg") or {}).get("keep_ratio", False))
    if keep_ratio:  # scale is (long, short) in any order
        h, w = sorted((h, w))
    return {} if max(h, w) > _UNLIMITED else dict(size=(round(h * factor), round(w * factor)))


def _cropped(step: Mapping[str, Any]) -> dict[str, Any]:
    size = step.get("crop_size", step.get("size"))
    size = (size, size) if isinstance(size, int) else size
    return dict(size=tuple(size)) if size and step.get("crop_type", "absolute") == "absolute" else {}


def _padded(step: Mapping[str, Any]) -> dict[str, Any]:
    return dict(size=tuple(step["size"][::-1])) if step.get("size") else {}


for name in ("Resize", "RandomResize", "RandomChoiceResize"):
    register_step(name, _resized)
register_step("RandomCrop", _cropped)
register_step("Pad", _padded)
