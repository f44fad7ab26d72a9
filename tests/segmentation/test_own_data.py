"""Own data in configs for semantic segmentation: masks become label maps, and every count follows."""

import json

import numpy as np
import pytest

pytest.importorskip("mmseg")
from helpers.own_data import CLASSES, make_content, write_coco
from helpers.repository import CONFIGS
from mmengine.registry import DATASETS, init_default_scope

from pe_spatial.data.dataset import open_dataset, write_splits
from pe_spatial.engine import recipe
from pe_spatial.engine.configs import read_config
from pe_spatial.engine.nodes import leaves
from pe_spatial.errors import ConfigError
from pe_spatial.segmentation.own_data import apply_dataset

pytestmark = pytest.mark.mmseg
PROBE = str(CONFIGS / "pe_spatial_linear_ade20k.py")


def own(root, change=lambda _: None):
    for split in ("train", "val"):
        content = make_content(["a.png", "b.png"])
        for annotation in content["annotations"]:
            annotation.setdefault("area", 1)
        change(content)
        write_coco(root / "data", content, file=f"annotations/instances_{split}.json", folder=split)
    dataset = open_dataset(root / "data")
    return dataset, write_splits(dataset, root / "annotations")


def overlap(content):
    """Put a small square into a large one, and a crowd beside them."""
    del content["annotations"][2:]
    large, small = content["annotations"]
    right = dict(size=[30, 40], counts=[900, 300])
    crowd = dict(small, id=9, iscrowd=1, bbox=[30, 0, 10, 30], area=300, segmentation=right)
    large.update(segmentation=[[0, 0, 20, 0, 20, 20, 0, 20]], bbox=[0, 0, 20, 20], area=400, category_id=1)
    small.update(segmentation=[[5, 5, 10, 5, 10, 10, 5, 10]], bbox=[5, 5, 5, 5], area=25, category_id=3)
    content["annotations"] = [small, large, crowd]


def test_masks_become_labels(tmp_path):
    """The smaller object counts, crowds have no label, the rest is background."""
    cfg = read_config(PROBE)
    apply_dataset(cfg, *own(tmp_path, overlap))
    init_default_scope("mmseg")
    pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadObjectLabels")]
    dataset = DATASETS.build({**cfg.val_dataloader.dataset, "pipeline": pipeline})
    first, second = dataset[0], dataset[1]
    expected = np.zeros((30, 40), np.uint8)
    expected[:20, :20], expected[5:10, 5:10], expected[:, 30:] = 1, 3, 255
    np.testing.assert_array_equal(first["gt_seg_map"], expected)
    assert not second["gt_seg_map"].any()
    assert dataset.metainfo["classes"] == ("background", *CLASSES)
    complete = DATASETS.build(cfg.train_dataloader.dataset)[0]["data_samples"]
    assert set(np.unique(complete.gt_sem_seg.data)) <= {0, 1, 3, 255}


@pytest.mark.parametrize(
    "name",
    [
        PROBE,
        "mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py",
        "mmseg::mask2former/mask2former_r50_8xb2-160k_ade20k-512x512.py",
        "mmseg::segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py",
    ],
)
def test_every_count_follows(name, tmp_path):
    dataset, files = own(tmp_path)
    cfg = read_config(name)
    apply_dataset(cfg, dataset, files)
    text = json.dumps(cfg.model.to_dict(), default=str)
    assert '"num_classes": 4' in text
    assert not [n for n in (19, 150) if f'"num_classes": {n}' in text]
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        (leaf,) = leaves(loader.dataset)
        assert leaf.type == "ObjectSegDataset"
    assert cfg.val_evaluator.type == "IoUMetric"
    assert recipe.main_metric(cfg) == "mIoU"


def test_what_cannot_be_learned_is_refused(tmp_path):
    dataset, files = own(tmp_path, lambda content: [a.pop("segmentation") for a in content["annotations"]])
    with pytest.raises(ConfigError, match="made of masks, but not every object of the data has one"):
        apply_dataset(read_config(PROBE), dataset, files)
    with pytest.raises(ConfigError, match="no decode_head with num_classes"):
        apply_dataset(read_config(str(CONFIGS / "pe_spatial_lin1_nyu.py")), dataset, files)
