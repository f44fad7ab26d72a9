"""The doctor's recommendation as a config: that of the user, or one of this project, with what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from pe_spatial.alignment.doctor import Choice
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.image_size import set_image_size
from pe_spatial.engine.written import write_config
from pe_spatial.errors import ConfigError

TEMPLATES = {
    "segmentation": "pe_spatial::pe_spatial_linear_ade20k.py",
    "depth": "pe_spatial::pe_spatial_lin1_nyu.py",
    "tracking": "pe_spatial::pe_spatial_zeroshot_davis.py",
    "correspondence": "pe_spatial::pe_spatial_zeroshot_davis.py",
}
"""Task -> the config that is changed where the user gives none."""


def read_base(base: str) -> Config:
    """Return the config to change; ConfigError if it has no encoder as `model.backbone`."""
    cfg = read_config(base)
    backbone = (cfg.get("model") or {}).get("backbone")
    if not backbone or "variant" not in backbone:
        raise ConfigError(f"{base} has no Perception Encoder as model.backbone to change; give another --base")
    return cfg


def write_recommended(
    path: Path, choice: Choice, *, base: str, variant: Any, checkpoint: str, notes: list[str]
) -> Config:
    """Write a config that is `base` with the chosen layer, geometry and size; return it."""
    cfg = read_base(base)
    backbone = cfg.model.backbone
    weights = None if checkpoint == "none" else dict(type="Pretrained", checkpoint=checkpoint)
    changes: dict[str, Any] = {"variant": variant, "init_cfg": weights}
    if choice.geometry is not None:
        changes["geometry"] = choice.geometry
    layers = backbone.get("out_indices", -1)
    count = dict(last=1).get(layers, 4) if isinstance(layers, str) else 1 if isinstance(layers, int) else len(layers)
    changes["out_indices"] = [choice.layer] * count
    for key, value in changes.items():
        backbone[key] = value
    _set_size(cfg, choice.size)
    write_config(path, cfg, base=base, notes=notes)
    return cfg


def _set_size(cfg: Config, size: int) -> None:
    """Put the image size where this kind of config has it; depth is trained at the size of its data."""
    if cfg.model.type == "ZeroShotTracker":
        cfg.model.update(protocol="aligned", size=size)
    elif cfg.model.type == "LinearProbe" and "crop_size" in cfg:
        old = max(cfg.crop_size)
        table = {old: size, 99999999: 99999999, round(341 * old / 512): round(341 * size / 512)}
        for part in (cfg.model.data_preprocessor, cfg.model.test_cfg, cfg.train_dataloader, cfg.val_dataloader):
            _replace(part, table)
        _replace(cfg.test_dataloader, table)
    elif cfg.get("default_scope") == "mmdet":
        set_image_size(cfg, size)


def _replace(node: Any, table: Mapping[int, int]) -> None:
    """Replace numbers in tuples and lists, such as sizes of crops."""
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        if isinstance(value, tuple) or (isinstance(value, list) and all(isinstance(x, int) for x in value)):
            node[key] = type(value)(table.get(x, x) if isinstance(x, int) else x for x in value)
        elif isinstance(value, Mapping | list):
            _replace(value, table)
