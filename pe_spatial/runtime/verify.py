"""Repeat a certificate with the runtime alone: the reference outputs of PyTorch are in the folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.errors import ConfigError
from pe_spatial.runtime.compare import DETECTION, PROPOSALS, difference, match, problems, sample, unpaired, worst
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.sessions import Session, open_session
from pe_spatial.runtime.streams import stream_problems, verify_tracker

CERTIFICATE, PAGE, REFERENCE = "certificate.json", "certificate.md", "reference.npz"


def verify(folder: str | Path, *, backend: str | None = None) -> dict[str, Any]:
    """Compare the folder's outputs with the reference again; return the stages' differences and the detections'.

    Raises ConfigError for a folder without a certificate, and for differences above the certificate's limits.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    try:
        certificate = json.loads((folder / CERTIFICATE).read_text())
        with np.load(folder / REFERENCE) as file:
            reference = dict(file)
    except (OSError, ValueError, KeyError):
        raise ConfigError(f"{folder} has no readable {CERTIFICATE} and {REFERENCE}; export the model again") from None
    result: dict[str, Any] = dict(limits=certificate["limits"], detections=None)
    if manifest.task == "tracking":
        parts = {name: verify(folder / name, backend=backend)["stages"] for name in manifest.options["parts"]}
        iou = verify_tracker(folder, reference, backend=backend)
        result["stages"] = {f"{name}/{stage}": one for name, found in parts.items() for stage, one in found.items()}
        result["stream"] = dict(frames=len(reference["frames"]), iou=iou)
        wrong = stream_problems(iou, certificate["limits"])
    elif manifest.task == "multitask":
        from pe_spatial.runtime.together import ExportedTogether, compare_results, results_of

        parts = {name: verify(folder / name, backend=backend)["stages"] for name in manifest.options["parts"]}
        found = results_of(ExportedTogether(folder, backend=backend), reference.pop("frames"))
        stages, result["detections"], agreement = compare_results(found, reference)
        result["stages"] = {f"{name}/{key}": one for name, part in parts.items() for key, one in part.items()} | stages
        result["agreement"] = agreement
        wrong = together_problems(stages, result["detections"], agreement, certificate["limits"])
    else:
        session = open_session(folder, manifest, backend=backend, stages=True)
        result["stages"], result["detections"] = compare(session, cases_of(reference))
        wrong = problems(result["stages"], result["detections"], certificate["limits"])
    if wrong:
        raise ConfigError(f"{folder} does not compute what PyTorch did: {'; '.join(wrong)}. Do not use it")
    return result


def together_problems(
    stages: Mapping[str, Mapping[str, float]], matched: Mapping[str, float] | None, agreement: float,
    limits: Mapping[str, float],
) -> list[str]:  # fmt: skip
    """Return a sentence for each difference of results above its limit, see `together.compare_results`."""
    wrong = problems(stages, matched, limits)
    if agreement < limits.get("iou", 0):
        wrong.append(f"masks and classes agree in {agreement:.3f} (limit {limits['iou']:g})")
    return wrong


Case = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]


def cases_of(reference: Mapping[str, np.ndarray]) -> list[Case]:
    """Split the arrays of reference.npz, `case/in/name` and `case/out/name`, into inputs and outputs of each case."""
    cases: dict[str, Case] = {}
    for key, value in reference.items():
        number, kind, name = key.split("/", 2)
        cases.setdefault(number, ({}, {}))[kind == "out"][name] = value
    return list(cases.values())


def compare(session: Session, cases: list[Case]) -> tuple[dict[str, dict[str, float]], dict[str, float] | None]:
    """Run all cases; return the largest difference of each stage, and of the matched detections.

    The outputs of a case are samples, but for the results of a detector, which are complete (`pack`).
    """
    stages: dict[str, dict[str, float]] = {}
    matched = []
    for inputs, expected in cases:
        values = session.run(inputs)
        for name, theirs in expected.items():
            if name.startswith("detections/"):
                continue
            if name == PROPOSALS:
                one = dict(largest=unpaired(values[name], theirs), scale=1.0)
            else:
                one = difference(sample(name, values[name]), theirs)
            before = stages.get(name, one)
            stages[name] = {key: max(before[key], one[key]) for key in one}
        for image in range(len(next(iter(inputs.values()))) if "valid" in values else 0):
            ours = objects({key: values[key][image] for key in DETECTION if key in values})
            matched.append(match(ours, unpack(expected, image)))
    return stages, worst(matched) if matched else None


def objects(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the valid detections of one image."""
    keep = values["valid"].astype(bool)
    return {name: value[keep] for name, value in values.items() if name != "valid"}


def pack(image: int, found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return detections in the form of reference.npz; masks as bits."""
    packed = {f"detections/{image}/{name}": value for name, value in found.items() if name != "masks"}
    if "masks" in found:
        packed[f"detections/{image}/masks"] = np.packbits(found["masks"])
        packed[f"detections/{image}/shape"] = np.array(found["masks"].shape)
    return packed


def unpack(expected: Mapping[str, np.ndarray], image: int) -> dict[str, np.ndarray]:
    """Undo `pack`."""
    start = f"detections/{image}/"
    found = {key.removeprefix(start): value for key, value in expected.items() if key.startswith(start)}
    if "masks" in found:
        shape = found.pop("shape")
        found["masks"] = np.unpackbits(found["masks"], count=int(shape.prod())).reshape(shape).astype(bool)
    return found
