"""A test on the first images reads and evaluates these alone."""

import json
from pathlib import Path

import pytest

pytest.importorskip("mmdet")
from helpers.coco import write_coco
from mmengine.config import Config
from mmengine.registry import DATASETS

from pe_spatial.detection.limit import limit_test
from pe_spatial.errors import ConfigError

pytestmark = pytest.mark.mmdet


def limited(root, number, **evaluator):
    file = "annotations/instances_train2017.json"
    dataset = dict(type="CheckedCocoDataset", data_root=f"{root}/", ann_file=file, data_prefix=dict(img="train2017/"))
    evaluator = dict(type="CocoMetric", ann_file=f"{root}/{file}") | evaluator
    cfg = Config(dict(work_dir=str(root / "run"), test_dataloader=dict(dataset=dataset), test_evaluator=evaluator))
    limit_test(cfg, number)
    return cfg


def test_limit(tmp_path):
    write_coco(tmp_path, images=4)
    cfg = limited(tmp_path, 2)
    dataset = DATASETS.build(
        {**cfg.test_dataloader.dataset, "test_mode": True, "metainfo": dict(classes=("red", "blue")), "pipeline": []}
    )
    assert [dataset.get_data_info(i)["img_id"] for i in range(len(dataset))] == [1, 2]
    content = json.loads(Path(cfg.test_evaluator.ann_file).read_text())
    assert [image["id"] for image in content["images"]] == [1, 2]
    assert [annotation["image_id"] for annotation in content["annotations"]] == [1, 1, 2, 2]


def test_limit_refuses_what_it_cannot_evaluate(tmp_path):
    write_coco(tmp_path)
    with pytest.raises(ConfigError, match=r"evaluated with other\.json"):
        limited(tmp_path, 2, ann_file="other.json")
    with pytest.raises(ConfigError, match="first 0 images"):
        limited(tmp_path, 0)
