"""From an exported folder to what runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pe_spatial.errors import ConfigError
from pe_spatial.runtime.dense import ExportedDepth, ExportedSegmenter
from pe_spatial.runtime.detection import ExportedDetector
from pe_spatial.runtime.encoder import ExportedEncoder
from pe_spatial.runtime.manifest import read_manifest
from pe_spatial.runtime.together import ExportedTogether
from pe_spatial.runtime.tracker import ExportedTracker


def load_exported(folder: str | Path, **options: Any) -> Any:
    """Return the runtime of an exported model.

    Args:
        folder: what `pe-spatial export` wrote.
        options: `backend` ('onnxruntime', 'openvino') and `threads`; for detectors `score`, the lowest score.

    Raises ConfigError for a folder that is not complete, and for a runtime that is missing.
    """
    kinds: dict[str, Any] = {
        "encoder": ExportedEncoder, "detection": ExportedDetector, "depth": ExportedDepth,
        "segmentation": ExportedSegmenter, "tracking": ExportedTracker, "multitask": ExportedTogether,
    }  # fmt: skip
    task = read_manifest(folder).task
    if task not in kinds:
        raise ConfigError(f"{folder} is a model for {task}; loaded are those for {', '.join(kinds)}")
    return kinds[task](folder, **options)
