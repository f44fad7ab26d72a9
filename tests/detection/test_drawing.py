"""Drawn detections: the image as the model saw it, ground truth in its pixels, one file for each image of the set."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmdet")
from helpers.coco import annotation
from helpers.configs import load
from helpers.repository import CONFIGS, REPO
from mmdet.structures.bbox import get_box_tensor
from mmengine.registry import DATASETS, HOOKS, VISUALIZERS
from mmengine.structures import InstanceData
from mmengine.visualization import Visualizer

from pe_spatial.detection import drawing
from pe_spatial.engine.evaluation import draw_predictions

pytestmark = pytest.mark.mmdet
DETECTION = [
    *(path for name in ("coco", "lvis", "deta", "demo") for path in sorted(CONFIGS.glob(f"*_{name}_*.py"))),
    CONFIGS / "pe_spatial_cascade_coco.py",
    *sorted((REPO / "projects/coco_detection/deta").glob("stage*.py")),
    *sorted((REPO / "projects/coco_detection/deta").glob("*[gc].py")),
]
BOX = [10, 4, 20, 12]


class Recorder:
    """In place of the visualizer."""

    def __init__(self):
        self.drawn = []

    def add_datasample(self, _, image, **options):
        self.drawn.append(SimpleNamespace(image=image, **options))


@pytest.fixture
def coco(tmp_path):
    """Two images of one name in two folders; the first is stored turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[4:16, 10:30] = 200  # the box
    for folder, options in (("one", dict(exif=exif)), ("two", {})):
        (tmp_path / "img" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "img" / folder / "1.png", **options)
    images = [dict(id=i, file_name=f"{f}/1.png", height=40, width=60) for i, f in ((1, "one"), (2, "two"))]
    content = dict(images=images, categories=[dict(id=1, name="ball")])
    content["annotations"] = [annotation(i, i, BOX) for i in (1, 2)]
    (tmp_path / "x.json").write_text(json.dumps(content))
    return tmp_path


def draw(cfg, coco, out, *, visualizer=None):
    """Draw both images as a test of `cfg` does, the objects themselves as predictions; return what was drawn."""
    Visualizer.get_instance("test_drawing")  # of which the hook takes the latest
    draw_predictions(cfg, folder=str(out))
    hook = HOOKS.build(cfg.default_hooks.visualization)
    hook._visualizer = visualizer or Recorder()
    place = dict(data_root=str(coco), ann_file="x.json", data_prefix=dict(img="img/"), metainfo=dict(classes=("ball",)))
    pipeline = cfg.test_dataloader.dataset.pipeline
    dataset = DATASETS.build(
        dict(type="CheckedCocoDataset", test_mode=True, serialize_data=False, pipeline=pipeline, **place)
    )
    runner = SimpleNamespace(test_dataloader=SimpleNamespace(dataset=dataset))
    for i in range(2):
        sample = dataset[i]["data_samples"]
        boxes = torch.tensor([[10.0, 4, 30, 16]])
        sample.gt_instances.bboxes = get_box_tensor(sample.gt_instances.bboxes)  # as models return it
        sample.pred_instances = InstanceData(bboxes=boxes, scores=torch.ones(1), labels=torch.zeros(1, dtype=torch.int))
        hook.after_test_iter(runner, i, None, [sample])
    return getattr(hook._visualizer, "drawn", None)


@pytest.mark.parametrize("early", [False, True], ids=["", "annotations before resize"])
@pytest.mark.parametrize("path", DETECTION, ids=lambda path: path.stem)
def test_every_config_draws_images_of_another_size(path, early, coco, tmp_path):
    cfg = load(path)
    pipeline = cfg.test_dataloader.dataset.pipeline
    loads = next(i for i, step in enumerate(pipeline) if step.type == "LoadAnnotations")
    if early:  # as in configs derived from a training pipeline
        pipeline.insert(1, pipeline.pop(loads))
    for drawn in draw(cfg, coco, tmp_path / "out"):
        assert drawn.image.shape == (40, 60, 3)
        assert (drawn.image[6:14, 12:28] == 200).all()  # the first image is not turned, as its annotations are not
        truth = drawn.data_sample.gt_instances
        assert np.abs(truth.bboxes.numpy() - [[10, 4, 30, 16]]).max() < 1
        if "masks" in truth:
            assert np.abs(truth.masks.to_ndarray().sum() - 240) < 30
            assert truth.masks.to_ndarray().shape == (1, 40, 60)


def test_files_keep_their_folders(coco, tmp_path):
    cfg = load(CONFIGS / "pe_demo_cascade_synthetic.py")
    visualizer = VISUALIZERS.build(dict(type="DetLocalVisualizer", name="test_drawing"))
    visualizer.dataset_meta = dict(classes=("ball",))
    draw(cfg, coco, tmp_path / "out", visualizer=visualizer)
    drawn = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert drawn == ["one/1.png", "two/1.png"]
    assert Image.open(tmp_path / "out" / "one" / "1.png").size == (120, 40)  # ground truth beside predictions


@pytest.mark.parametrize(
    ("path", "name"),
    [("/data/img/a/1.jpg", "a/1.jpg"), ("/other/1.jpg", "other/1.jpg"), ("/data/img/1.jp2", "1.jp2.png")],
)
def test_names_of_drawn_files(path, name):
    hook = HOOKS.build(dict(type="DrawDetectionsHook", test_out_dir="out"))
    assert hook._out_file(path, "/data/img/") == f"out/{name}"


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
