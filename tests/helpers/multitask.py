"""Checkpoints of several tasks on the encoder in the package, with random heads."""

from pathlib import Path

import torch
from helpers.repository import REPO
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import import_modules_from_strings

from pe_spatial.engine.configs import read_config

VARIANT = "pe_synthetic_xs8_192"
TRACKER = dict(variant=VARIANT, grid=24, true_stride=True, d_model=32, mem_dim=8, layers=1, feedforward=32)


def detector_config() -> Config:
    cfg = read_config(str(REPO / "configs" / "pe_demo_cascade_synthetic.py"))
    cfg.model.test_cfg.rcnn.score_thr = 0.0
    return cfg


def depth_config(name: str = "pe_spatial_lin4_nyu.py") -> Config:
    cfg = read_config(str(REPO / "configs" / name))
    cfg.model.backbone.variant = VARIANT
    cfg.model.test_cfg = dict(mode="whole")  # without the mirrored image
    return cfg


def segmenter_config() -> Config:
    cfg = read_config(str(REPO / "configs" / "pe_spatial_linear_ade20k.py"))
    cfg.model.backbone.variant = VARIANT
    for step in cfg.test_dataloader.dataset.pipeline:
        if step.type == "Resize":
            step.scale = (192, 192)
    return cfg


def write(path: Path, cfg: Config, *, seed: int = 0, tuned: bool = False) -> Path:
    """Write a checkpoint of a config's model with random heads; `tuned` changes its encoder."""
    import_modules_from_strings(["mmdet.models", "mmseg.models", *cfg.get("custom_imports", {}).get("imports", ())])
    torch.manual_seed(seed)
    with DefaultScope.overwrite_default_scope(cfg.get("default_scope", "mmdet")):
        model = MODELS.build(cfg.model)
    model.init_weights()
    state = model.state_dict()
    if tuned:
        name = next(name for name in state if name.endswith("blocks.2.mlp.fc1.weight"))
        state[name] = state[name] + 0.01
    torch.save({"state_dict": state, "meta": dict(cfg=cfg.pretty_text)}, path)
    return path


def write_tracker(path: Path, seed: int = 0, weights: str | None = "released", **options) -> Path:
    from pe_spatial.tracking.sam2.model import build_pe_sam2

    tracker = {**TRACKER, **options}
    torch.manual_seed(seed)
    model = build_pe_sam2(**tracker, checkpoint=weights)
    model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.data.fill_(50)  # objects are always there
    state = {f"tracker.{name}": value for name, value in model.state_dict().items()}
    torch.save({"state_dict": state, "meta": dict(cfg=f"model = dict(type='PESAM2', tracker={tracker!r})\n")}, path)
    return path
