"""MMDetection's own DetInferencer runs the detectors of this project."""

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
import mmdet
from helpers.configs import load
from helpers.repository import CONFIGS
from mmdet.apis import DetInferencer
from mmengine.registry import MODELS

pytestmark = pytest.mark.mmdet


def test_demo(tmp_path, log):
    if mmdet.__version__ == "3.3.0":
        pytest.skip("mmdet 3.3 looks for LoadImageFromFile without a scope; docs/environments.md")
    path = CONFIGS / "pe_demo_cascade_synthetic.py"
    cfg = load(path)
    model = MODELS.build(cfg.model).eval()
    meta = dict(dataset_meta=dict(classes=cfg.classes))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), tmp_path / "w.pth")
    pixels = np.random.default_rng(0).integers(0, 255, (96, 144, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    inferencer = DetInferencer(str(path), str(tmp_path / "w.pth"), device="cpu", show_progress=False)
    (of_file,) = inferencer(str(tmp_path / "x.png"), out_dir=str(tmp_path / "out"))["predictions"]
    (of_array,) = inferencer(pixels[..., ::-1].copy())["predictions"]
    assert len(of_file["scores"]) > 0
    assert of_file == of_array
    assert inferencer.model.dataset_meta["classes"] == cfg.classes
    assert (tmp_path / "out" / "vis" / "x.png").is_file()
    assert not [line for line, level in log if level >= 30 and "pe_spatial" in line]
