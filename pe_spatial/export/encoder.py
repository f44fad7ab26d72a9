"""An encoder as a module that can be exported: pixels or normalized images in, maps of the chosen layers out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pe_spatial.encoder.geometry import preset_name
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.export.graph import Exportable
from pe_spatial.export.pixels import pad_to

INPUTS = ("pixels", "images")


class EncoderGraph(nn.Module):
    """Normalization, the encoder, and nothing else.

    `step` is the multiple, in pixels, that heights and widths have. Padding to it adds nothing to such images, and
    tells the tracer that the sizes divide.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: PerceptionEncoder, *, inputs: str, step: int) -> None:
        super().__init__()
        self.encoder, self.inputs, self.step = encoder, inputs, step
        for name in ("mean", "std"):
            values = torch.tensor(getattr(encoder.config, name), dtype=torch.float32)
            self.register_buffer(name, values, persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Pixels (B, H, W, 3) uint8, or normalized (B, 3, H, W) -> maps (B, C, H / p, W / p)."""
        if self.inputs == "pixels":
            images = ((images.float() - self.mean) / self.std).permute(0, 3, 1, 2)
        return self.encoder(pad_to(images, self.step))


def encoder_graph(
    encoder: PerceptionEncoder, *, inputs: str = "pixels", whole_windows: bool = False, source: str = ""
) -> Exportable:
    """Return an encoder in the form that `export` writes.

    Args:
        encoder: the encoder, with its layers and geometry.
        inputs: 'pixels', uint8 RGB, normalized in the graph; or 'images', normalized already.
        whole_windows: take only images of complete attention windows, which needs no masks in the graph.
        source: where the weights came from.
    """
    geometry = encoder.geometry
    step = geometry.patch_size * (geometry.window_size or 1 if whole_windows else 1)
    side = 2 * geometry.patch_size * (geometry.window_size or 1)
    height, width = side, 3 * side // 2 // step * step
    shape: Sequence[int] = (2, height, width, 3) if inputs == "pixels" else (2, 3, height, width)
    example = torch.randint(0, 256, shape, dtype=torch.uint8) if inputs == "pixels" else torch.randn(*shape)
    first = 1 if inputs == "pixels" else 2
    return Exportable(
        module=EncoderGraph(encoder.eval(), inputs=inputs, step=step),
        task="encoder",
        inputs={inputs: example},
        dynamic={inputs: {0: "batch", first: "height", first + 1: "width"}},
        outputs=[f"layer_{i}" for i in encoder.out_indices],
        multiple=step,
        torch_minimum=2 * geometry.patch_size * (geometry.window_size or 1),
        model=encoder_facts(encoder) | {"source": source},
    )


def encoder_facts(encoder: PerceptionEncoder) -> dict[str, Any]:
    """Return what a reader of a manifest wants to know of an encoder."""
    return dict(
        variant=encoder.variant,
        config=asdict(encoder.config),
        preset=preset_name(encoder.geometry, encoder.config),
        geometry=asdict(encoder.geometry),
        layers=list(encoder.out_indices),
    )
