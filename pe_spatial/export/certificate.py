"""The certificate: how far an exported folder is from PyTorch, measured at every stage, written beside the files."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pe_spatial.atomic import atomic_write, write_json
from pe_spatial.errors import ConfigError
from pe_spatial.export.graph import Exportable, versions
from pe_spatial.runtime.compare import DETECTION, LIMITS, PROPOSALS, problems, sample
from pe_spatial.runtime.manifest import read_manifest, sha256
from pe_spatial.runtime.sessions import open_session
from pe_spatial.runtime.verify import CERTIFICATE, PAGE, REFERENCE, Case, compare, objects, pack

ROUNDS = 5
_COARSE = 8  # side in pixels of the patches in random images


def certify(
    exportable: Exportable, folder: str | Path, *, images: Sequence[np.ndarray] = (), predictor: Any = None,
    rounds: int = ROUNDS, extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Compare the folder with the module, write certificate.json, a page and reference.npz, and return the first.

    Args:
        exportable: what was exported.
        folder: where it was exported.
        images: given images (H, W, 3) uint8, besides the random ones.
        predictor: `pe_spatial.load`'s predictor of the same model, whose detections are then the reference.
        rounds: how often the time is measured.
        extra: further facts, such as AP.

    Raises ConfigError, after writing, for differences above the limits of the precision (`compare.LIMITS`).
    """
    certificate, cases = measure(exportable, Path(folder), images, predictor, rounds)
    certificate |= extra or {}
    write_certificate(Path(folder), certificate, flat(cases))
    return checked(Path(folder), certificate)


def measure(
    exportable: Exportable, folder: Path, images: Sequence[np.ndarray], predictor: Any, rounds: int
) -> tuple[dict[str, Any], list[Case]]:
    """Return the certificate, also of a folder that fails, and what was compared; see `certify`."""
    manifest = read_manifest(folder)
    cases = reference_cases(exportable, manifest.minimum, images, predictor)
    with _peak_memory() as memory:
        session = open_session(folder, manifest, stages=True)
        stages, matched = compare(session, cases)
    limits = LIMITS[manifest.precision]
    wrong = problems(stages, matched, limits)
    plain = open_session(folder, manifest)
    inputs = cases[0][0]
    tensors = [torch.from_numpy(value) for value in inputs.values()]
    with torch.no_grad(), _peak_memory() as torch_memory:
        exportable.module(*tensors)
    with torch.no_grad():
        seconds = interleaved([lambda: exportable.module(*tensors), lambda: plain.run(inputs)], rounds)
    certificate: dict[str, Any] = dict(
        passed=not wrong, problems=wrong, task=manifest.task, format=manifest.format, precision=manifest.precision,
        limits=limits, stages=stages, detections=matched, model=manifest.model, inputs=manifest.inputs,
        weights=weights_hash(exportable.module), manifest=sha256(folder / "manifest.json"), versions=versions(),
        cases=[[list(value.shape) for value in case.values()] for case, _ in cases],
        machine=dict(processor=platform.machine(), cores=os.cpu_count(), threads=torch.get_num_threads()),
        seconds=dict(torch=seconds[0], exported=seconds[1], input=[list(v.shape) for v in inputs.values()]),
        peak_memory=dict(torch=torch_memory[0], exported=memory[0]),
    )  # fmt: skip
    return certificate, cases


def write_certificate(folder: Path, certificate: Mapping[str, Any], reference: Mapping[str, np.ndarray]) -> None:
    """Write certificate.json, its page, and the arrays with which it is repeated."""
    write_json(folder / CERTIFICATE, certificate)
    with atomic_write(folder / PAGE) as unfinished:
        unfinished.write_text(page(certificate))
    with atomic_write(folder / REFERENCE) as unfinished:
        np.savez_compressed(unfinished, **reference)  # type: ignore[arg-type]


def checked(folder: Path, certificate: dict[str, Any]) -> dict[str, Any]:
    """Return the certificate; ConfigError if it did not pass."""
    if not certificate["passed"]:
        wrong = "; ".join(certificate["problems"])
        raise ConfigError(f"{folder} does not compute what PyTorch does: {wrong}. Do not use it")
    return certificate


def reference_cases(
    exportable: Exportable, minimum: int, images: Sequence[np.ndarray], predictor: Any = None
) -> list[Case]:
    """Return inputs and PyTorch's outputs for random inputs of three sizes and two batches, and for given images."""
    if exportable.cases:
        arrays = ({name: value.numpy() for name, value in case.items()} for case in exportable.cases)
        return [_case(exportable, inputs, predictor) for inputs in arrays]
    (name, example), *_ = exportable.inputs.items()
    first = 1 if example.dtype == torch.uint8 else 2
    height, width = example.shape[first : first + 2]
    step = exportable.multiple
    free = exportable.dynamic.get(name, {})
    sizes = [(max(h, minimum), max(w, minimum)) for h, w in ((height, width), (width, height), (height, height))]
    sizes = [(h // step * step, w // step * step) for h, w in (sizes if first in free else [(height, width)] * 3)]
    inputs = [_random(first, batch if 0 in free else example.shape[0], size, seed)
              for seed, (batch, size) in enumerate(zip((1, 3, 1), sizes, strict=True))]  # fmt: skip
    inputs += [image[None] for image in images if first == 1]
    return [_case(exportable, {name: value}, predictor) for value in inputs]


def _case(exportable: Exportable, inputs: dict[str, np.ndarray], predictor: Any) -> Case:
    with torch.no_grad():
        values = exportable.module(*(torch.from_numpy(value) for value in inputs.values()))
    names = [*exportable.outputs, *exportable.stages]
    arrays = {name: value.numpy() for name, value in zip(names, values, strict=True)}
    if "valid" not in arrays:
        return inputs, {name: sample(name, value) for name, value in arrays.items()}
    expected = {name: sample(name, value) for name, value in arrays.items() if name not in DETECTION}
    for image, pixels in enumerate(next(iter(inputs.values()))):
        if predictor is None:
            found = objects({name: arrays[name][image] for name in DETECTION if name in arrays})
        else:
            result = predictor(pixels)
            found = dict(boxes=result.boxes, scores=result.scores, labels=result.labels)
            found |= {} if result.masks is None else {"masks": result.masks}
        expected |= pack(image, found)
    return inputs, expected


def _random(first: int, batch: int, size: tuple[int, int], seed: int) -> np.ndarray:
    """Return random pixels (B, H, W, 3), coarse and fine, or normalized images (B, 3, H, W)."""
    rng = np.random.default_rng(seed)
    if first == 2:
        return rng.standard_normal((batch, 3, *size)).astype(np.float32)
    coarse = rng.integers(0, 200, (batch, -(-size[0] // _COARSE), -(-size[1] // _COARSE), 3))
    coarse = coarse.repeat(_COARSE, 1).repeat(_COARSE, 2)[:, : size[0], : size[1]]
    return (coarse + rng.integers(0, 56, (batch, *size, 3))).astype(np.uint8)


def flat(cases: Sequence[Case]) -> dict[str, np.ndarray]:
    """Return the arrays of reference.npz; `cases_of` undoes it."""
    return {f"{i}/{kind}/{name}": value for i, case in enumerate(cases)
            for kind, values in zip(("in", "out"), case, strict=True) for name, value in values.items()}  # fmt: skip


def weights_hash(module: torch.nn.Module) -> str:
    """Return the SHA-256 of all weights and buffers of a module, in the order of their names."""
    import hashlib

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes() if value.ndim else b"")
    return digest.hexdigest()


def interleaved(calls: Sequence[Callable[[], Any]], rounds: int) -> list[float]:
    """Return the median seconds of each call, which take turns after a first one."""
    times: list[list[float]] = [[] for _ in calls]
    for number in range(rounds + 1):
        for call, own in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            if number:
                own.append(time.perf_counter() - start)
    return [statistics.median(own) for own in times]


@contextmanager
def _peak_memory() -> Iterator[list[int | None]]:
    """Yield a list whose entry is, afterwards, by how many bytes the block raised the process's peak; Linux only."""
    result: list[int | None] = [None]
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except OSError:
        yield result
        return
    yield result
    result[0] = max(_status("VmHWM") - before, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    return 0


def page(certificate: Mapping[str, Any]) -> str:
    """Return the certificate as one page of Markdown."""
    verdict = "PASSED" if certificate["passed"] else "FAILED"
    seconds, memory = certificate["seconds"], certificate["peak_memory"]
    lines = [
        f"# Certificate: {verdict}", "",
        f"{certificate['task']}, format {certificate['format']}, {certificate['precision']}; weights "
        f"`{certificate['weights'][:16]}`; {_versions(certificate['versions'])}.", "",
        *(f"- {problem}" for problem in certificate["problems"]), *([""] if certificate["problems"] else []),
        "Largest difference from PyTorch; the limit is "
        f"{certificate['limits']['stage']:g}, relative to the largest value where that is above 1.", "",
        "| stage | largest difference | largest value |", "|---|---|---|",
        *(f"| {name} | {one['largest']:.2g} | {one['scale']:.3g} |" for name, one in certificate["stages"].items()
          if name != PROPOSALS),
        "", f"Inputs: {', '.join(str(tuple(shape)) for case in certificate['cases'] for shape in case)}.", "",
    ]  # fmt: skip
    if PROPOSALS in certificate["stages"]:
        lines += [f"Proposals without partner: {100 * certificate['stages'][PROPOSALS]['largest']:.2f} %.", ""]
    if certificate["detections"]:
        found = certificate["detections"]
        lines += [
            f"Detections: {found['theirs']:.0f} of PyTorch, {found['ours']:.0f} here, {found['unmatched']:.0f} without "
            f"partner; boxes within {found['box']:.2g} px, scores within {found['score']:.2g}, masks with IoU of at "
            f"least {found['iou']:.4f}.", "",
        ]  # fmt: skip
    if "stream" in certificate:
        stream = certificate["stream"]
        lines += [f"A video of {stream['frames']} frames: masks with IoU of at least {stream['iou']:.4f}.", ""]
    if "scores" in certificate:
        lines += ["| score | PyTorch | exported |", "|---|---|---|"]
        lines += [f"| {name} | {one['torch']:.4f} | {one['exported']:.4f} |"
                  for name, one in certificate["scores"].items()]  # fmt: skip
        lines += [""]
    if "ap" in certificate:
        lines += ["| AP | PyTorch | exported |", "|---|---|---|"]
        lines += [f"| {name} | {one['torch']:.4f} | {one['exported']:.4f} |" for name, one in certificate["ap"].items()]
        lines += [""]
    lines += [
        f"Time for {tuple(seconds['input'][0])}: PyTorch {1e3 * seconds['torch']:.1f} ms, exported "
        f"{1e3 * seconds['exported']:.1f} ms ({certificate['machine']['threads']} threads of "
        f"{certificate['machine']['cores']} cores)."
    ]
    if memory["torch"] is not None:
        lines += [f"Peak memory above the process's: PyTorch {memory['torch'] / 2**20:.0f} MB for one call, exported "
                  f"{memory['exported'] / 2**20:.0f} MB with loading and all stages."]  # fmt: skip
    return "\n".join([*lines, ""])


def _versions(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found.items())
