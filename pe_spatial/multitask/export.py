"""Export several models on one encoder: a folder with a graph for the encoder, and one for each head."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pe_spatial.atomic import atomic_folder
from pe_spatial.errors import ConfigError
from pe_spatial.export.certificate import (
    ROUNDS,
    checked,
    flat,
    interleaved,
    measure,
    weights_hash,
    write_certificate,
)
from pe_spatial.export.dense import depth_graph, segmenter_graph
from pe_spatial.export.detector import detector_graph
from pe_spatial.export.encoder import encoder_graph
from pe_spatial.export.graph import Exportable, export, versions
from pe_spatial.export.tracker import stream_options, tracker_parts
from pe_spatial.multitask.models import MultiTask
from pe_spatial.multitask.sharing import ROUNDING, Reader
from pe_spatial.runtime.compare import LIMITS
from pe_spatial.runtime.manifest import Manifest, read_manifest, sha256, write_manifest
from pe_spatial.runtime.together import MIRRORED, ExportedTogether, compare_results, reference_frames, results_of
from pe_spatial.runtime.verify import together_problems

FORMATS = ("onnx", "openvino")
_LAYER, _TOKEN = "layer_", "token_"


class _MapsAndTokens(nn.Module):
    """An encoder that returns the class tokens (B, C) of its layers after their maps."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps, tokens = self.encoder.forward_with_class_tokens(images)
        return *maps, *tokens


class _Given(nn.Module):
    """Stands where the encoder of a model was, and returns what it was given; what it is asked besides, it has."""

    def __init__(self, reader: Reader) -> None:
        super().__init__()
        self.views: list[tuple[Tensor, ...]] = []  # maps of each call, then class tokens if they are read
        self._reader = (reader,)  # a tuple, so that it is no part of the graph

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattribute__("_reader")[0], name)

    def forward(self, _: Tensor) -> tuple[Tensor, ...]:
        return self.views.pop(0)

    def forward_with_class_tokens(self, _: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        values, count = self.views.pop(0), len(self.out_indices)
        return values[:count], values[count:]


class HeadGraph(nn.Module):
    """The graph of a model without its encoder: maps in, results of an image of `side` x `side` pixels out.

    Args:
        module: the graph with pixels as input; it is copied.
        side: of the image, in pixels. Their values reach nothing but the encoder.
        views: how often the model encodes an image: 2 with its mirror image.
        kept: the places of its outputs that are returned.
    """

    def __init__(self, module: nn.Module, side: int, *, views: int, kept: Sequence[int]) -> None:
        super().__init__()
        self.module, self.side, self.views, self.kept = copy.deepcopy(module), side, views, tuple(kept)
        places = [(parent, name, child) for parent in self.module.modules()
                  for name, child in parent.named_children() if isinstance(child, Reader)]  # fmt: skip
        ((parent, name, reader),) = places
        self.given = _Given(reader)
        setattr(parent, name, self.given)

    def forward(self, *maps: Tensor) -> tuple[Tensor, ...]:
        """Return what the graph returns for an image, given its maps (1, C, h, w) and tokens (1, C), view by view."""
        count = len(maps) // self.views
        self.given.views.extend(maps[i * count : (i + 1) * count] for i in range(self.views))
        found = self.module(torch.zeros(1, self.side, self.side, 3, dtype=torch.uint8))
        return tuple(found[i] for i in self.kept)


@dataclass(kw_only=True)
class Parts:
    """What a folder holds: `graphs` by place in it, and what the runtime must know of the whole and of a tracker."""

    graphs: dict[str, Exportable]
    options: dict[str, Any]
    tracking: dict[str, Any] | None = None


def together_parts(model: MultiTask) -> Parts:
    """Split models on one encoder, with the `size` of their frames, into graphs.

    Raises ConfigError for models that do not encode the same image, and for what their own exports refuse.
    """
    side = model.size
    if side is None:
        raise ConfigError("the graphs of several models are for frames of one size; give it: --size PIXELS")
    frames = reference_frames(side)
    results_of(model, frames[:1])
    pixels = torch.from_numpy(model._squeeze(frames[0], side))[None]
    encoder = _encoder_part(model, pixels)
    views = _views(model, encoder, pixels)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for prefix, image in (("", pixels), (MIRRORED, pixels.flip(2))):
            maps = encoder.module(image)
            found |= {prefix + name: one for name, one in zip(encoder.outputs, maps, strict=True)}
    graphs, tracking = {"encoder": encoder}, None
    kinds = dict(detection=detector_graph, depth=depth_graph, segmentation=segmenter_graph)
    for (name, predictor), source in zip(model.predictors.items(), model.sources, strict=True):
        head = partial(_head, side=side, prefixes=("", MIRRORED)[: views[source]], maps=found)
        if predictor.task == "tracking":
            tracker = predictor.model
            for part, graph in tracker_parts(tracker).items():
                graphs[f"{name}/{part}"] = head(graph) if part == "image_encoder" else graph
            tracking = stream_options(tracker)
        else:
            graphs[name] = head(kinds[predictor.task](predictor, source=source))
    tasks = {name: predictor.task for name, predictor in model.predictors.items()}
    options = dict(
        size=side, tasks=tasks, parts=list(graphs), layers=sorted(model.shared.groups[0].layers),
        mirrored=max(views.values()) > 1, reads=sum(views.values()),
    )  # fmt: skip
    return Parts(graphs=graphs, options=options, tracking=tracking)


def _encoder_part(model: MultiTask, pixels: Tensor) -> Exportable:
    groups = model.shared.groups
    if len(groups) > 1:
        names = " and ".join(Path(group.members[0]).name for group in groups[:2])
        raise ConfigError(f"{names} encode an image in different geometries, so no graph is shared; export each alone")
    encoder = groups[0].encoder
    encoder.out_indices = tuple(sorted(groups[0].layers))
    part = encoder_graph(encoder, source=model.sources[0])
    sides = [list(pixels.shape[1:3])]
    readers = (x for one in model.predictors.values() for x in one.model.modules() if isinstance(x, Reader))
    if any(reader.reads_tokens for reader in readers):
        part.module.encoder = _MapsAndTokens(encoder)
        part.outputs = [*part.outputs, *(f"{_TOKEN}{i}" for i in encoder.out_indices)]
    return replace(part, inputs={"pixels": pixels}, dynamic={}, sizes=sides, torch_minimum=1)


def _views(model: MultiTask, encoder: Exportable, pixels: Tensor) -> dict[str, int]:
    """Return how many images of a frame each model encodes: it, or it and its mirror image.

    ConfigError if any encodes another one than the graph of the encoder does.
    """
    graph: Any = encoder.module
    image = ((pixels.float() - graph.mean) / graph.std).permute(0, 3, 1, 2)
    counts = dict.fromkeys(model.sources, 0)
    for one in model.shared.inputs:
        known = [x for x in (image, image.flip(-1)) if x.shape == one.images.shape]
        same = any(torch.allclose(x, one.images, rtol=0, atol=ROUNDING) for x in known)
        if not same:
            height, width = one.images.shape[-2:]
            raise ConfigError(
                f"a frame of {pixels.shape[2]}x{pixels.shape[1]} pixels reaches the encoder of "
                f"{Path(one.readers[0]).name} as another image, of {width}x{height} pixels: it is resized, padded, cut "
                "into windows or normalized differently; give the --size that all models were trained with"
            )
        for source in one.readers:
            counts[source] += 1
    return counts


def _head(graph: Exportable, *, side: int, prefixes: Sequence[str], maps: Mapping[str, Tensor]) -> Exportable:
    """Replace the encoder of a graph by its maps."""
    names = [*graph.outputs, *graph.stages]
    kept = [i for i, name in enumerate(names) if not name.startswith(_LAYER)]
    module = HeadGraph(graph.module, side, views=len(prefixes), kept=kept)
    kinds = (_LAYER, _TOKEN) if module.given.reads_tokens else (_LAYER,)
    layers = [f"{kind}{i}" for kind in kinds for i in module.given.out_indices]
    inputs = {prefix + layer: maps[prefix + layer] for prefix in prefixes for layer in layers}
    stages = [name for name in graph.stages if not name.startswith(_LAYER)]
    with torch.no_grad():
        module(*inputs.values())  # what cannot be split says so here, and not inside the tracer
    return replace(graph, module=module, inputs=inputs, dynamic={}, stages=stages, cases=[inputs])


def export_together(
    model: MultiTask, out: str | Path, *, form: str = "onnx", precision: str = "fp32"
) -> tuple[Parts, Manifest]:
    """Write the folder `out`: manifest.json, and a folder for the encoder and for each head.

    Raises ConfigError as `export` does, for other formats than `FORMATS`, and for models that do not share an encode.
    """
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder")
    if form not in FORMATS:
        raise ConfigError(f"the format is {form}; several models are exported to {' or '.join(FORMATS)}")
    if precision == "int8-static":
        raise ConfigError("int8-static needs images to calibrate with, which several models do not take; use int8")
    parts = together_parts(model)
    common: dict[str, Any] = dict(format=form, precision=precision, inputs={}, outputs=[], versions=versions())
    sources = [Path(source).name for source in model.sources]
    about = dict(variant=model.shared.groups[0].encoder.variant, sources=sources)
    manifest = Manifest(task="multitask", options=parts.options, model=about, **common)
    with atomic_folder(out) as folder:
        for name, graph in parts.graphs.items():
            export(graph, folder / name, form=form, precision=precision)
        for name, kind in parts.options["tasks"].items():
            if kind == "tracking":
                write_manifest(folder / name, Manifest(task=kind, options=parts.tracking or {}, model=about, **common))
        write_manifest(folder, manifest)
    return parts, manifest


def certify_together(model: MultiTask, parts: Parts, folder: str | Path, *, rounds: int = ROUNDS) -> dict[str, Any]:
    """Compare each graph with its module, and the results of frames with the model's; write and return the certificate.

    Raises ConfigError, after writing, for differences above the limits.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    found = {}
    for name, part in parts.graphs.items():
        found[name], cases = measure(part, folder / name, (), None, rounds)
        write_certificate(folder / name, found[name], flat(cases))
    frames = reference_frames(parts.options["size"])
    exported, theirs = ExportedTogether(folder), results_of(model, frames)
    stages, matched, agreement = compare_results(results_of(exported, frames), theirs)
    limits = LIMITS[manifest.precision]
    wrong = [f"{name}: {problem}" for name, one in found.items() for problem in one["problems"]]
    wrong += together_problems(stages, matched, agreement, limits)
    calls = [partial(results_of, model, frames), partial(results_of, exported, frames)]
    seconds = [value / len(frames) for value in interleaved(calls, 1)]
    first = next(iter(found.values()))
    certificate: dict[str, Any] = first | dict(
        passed=not wrong, problems=wrong, task=manifest.task, detections=matched, agreement=agreement,
        stages={f"{name}/{key}": one for name, part in found.items() for key, one in part["stages"].items()} | stages,
        model=manifest.model, inputs={}, manifest=sha256(folder / "manifest.json"), frames=len(frames),
        weights=weights_hash(nn.ModuleList(part.module for part in parts.graphs.values())),
        cases=[case for part in found.values() for case in part["cases"]],
        seconds=dict(torch=seconds[0], exported=seconds[1], input=[list(frames.shape[1:])]),
        peak_memory=dict(torch=None, exported=None),
    )  # fmt: skip
    write_certificate(folder, certificate, {"frames": frames, **theirs})
    return checked(folder, certificate)
