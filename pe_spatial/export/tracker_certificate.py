"""The certificate of a tracker: its parts one by one, and a short video through all of them."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pe_spatial.export.certificate import (
    ROUNDS,
    checked,
    flat,
    interleaved,
    measure,
    weights_hash,
    write_certificate,
)
from pe_spatial.export.graph import Exportable, versions
from pe_spatial.export.tracker import tracker_parts
from pe_spatial.runtime.compare import LIMITS
from pe_spatial.runtime.manifest import read_manifest, sha256
from pe_spatial.runtime.streams import moving_frames, smallest_iou, stream_problems, track_frames
from pe_spatial.runtime.tracker import ExportedTracker
from pe_spatial.tracking.sam2.streaming import StreamingTracker

if TYPE_CHECKING:
    from sam2.modeling.sam2_base import SAM2Base


def certify_tracker(
    model: SAM2Base, folder: str | Path, *, rounds: int = ROUNDS, extra: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Compare an exported tracker with the model, write the certificates, and return that of the complete tracker.

    Args:
        model: what was exported.
        folder: where it was exported; each part gets a certificate of its own too.
        rounds: how often the time of a part is measured.
        extra: further facts, such as J&F.

    Raises ConfigError, after writing, for differences above the limits.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    found = {name: _certified(part, folder / name, rounds) for name, part in tracker_parts(model).items()}
    frames = moving_frames(model.image_size)
    network = ExportedTracker(folder)
    theirs = track_frames(StreamingTracker(model), frames)
    iou = smallest_iou(track_frames(network.start(non_overlapping=False), frames), theirs)
    calls = [lambda: track_frames(StreamingTracker(model), frames), lambda: track_frames(network.start(), frames)]
    seconds = [value / len(frames) for value in interleaved(calls, 1)]
    limits = LIMITS[manifest.precision]
    wrong = [f"{name}: {problem}" for name, one in found.items() for problem in one["problems"]]
    wrong += stream_problems(iou, limits)
    stages = {f"{name}/{stage}": value for name, one in found.items() for stage, value in one["stages"].items()}
    certificate: dict[str, Any] = dict(
        passed=not wrong, problems=wrong, task=manifest.task, format=manifest.format, precision=manifest.precision,
        limits=limits, stages=stages, detections=None, stream=dict(frames=len(frames), iou=iou), model=manifest.model,
        weights=weights_hash(model), manifest=sha256(folder / "manifest.json"), versions=versions(),
        cases=[case for one in found.values() for case in one["cases"]],
        machine=dict(processor=platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads()),
        seconds=dict(torch=seconds[0], exported=seconds[1], input=[list(frames.shape[1:])]),
        peak_memory=dict(torch=None, exported=None), **(extra or {}),
    )  # fmt: skip
    reference = dict(frames=frames, masks=np.packbits(theirs), shape=np.array(theirs.shape))
    write_certificate(folder, certificate, reference)
    return checked(folder, certificate)


def _certified(part: Exportable, folder: Path, rounds: int) -> dict[str, Any]:
    """Write and return the certificate of a part, also of one that fails."""
    certificate, cases = measure(part, folder, (), None, rounds)
    write_certificate(folder, certificate, flat(cases))
    return certificate
