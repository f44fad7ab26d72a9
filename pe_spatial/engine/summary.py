"""Summarize a run in a few lines: model, encoder, data, schedule, device, files."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_world_size
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner


def encoders(node: Any, place: str = "model") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (place, options) of every Perception Encoder in a config."""
    if isinstance(node, Mapping):
        if "variant" in node:  # of a backbone, or of a tracker
            yield place, node
        for key, value in node.items():
            yield from encoders(value, f"{place}.{key}")


def summarize(runner: Runner, *, training: bool) -> str:
    """Return the lines that a user sees first."""
    cfg = runner.cfg
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    number = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    parameters = f"{number / 1e6:.2f} M parameters"
    if training:
        parameters += f" ({trained / 1e6:.2f} M trained, {(number - trained) / 1e6:.2f} M frozen)"
    loader = cfg.train_dataloader if training else cfg.test_dataloader
    processes = get_world_size()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    work_dir = Path(cfg.work_dir)
    written = Path(cfg.filename or "config.py")  # that of a test is named after it, see `evaluation.test`
    rows = [
        ("config", cfg.filename and (cfg.filename if training else written.with_name(written.name[len("test_") :]))),
        ("model", f"{type(model).__name__}, {parameters}"),
        *(("encoder", _encoder(options, training)) for _, options in encoders(cfg.model)),
        ("data", f"{_data(loader.dataset)}, batches of {loader.batch_size}"),
        ("schedule", _schedule(cfg) if training else None),
        ("resumes" if cfg.get("resume") else "weights", cfg.get("load_from")),
        ("device", f"{processes} x {device}" if processes > 1 else device),
        ("work dir", f"{work_dir}, complete config in {written.name}"),
        ("log", Path(work_dir, runner.timestamp, f"{runner.timestamp}.log")),
    ]
    return "\n".join(f"  {name:<9} {text}" for name, text in rows if text)


def _encoder(options: Mapping[str, Any], training: bool) -> str:
    variant = options.get("variant")
    weights = (options.get("init_cfg") or {}).get("checkpoint", "none (random)")
    layers = options.get("out_indices")
    geometry = options.get("geometry", "release")
    return ", ".join(
        [
            variant if isinstance(variant, str) else "custom encoder",
            *([f"layers {layers if isinstance(layers, str) else ', '.join(map(str, layers))}"] if layers else []),
            f"geometry {geometry if isinstance(geometry, str) else 'custom'}",
            *([f"LoRA rank {(options.get('lora') or {}).get('rank', 8)}"] if options.get("lora") else []),
            *([f"weights {weights}"] if training and "type" in options else []),  # a tracker has them elsewhere
        ]
    )


def _data(dataset: Mapping[str, Any]) -> str:
    """Return the annotation file or the folder of a dataset, or of the first one in a wrapper."""
    inner = dataset.get("dataset") or next(iter(dataset.get("datasets", ())), None)
    if inner:
        return f"{dataset['type']} of {_data(inner)}"
    root = dataset.get("data_root") or ""
    prefix = dataset.get("data_prefix") or {}
    path = dataset.get("ann_file") or next(iter(prefix.values()), "") if isinstance(prefix, Mapping) else ""
    return f"{dataset['type']} {Path(root, path)}"


def _schedule(cfg: Config) -> str:
    loop = cfg.train_cfg
    length = f"{loop.max_epochs} epochs" if loop.get("max_epochs") else f"{loop.get('max_iters')} iterations"
    return f"{length}, validation every {loop.val_interval}" if loop.get("val_interval") else length
