"""Contact sheets of datasets and configs: the objects on them are those that a model sees."""

import numpy as np
import pytest
from helpers.datasets import convert
from helpers.own_data import make_content, write_images
from helpers.repository import command
from PIL import Image

import pe_spatial.detection.browse as browse
from pe_spatial.data import open_dataset

pytestmark = pytest.mark.mmdet

CONFIG = """
custom_imports = dict(imports=['pe_spatial.detection', 'pe_spatial.engine'])
train_dataloader = dict(dataset=dict(
    type='RepeatDataset', times=2, dataset=dict(
        type='CheckedCocoDataset', data_root={root!r}, ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'), metainfo=dict(classes=('bolt', 'nut', 'washer')), pipeline=[
            dict(type='pe_spatial.LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask={bitmaps}),
            dict(type='Resize', scale=(80, 60)),
            dict(type='RandomFlip', prob=1.0),
            dict(type='PackDetInputs', meta_keys=('img_path',))])))
"""


@pytest.fixture
def root(tmp_path):
    splits = {}
    for split, count in (("train", 5), ("val", 2)):
        names = [f"{split}_{i}.png" for i in range(count)]
        write_images(tmp_path / f"source_{split}", names, shade=195 + count)
        splits[split] = (make_content(names, seed=count), tmp_path / f"source_{split}")
    splits["train"][0]["annotations"][0]["bbox"] = [100, 100, 5, 5]  # outside
    return convert("COCO", splits, tmp_path / "data")


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of `draw_sheet`, in place of a sheet."""
    calls = []
    monkeypatch.setattr(browse, "draw_sheet", lambda *args: calls.append(args))
    return calls


def test_sheet_of_a_dataset(root, drawn):
    lines = browse.browse_dataset(open_dataset(root), "sheet.png", split="train", count=16, seed=0)
    ((_, examples, classes, statistics, shown),) = drawn
    assert lines is shown
    assert lines[1] == "train: boxes clipped: 0; skipped: 1 outside; ignored: none"
    assert classes == ("bolt", "nut", "washer")
    assert {split: sum(counts) for split, counts in statistics.per_class.items()} == {"train": 9, "val": 4}
    assert sorted(statistics.per_image) == [1, 2, 2, 2, 2, 2, 2]
    example = next(example for example in examples if example.title.startswith("train_1.png"))
    assert example.boxes.tolist() == [[4, 8, 14, 16], [19, 8, 29, 17]]
    assert [len(mask[0]) for mask in example.masks] == [8, 8]
    assert example.image[0, 0].tolist() == [200, 1, 0]


@pytest.mark.parametrize("bitmaps", [True, False])
def test_sheet_of_a_config_shows_augmented_images(root, drawn, tmp_path, bitmaps):
    from mmengine.config import Config

    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(root=str(root), bitmaps=bitmaps))
    lines = browse.browse_config(Config.fromfile(config), "sheet.png", split="train", count=10, seed=0)
    ((_, examples, _, statistics, _),) = drawn
    assert "10 images, 18 objects" in lines[0]
    assert lines[1].endswith("boxes clipped: 0; skipped: 1 outside; ignored: none")
    assert sum(statistics.per_class["train"]) == 18
    example = next(example for example in examples if example.title == "train_1.png (80x60)")
    assert example.boxes.tolist() == [[52, 16, 72, 32], [22, 16, 42, 34]]  # doubled and flipped
    assert example.image[0, 0].tolist() == [200, 1, 0]  # RGB
    assert len(example.masks) == 2
    if bitmaps:
        columns = np.flatnonzero(example.masks[0].any(0))
        assert 50 <= columns.min() <= columns.max() <= 72


def test_command_writes_a_sheet(root, tmp_path):
    text = command("browse", root, "--out", tmp_path / "sheet.png", "--count", 3, cwd=tmp_path)
    assert "COCO: images 5 train, 2 val; 14 objects with masks; 3 classes (bolt, nut, washer)" in text
    with Image.open(tmp_path / "sheet.png") as sheet:
        colors = len(sheet.convert("RGB").getcolors(10**6))
    assert colors > 100
    with pytest.raises(SystemExit, match=r"has no test part; it has train, val"):
        command("browse", root, "--split", "test", cwd=tmp_path)
