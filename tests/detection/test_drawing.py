"""Drawn predictions: images are turned as the model saw them."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
from pe_spatial.detection import drawing

pytestmark = pytest.mark.mmdet


class Sample(SimpleNamespace):
    def cpu(self):
        return self


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_a_sheet_shows_images_as_the_model_saw_them(tmp_path, monkeypatch, shape):
    """An image of 20 x 30 with EXIF's orientation 6, and annotations of the upright or of the stored image."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(tmp_path / "a.jpg", exif=exif)
    sample = Sample(img_path=str(tmp_path / "a.jpg"), ori_shape=shape)
    seen = []
    visualizer = SimpleNamespace(
        add_datasample=lambda _, rgb, *_args, **_options: seen.append(rgb.shape),
        get_image=lambda: np.zeros((30, 30, 3), np.uint8),
    )
    monkeypatch.setattr(drawing, "VISUALIZERS", SimpleNamespace(build=lambda _: visualizer))
    dataset = type("Dataset", (list,), dict(metainfo={}))([dict(inputs=None, data_samples=sample)])
    model = SimpleNamespace(eval=lambda: None, test_step=lambda _: [sample])
    runner = SimpleNamespace(val_dataloader=SimpleNamespace(dataset=dataset), model=model)
    drawing.draw_sheet(runner, tmp_path / "sheet.png", 2)
    assert seen == [(*shape, 3)] * 2
