"""Exported depth estimators and segmenters equal the predictors, at every size."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

pytest.importorskip("mmseg")
from helpers.exported import EagerSession
from helpers.repository import CONFIGS, command
from helpers.videos import TINY
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.utils import import_modules_from_strings

import pe_spatial
from pe_spatial.depth import estimator
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.export.certificate import reference_cases
from pe_spatial.export.dense import AveragePool, depth_graph, segmenter_graph
from pe_spatial.export.graph import export
from pe_spatial.export.scores import check_truth
from pe_spatial.runtime import dense
from pe_spatial.runtime.compare import LIMITS, problems
from pe_spatial.runtime.verify import compare

pytestmark = pytest.mark.mmseg
CLASSES = ("wall", "floor", "cup")
SIZES = ((48, 64), (70, 90), (50, 40), (37, 131))
DEPTH = {
    "linear": ("lin1", {}),
    "class token": ("lin1_dinov2", {}),
    "four layers, at the size of the image": ("lin4", dict(size=None)),
    "DPT, mirrored": ("dpt", dict(test_cfg=dict(mode="whole", flip=True))),
    "windows": ("lin1", dict(test_cfg=dict(mode="slide", crop_size=(32, 32), stride=(20, 24)))),
}


def write(cfg, path, randomize, **meta):
    """Write a model as training does."""
    init_default_scope(cfg.default_scope)
    import_modules_from_strings(**cfg.custom_imports)
    torch.manual_seed(0)
    model = randomize(MODELS.build(cfg.model))
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text, dataset_meta=meta)), path)
    return pe_spatial.load(path)


def depth_predictor(name, path, randomize):
    base, options = DEPTH[name]
    cfg = Config.fromfile(CONFIGS / f"pe_spatial_{base}_nyu.py")
    cfg.model.backbone.update(variant={**TINY, "depth": 4}, init_cfg=None)
    if "test_cfg" in options:
        cfg.model.test_cfg = options["test_cfg"]
    size = options.get("size", (48, 64))
    return write(cfg, path, randomize, **(dict(image_size=size) if size else {}))


def segmenter_predictor(path, randomize, **test_cfg):
    cfg = Config.fromfile(CONFIGS / "pe_spatial_linear_ade20k.py")
    cfg.model.backbone.update(variant=TINY, init_cfg=None)
    cfg.model.decode_head.update(num_classes=len(CLASSES), map_size=(24, 24))
    cfg.model.test_cfg = test_cfg or dict(mode="whole")
    for step in cfg.test_dataloader.dataset.pipeline:
        if step["type"] == "Resize":
            step["scale"] = (256, 64)
    return write(cfg, path, randomize, classes=CLASSES, palette=[[200, 0, 0], [0, 200, 0], [0, 0, 200]])


@pytest.fixture
def in_torch(monkeypatch):
    """Return a runtime class whose graph is the module itself."""

    def start(kind, graph):
        monkeypatch.setattr("pe_spatial.runtime.images.read_manifest", lambda _: graph.manifest("onnx", "fp32"))
        monkeypatch.setattr("pe_spatial.runtime.images.open_session", lambda *_: EagerSession(graph))
        return kind("folder")

    return start


def images(smooth=True):
    """Images that vary slowly, because a level more or less of a pixel is not what is tested."""
    for size in SIZES:
        y, x = np.mgrid[: size[0], : size[1]]
        waves = [np.sin(x / 9 + channel) * np.cos(y / 7 - channel) for channel in range(3)]
        yield (127 + 100 * np.stack(waves, -1)).astype(np.uint8) if smooth else np.zeros((*size, 3), np.uint8)


def check_depth(exported, predictor, rtol=1e-4):
    assert (exported.quantity, exported.size) == (predictor.quantity, predictor.size)
    for image in images():
        theirs, ours = predictor(image), exported(image)
        assert ours.depth.shape == theirs.depth.shape == image.shape[:2]
        np.testing.assert_allclose(ours.depth, theirs.depth, rtol=rtol)
    batch = [next(images())] * 2
    np.testing.assert_allclose(exported(batch, batch_size=2)[1].depth, predictor(batch[0]).depth, rtol=rtol)


def check_labels(exported, predictor):
    assert exported.class_names == CLASSES
    for image in images():
        theirs, ours = predictor(image), exported(image)
        assert len(np.unique(theirs.labels)) > 1
        assert (ours.labels != theirs.labels).mean() < 1e-3
        assert (ours.draw(image).shape, ours.palette[1]) == (image.shape, [0, 200, 0])


@pytest.mark.parametrize("name", DEPTH)
def test_depth_is_that_of_the_predictor(tmp_path, randomize, in_torch, name):
    predictor = depth_predictor(name, tmp_path / "w.pth", randomize)
    check_depth(in_torch(dense.ExportedDepth, depth_graph(predictor)), predictor, rtol=2e-3)


@pytest.mark.parametrize("test_cfg", [{}, dict(mode="slide", crop_size=(48, 48), stride=(30, 30))], ids=["", "windows"])
def test_labels_are_those_of_the_predictor(tmp_path, randomize, in_torch, test_cfg):
    predictor = segmenter_predictor(tmp_path / "w.pth", randomize, **test_cfg)
    check_labels(in_torch(dense.ExportedSegmenter, segmenter_graph(predictor)), predictor)


@pytest.mark.long
@pytest.mark.parametrize("name", DEPTH)
def test_depth_in_other_runtimes(tmp_path, randomize, name):
    predictor = depth_predictor(name, tmp_path / "w.pth", randomize)
    predictor.size = None  # resizing is tested above
    export(depth_graph(predictor), tmp_path / "out")
    for backend in ("onnxruntime", "openvino"):
        check_depth(dense.ExportedDepth(tmp_path / "out", backend=backend, threads=1), predictor)


@pytest.mark.long
def test_labels_in_other_runtimes(tmp_path, randomize):
    predictor = segmenter_predictor(tmp_path / "w.pth", randomize)
    export(segmenter_graph(predictor), tmp_path / "out")
    for backend in ("onnxruntime", "openvino"):
        check_labels(dense.ExportedSegmenter(tmp_path / "out", backend=backend, threads=1), predictor)


@pytest.mark.parametrize("cells", [1, (3, 2), 6, (None, 4)])
def test_average_pools_are_those_of_torch(cells):
    for size in ((6, 6), (7, 11), (3, 20)):
        x = torch.randn(2, 4, *size)
        assert_close(AveragePool(cells)(x), torch.nn.functional.adaptive_avg_pool2d(x, cells))


def test_what_the_runtime_does_not_do_is_refused(tmp_path, randomize):
    predictor = depth_predictor("linear", tmp_path / "w.pth", randomize)
    predictor.model.data_preprocessor.pad_size_divisor = 32
    with pytest.raises(ConfigError, match="a pad_size_divisor of a depth estimator is not exported"):
        depth_graph(predictor)
    predictor.estimator.steps = [dict(type="mmseg.RandomFlip")]
    with pytest.raises(ConfigError, match="the test pipeline has a RandomFlip, which is not exported"):
        depth_graph(predictor)
    predictor = segmenter_predictor(tmp_path / "s.pth", randomize)
    predictor.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    with pytest.raises(ConfigError, match="padding of test images"):
        segmenter_graph(predictor)


def perturb(graph, _):
    graph.module.model.decode_head.conv.weight.data[0, 0] += 0.5


def swap_channels(graph, _):
    graph.module.bgr = not graph.module.bgr


def align_corners(_, monkeypatch):
    aligned = dict(mode="bilinear", align_corners=True)
    monkeypatch.setattr(estimator, "resize", lambda x, size: torch.nn.functional.interpolate(x, tuple(size), **aligned))


@pytest.mark.parametrize("mutate", [perturb, swap_channels, align_corners])
def test_certificate_catches_what_differs(tmp_path, randomize, monkeypatch, mutate):
    graph = depth_graph(depth_predictor("linear", tmp_path / "w.pth", randomize))
    cases = reference_cases(graph, 1, list(images()))
    assert problems(*compare(EagerSession(graph), cases), LIMITS["fp32"]) == []
    mutate(graph, monkeypatch)
    assert problems(*compare(EagerSession(graph), cases), LIMITS["fp32"])


def test_missing_truth_is_said_before_the_export(tmp_path, randomize):
    depth_predictor("linear", tmp_path / "w.pth", randomize)
    Image.fromarray(next(iter(images()))).save(tmp_path / "room.png")
    (tmp_path / "depth").mkdir()
    args = (tmp_path / "w.pth", "--images", tmp_path / "room.png", "--gt", tmp_path / "depth")
    with pytest.raises(SystemExit, match="depth has no depth map of the images; give maps of their names"):
        command("export", *args, "--out", tmp_path / "out", cwd=tmp_path)
    assert not (tmp_path / "out").exists()
    with pytest.raises(DatasetError, match=r"has no masks of .*room.png; give --gt MASKS of its frames"):
        check_truth("tracking", [tmp_path / "room.png"], tmp_path / "depth")


@pytest.mark.long
def test_commands_export_and_predict(tmp_path, randomize):
    """The RMSE of both against the depth of the predictor, which is then that of neither."""
    predictor = depth_predictor("linear", tmp_path / "w.pth", randomize)
    (tmp_path / "rooms").mkdir()
    (tmp_path / "depth").mkdir()
    for i, image in enumerate(images()):
        Image.fromarray(image).save(tmp_path / f"rooms/{i}.png")
        np.save(tmp_path / f"depth/{i}.npy", predictor(image).depth)
    rooms, out = sorted((tmp_path / "rooms").iterdir()), tmp_path / "out"
    printed = command("export", tmp_path / "w.pth", "--out", out, "--images", *rooms, "--gt", tmp_path / "depth",
                      cwd=tmp_path)  # fmt: skip
    assert "RMSE [m]       0.0000 in PyTorch, 0.00" in printed
    assert "depth" in command("export", "--verify", out, cwd=tmp_path)
    printed = command("predict", tmp_path / "rooms", "--checkpoint", out, "--out", tmp_path / "p", cwd=tmp_path)
    assert "4 predicted" in printed
    np.testing.assert_allclose(np.load(tmp_path / "p/1.npy"), np.load(tmp_path / "depth/1.npy"), rtol=5e-3)
    with pytest.raises(SystemExit, match="is an exported model, which has no --tile"):
        command("predict", tmp_path / "rooms", "--checkpoint", out, "--tile", 32, "--out", tmp_path / "q", cwd=tmp_path)
    assert pe_spatial.load(out).task == "depth"
