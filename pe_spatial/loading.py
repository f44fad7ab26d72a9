"""`pe_spatial.load`: from a checkpoint to a predictor. Importing this module needs torch alone."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

    from pe_spatial.language.model import PECore
    from pe_spatial.predict.predictor import Predictor


def load(
    source: str | Path, *, config: str | Path | Config | None = None, device: str = "cpu",
    dtype: torch.dtype | None = None, compile: bool = False, score: float = 0.0, tta: bool = False,
    class_names: Sequence[str] | None = None, words: str | Path | PECore | None = None,
) -> Predictor:  # fmt: skip
    """Return the predictor of a checkpoint: of a detector, a segmenter, a depth estimator or a tracker.

    Args:
        source: a checkpoint that `pe-spatial train` wrote, whose config is inside; any other weights, with their
            `config`; a config file (.py) with `load_from`; or a folder that `pe-spatial export` wrote, which needs
            neither torch nor OpenMMLab and takes no option but `score`. 'sam2:large' is the released SAM 2.1, whose
            masks of a grid of points are objects without classes.
        config: a config file, one of an installed package ('mmdet::detr/detr_r50_8xb2-150e_coco.py'), or a Config; for
            a file of SAM 2.1 its name, 'sam2:large'.
        device: 'cpu', 'cuda' or 'cuda:1'.
        dtype: torch.bfloat16 or torch.float16 for autocast; None computes as a test of the config does.
        compile: compile the backbone when it first runs; worthwhile for many images of one size.
        score: lowest score of a detection.
        tta: test-time augmentation, as the config describes it.
        class_names: names of the classes; None takes those of the checkpoint, or of the config's dataset.
        words: a PE-Core, its name or its file, so that a detector takes `classes=[...]`, which are words.

    Raises ConfigError, CheckpointError; ImportError without OpenMMLab's packages.
    """
    from pe_spatial.errors import ConfigError
    from pe_spatial.runtime.manifest import is_exported

    if is_exported(source):
        from pe_spatial.runtime.loading import load_exported

        others = dict(config=config, dtype=dtype, compile=compile, tta=tta, class_names=class_names, words=words)
        given = [name for name, value in others.items() if value]
        if given or device != "cpu":
            name = (given or ["device"])[0]
            raise ConfigError(f"{source} is an exported model, on a CPU, which has no {name}; omit it")
        return load_exported(source, **(dict(score=score) if score else {}))
    missing = [name for name in ("mmengine", "mmcv", "mmdet", "mmseg") if find_spec(name) is None]
    if missing:
        raise ImportError(f"a predictor needs {missing[0]}: pip install 'pe_spatial[openmmlab]'", name=missing[0])
    sam2 = next((name for name in (source, config) if isinstance(name, str) and name.startswith("sam2:")), None)
    if sam2:
        given = [name for name, value in dict(compile=compile, tta=tta, class_names=class_names).items() if value]
        if given:
            raise ConfigError(f"{sam2} finds objects without classes and has no {given[0]}; omit it")
        from pe_spatial.predict.sam2_masks import load_proposer

        weights = "released" if source == sam2 else str(source)
        return load_proposer(sam2, weights, device=device, dtype=dtype, score=score, words=words)
    from pe_spatial.predict.models import config_and_weights, task_of

    cfg, weights = config_and_weights(source, config)
    task = task_of(cfg)
    options: dict[str, Any] = dict(device=device, dtype=dtype, compile=compile)
    unused = dict(score=score, tta=tta, class_names=class_names, words=words)
    if task == "depth":
        from pe_spatial.predict.depth import DepthMapPredictor as Kind
    elif task == "tracking":
        from pe_spatial.predict.tracking import TrackingPredictor as Kind  # type: ignore[assignment]
    else:
        from pe_spatial.predict.predictor import build_predictor as Kind  # type: ignore[assignment]

        options, unused = options | unused, {}
    given = [name for name, value in unused.items() if value]
    if given:
        raise ConfigError(f"{source} is a model for {task}, which has no {' and no '.join(given)}; omit that option")
    return Kind(cfg, weights, **options)
