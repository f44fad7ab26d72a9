"""Several exported models on one encoder: its graph runs once a frame, and the graphs of heads take its maps."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.predict.results import DepthMap, Detections, SegmentationMap, TrackedFrame
from pe_spatial.predict.together import Together
from pe_spatial.runtime.compare import difference, match, sample, worst
from pe_spatial.runtime.dense import ExportedDepth, ExportedSegmenter
from pe_spatial.runtime.detection import ExportedDetector
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.resize import resize_area, resize_pixels
from pe_spatial.runtime.sessions import Session, open_session
from pe_spatial.runtime.streams import moving_frames, smallest_iou
from pe_spatial.runtime.tracker import ExportedTracker
from pe_spatial.runtime.verify import pack, unpack
from pe_spatial.tracking.sam2.prompts import Prompt

MIRRORED = "mirrored_"
"""Begins the names of maps of the mirrored image, which a depth model may average with."""
FRAMES = 4


class Head:
    """The session of a head: it takes the maps of the frame, and no pixels.

    Args:
        session: runs the graph.
        names: what the graph takes.
        maps: name -> map (1, C, h, w) of the frame.
    """

    def __init__(self, session: Session, names: Sequence[str], maps: Mapping[str, np.ndarray]) -> None:
        self.session, self.names, self.maps = session, tuple(names), maps

    def run(self, _: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs by name."""
        return self.session.run({name: self.maps[name] for name in self.names})


class ExportedTogether(Together):
    """What `pe_spatial.MultiTask` is, in another runtime.

    Args:
        folder: what `pe-spatial export A.pth B.pth --size PIXELS` wrote.
        score: lowest score of a detection.
        options: `backend` and `threads`, see `open_session`.
    """

    task = "multitask"

    def __init__(self, folder: str | Path, *, score: float = 0.0, **options: Any) -> None:
        folder = Path(folder)
        self.manifest = read_manifest(folder)
        super().__init__(self.manifest.options["size"])
        self._maps: dict[str, np.ndarray] = {}
        self._seconds, self._encodes = 0.0, 0
        self.encoder = open_session(folder / "encoder", read_manifest(folder / "encoder"), **options)
        kinds: dict[str, Any] = {"depth": ExportedDepth, "segmentation": ExportedSegmenter}
        for name, kind in self.manifest.options["tasks"].items():
            part = folder / name / ("image_encoder" if kind == "tracking" else "")
            manifest = read_manifest(part)
            head = Head(open_session(part, manifest, **options), list(manifest.inputs), self._maps)
            if kind == "tracking":
                self.predictors[name] = ExportedTracker(folder / name, image_encoder=head, **options)
            elif kind == "detection":
                self.predictors[name] = ExportedDetector(folder / name, session=head, score=score)
            else:
                self.predictors[name] = kinds[kind](folder / name, session=head)
        self.sources = tuple(str(folder / name / "manifest.json") for name in self.predictors)

    def _squeeze(self, rgb: np.ndarray, side: int) -> np.ndarray:
        return (resize_area if side < min(rgb.shape[:2]) else resize_pixels)(rgb, (side, side))

    def _begin(self, seen: np.ndarray) -> None:
        begin = time.perf_counter()
        self._maps.update(self.encoder.run({"pixels": seen[None]}))
        if self.manifest.options["mirrored"]:
            found = self.encoder.run({"pixels": np.ascontiguousarray(seen[None, :, ::-1])})
            self._maps.update({MIRRORED + name: values for name, values in found.items()})
        self._encodes = 1 + self.manifest.options["mirrored"]
        self._seconds = time.perf_counter() - begin

    def _costs(self) -> dict[str, float]:
        alone = self._seconds * self.manifest.options["reads"] / self._encodes
        return {"encoder": self._seconds, "alone": alone, "encodes": self._encodes}

    def groups(self) -> list[str]:
        """Say which models share the encode, and the layers that they read."""
        return [f"{', '.join(self.tasks)}: layers {self.manifest.options['layers']} of one encode"]


def reference_frames(size: int) -> np.ndarray:
    """Return the frames with which a certificate compares results, (FRAMES, 3/4 size, size, 3) uint8."""
    return moving_frames(size)[:FRAMES]


def results_of(model: Together, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Return the results of frames as arrays, `task/kind/frame/...`; a tracker follows a box that is given."""
    height, width = frames.shape[1:3]
    box = (width * 0.25, height * 0.25, width * 0.6, height * 0.7)
    prompts = {0: {1: Prompt(box=box)}} if "tracking" in model.tasks else None
    arrays: dict[str, np.ndarray] = {}
    for number, results in enumerate(model.stream(frames, prompts)):
        for task, one in results.items():
            if isinstance(one, Detections):
                found = dict(boxes=one.boxes, scores=one.scores, labels=one.labels)
                found |= {} if one.masks is None else {"masks": one.masks}
                arrays |= {f"{task}/{name}": value for name, value in pack(number, found).items()}
            elif isinstance(one, DepthMap):
                arrays[f"{task}/depth/{number}"] = sample(task, one.depth)
            elif isinstance(one, SegmentationMap):
                arrays[f"{task}/classes/{number}"] = sample(task, one.labels)
            elif isinstance(one, TrackedFrame):
                mask = one.objects[1].full((height, width)) if one.objects else np.zeros((height, width), bool)
                arrays[f"{task}/mask/{number}"] = np.packbits(mask)
    return arrays


def compare_results(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> tuple[dict[str, dict[str, float]], dict[str, float] | None, float]:
    """Compare `results_of` two runtimes: differences of depth, matched detections, and the smallest agreement.

    The agreement is the IoU of a tracked mask, and the share of pixels that get the same class.
    """
    stages: dict[str, dict[str, float]] = {}
    matched, agreement = [], 1.0
    for key, value in theirs.items():
        task, kind, number, *rest = key.split("/")
        if kind == "depth":
            one = difference(ours[key], value)
            before = stages.get(f"{task}/depth", one)
            stages[f"{task}/depth"] = {name: max(before[name], one[name]) for name in one}
        elif kind == "classes":
            agreement = min(agreement, float((ours[key] == value).mean()))
        elif kind == "mask":
            masks = [np.unpackbits(x).astype(bool)[None, None, None] for x in (ours[key], value)]
            agreement = min(agreement, smallest_iou(*masks))
        elif rest == ["boxes"]:
            sides = ({k.removeprefix(f"{task}/"): x for k, x in side.items()} for side in (ours, theirs))
            matched.append(match(*(unpack(side, int(number)) for side in sides)))
    return stages, worst(matched) if matched else None, agreement
