"""The README's snippets run as they stand, but for the download of the released weights."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
ENCODER, PRESET, CONFIG, TRACKER = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_encoder_snippets():
    names: dict = {}
    exec("from pe_spatial import PerceptionEncoder\nfrom_pretrained = PerceptionEncoder\n"
         + ENCODER.replace("from pe_spatial import from_pretrained", "") + PRESET, names)
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 768, 32, 48)] * 3
    assert names["encoder"].geometry.window_size == 32


@pytest.mark.mmdet
def test_config_snippet_swaps_the_backbone(tmp_path):
    mmdet = pytest.importorskip("mmdet")
    import torch
    from mmengine.config import Config
    from mmengine.registry import MODELS, init_default_scope

    base = Path(mmdet.__file__).parent / ".mim/configs/mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"
    (tmp_path / "swapped.py").write_text(f"_base_ = {str(base)!r}\n{CONFIG}")
    cfg = Config.fromfile(tmp_path / "swapped.py")
    init_default_scope("mmdet")
    with torch.device("meta"):
        model = MODELS.build(cfg.model)
    assert not model.with_neck
    assert model.backbone.pyramid.strides == tuple(cfg.model.rpn_head.anchor_generator.strides)
    assert cfg.optim_wrapper.constructor == "LayerDecayOptimWrapperConstructor"


def test_tracker_snippet():
    pytest.importorskip("sam2")
    import numpy as np
    import torch

    frames = np.random.default_rng(0).integers(0, 255, (2, 90, 120, 3)).astype(np.uint8)
    names = dict(frame=frames[0], next_frame=frames[1], x=40, y=30)
    exec(TRACKER.replace("'released'", "None").replace("_b16_", "_t16_"), names)
    assert names["masks"][1].shape == (90, 120)
    assert names["masks"][1].dtype == torch.bool
