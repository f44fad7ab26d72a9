"""Detectors as graphs: equal to MMDetection and to the golden values, in torch and in the runtimes."""

import math
from functools import partial

import cv2
import numpy as np
import pytest
import torch

pytest.importorskip("mmdet")
pytest.importorskip("onnxscript")
from helpers.exported import EagerSession, found, golden_detector
from PIL import Image
from torchvision.ops import batched_nms

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.export.certificate import reference_cases
from pe_spatial.export.detector import detector_graph
from pe_spatial.export.graph import Exportable, export
from pe_spatial.export.pixels import Pixels, resize_like_opencv, resize_like_pillow, scaled_size, size_of_short_side
from pe_spatial.export.suppression import best, separated, suppressed
from pe_spatial.export.two_stage import paste
from pe_spatial.images import read_rgb, short_side_size
from pe_spatial.runtime.compare import LIMITS, match, problems, worst
from pe_spatial.runtime.detection import ExportedDetector, check_canvas
from pe_spatial.runtime.manifest import read_manifest, write_manifest
from pe_spatial.runtime.sessions import open_session
from pe_spatial.runtime.verify import compare

SMALL = partial(scaled_size, scale=(333, 200))
pytestmark = pytest.mark.mmdet
KINDS = ["maskrcnn", "cascade", "deta"]


def in_torch(exportable, folder, monkeypatch):
    """Return the runtime of a graph that was not exported."""
    folder.mkdir()
    (folder / "model.onnx").touch()
    write_manifest(folder, exportable.manifest("onnx", "fp32"))
    monkeypatch.setattr("pe_spatial.runtime.images.open_session", lambda *_, **__: EagerSession(exportable))
    return ExportedDetector(folder)


def check_golden(exported, predictor, images, expected, iou):
    for batch in (1, 2):
        results = exported(images, batch_size=batch)
        golden = worst([match(found(result), theirs) for result, theirs in zip(results, expected, strict=True)])
        ours = worst([match(found(a), found(b)) for a, b in zip(results, predictor(images), strict=True)])
        assert golden["theirs"] > 10
        for one in (golden, ours):
            assert one["unmatched"] == 0
            assert one["box"] <= 0.01
            assert one["score"] <= 1e-4
        assert ours["iou"] > iou


@pytest.mark.parametrize("name", KINDS)
def test_graph_equals_mmdetection_and_the_golden_values(golden, tmp_path, monkeypatch, name):
    predictor, images, expected = golden_detector(golden, name, tmp_path)
    exported = in_torch(detector_graph(predictor), tmp_path / "out", monkeypatch)
    check_golden(exported, predictor, images, expected, iou=0.999)


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_onnx_runtime_gives_the_golden_boxes(golden, tmp_path, name):
    predictor, images, expected = golden_detector(golden, name, tmp_path)
    export(detector_graph(predictor), tmp_path / "out")
    check_golden(ExportedDetector(tmp_path / "out"), predictor, images, expected, iou=LIMITS["fp32"]["iou"])


def test_resizing_is_that_of_pillow():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width, h, w = (int(side) for side in rng.integers(2, 300, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = resize_like_pillow(torch.from_numpy(image).float()[None], (h, w))[0]
        theirs = Image.fromarray(image).resize((w, h), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(ours.numpy(), np.asarray(theirs))


def test_resizing_is_that_of_opencv():
    rng = np.random.default_rng(0)
    for _ in range(30):
        height, width, h, w = (int(side) for side in rng.integers(2, 300, 4))
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ours = resize_like_opencv(torch.from_numpy(image).float()[None], (h, w))[0]
        np.testing.assert_array_equal(ours.numpy(), cv2.resize(image, (w, h)))


class Resized(torch.nn.Module):
    """Pixels resized in both ways, to a size that hangs on theirs."""

    def __init__(self):
        super().__init__()
        self.ways = [Pixels([0] * 3, [1] * 3, size=SMALL, pillow=pillow) for pillow in (True, False)]

    def forward(self, pixels):
        return tuple(way(pixels)[0] for way in self.ways)


@pytest.mark.slow
def test_resizing_in_onnx_runtime_is_that_of_pillow_and_opencv(tmp_path):
    graph = Exportable(
        module=Resized(), task="resize", outputs=["pillow", "opencv"],
        inputs={"pixels": torch.randint(0, 256, (2, 150, 130, 3), dtype=torch.uint8)},
        dynamic={"pixels": {0: "batch", 1: "height", 2: "width"}},
    )  # fmt: skip
    export(graph, tmp_path / "out")
    session = open_session(tmp_path / "out", read_manifest(tmp_path / "out"))
    rng = np.random.default_rng(1)
    for _ in range(30):
        height, width = rng.integers(20, 500, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        found = {name: value[0].transpose(1, 2, 0) for name, value in session.run({"pixels": image[None]}).items()}
        size = found["opencv"].shape[1::-1]
        np.testing.assert_array_equal(found["pillow"], Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(found["opencv"], cv2.resize(image, size))


def test_sizes_are_those_of_mmcv():
    from mmcv.image import rescale_size

    rng = np.random.default_rng(0)
    for scale in ((1333, 800), (192, 192), (1024, 1024)):
        for h, w in rng.integers(20, 2000, (300, 2)).tolist():
            assert scaled_size(h, w, (max(scale), min(scale)))[::-1] == tuple(rescale_size((w, h), scale))


def test_sizes_of_a_short_side_are_those_of_the_images():
    rng = np.random.default_rng(0)
    for short, limit in ((224, 224), (1792, 1792), (800, 1333), (480, None)):
        for h, w in [*rng.integers(20, 2000, (500, 2)).tolist(), (448, 1), (64, 1), (3, 448), (150, 150)]:
            expected = short_side_size(h, w, short_side=short, max_long_side=limit or math.inf)
            assert size_of_short_side(h, w, short_side=short, max_long_side=limit) == expected


def test_suppression_is_that_of_torchvision():
    torch.manual_seed(0)
    corner = torch.rand(2, 200, 2) * 50
    boxes = torch.cat((corner, corner + torch.rand(2, 200, 2) * 40), dim=-1)
    scores, groups = torch.rand(2, 200), torch.randint(0, 3, (2, 200)).float()
    valid = scores > 0.1
    kept = suppressed(separated(boxes, groups, valid), scores, valid, 0.5)
    values, chosen, rows = best(scores, kept, 50, boxes)
    for i in range(2):
        index = valid[i].nonzero()[:, 0]
        expected = index[batched_nms(boxes[i, index], scores[i, index], groups[i, index], 0.5)][:50]
        assert chosen[i].sum() == len(expected)
        torch.testing.assert_close(rows[i, : len(expected)], boxes[i, expected], rtol=0, atol=0)
        torch.testing.assert_close(values[i, : len(expected)], scores[i, expected], rtol=0, atol=0)


def test_masks_are_pasted_as_mmdetection_does():
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    torch.manual_seed(0)
    masks = torch.rand(5, 28, 28)
    boxes = torch.tensor([[3.2, 4.7, 30.1, 50.9], [-5, -5, 20, 20], [0, 0, 64, 48], [40, 10, 41, 12], [10, 5, 90, 70]])
    theirs, _ = _do_paste_mask(masks[:, None], boxes, 48, 64, skip_empty=False)
    torch.testing.assert_close(paste(masks[None], boxes[None], (48, 64))[0], theirs, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("size", "resizing", "reached"), [((4000, 2), dict(short_side=224, max_long_side=224), "0x0"),
                                                           ((300, 200), {}, "200x300")])  # fmt: skip
def test_images_that_do_not_fit_the_canvas_are_refused(size, resizing, reached):
    check_canvas((150, 200), 256, resizing)
    with pytest.raises(DatasetError, match=rf"is {reached} px when it reaches the model, whose canvas has 256; crop"):
        check_canvas(size, 256, resizing)


def test_what_is_not_written_is_named(golden, tmp_path):
    predictor, *_ = golden_detector(golden, "cascade", tmp_path)
    predictor.pipeline.transforms.append(predictor)
    with pytest.raises(ConfigError, match="the test pipeline has a DetectionPredictor, which is not exported"):
        detector_graph(predictor)
    del predictor.pipeline.transforms[-1]
    predictor.model.roi_head.test_cfg.nms.type = "soft_nms"
    with pytest.raises(ConfigError, match=r"test_cfg.rcnn.nms is 'soft_nms'"):
        detector_graph(predictor)
    predictor, *_ = golden_detector(golden, "deta", tmp_path)
    predictor.model.bbox_head.test_cfg["method"] = "linear"
    with pytest.raises(ConfigError, match=r"test_cfg.method is 'linear'; DETA is exported with 'nms'"):
        detector_graph(predictor)


def rpn_threshold(graph):
    graph.module.rpn.nms.iou_threshold = 0.65


def channels(graph):
    graph.module.pixels.bgr = not graph.module.pixels.bgr


def another_resize(graph):
    graph.module.pixels.forward = lambda pixels, run=graph.module.pixels.forward: run(shifted(pixels))


def shifted(pixels):
    """Resize with corners aligned, as other libraries do: half a pixel away."""
    images = torch.nn.functional.interpolate(
        pixels.permute(0, 3, 1, 2).float(), size=pixels.shape[1:3][::1], mode="bilinear", align_corners=True
    )
    grown = torch.nn.functional.interpolate(images, scale_factor=2, mode="bilinear", align_corners=True)
    return grown[:, :, ::2, ::2].permute(0, 2, 3, 1).round().to(torch.uint8)


def weight(graph):
    with torch.no_grad():
        graph.module.model.backbone.encoder.blocks[0].mlp.fc1.weight[0, 0] += 0.05


@pytest.mark.parametrize("mutation", [None, rpn_threshold, channels, another_resize, weight])
def test_certificate_catches(golden, tmp_path, mutation):
    predictor, images, _ = golden_detector(golden, "maskrcnn", tmp_path)
    graph = detector_graph(predictor)
    cases = reference_cases(graph, 1, [read_rgb(images[0])], predictor)[-1:]
    if mutation:
        mutation(graph)
    found = problems(*compare(EagerSession(graph), cases), LIMITS["fp32"])
    assert bool(found) == bool(mutation)


def test_certificate_catches_another_nms_of_deta(golden, tmp_path):
    predictor, images, _ = golden_detector(golden, "deta", tmp_path)
    with torch.no_grad():  # proposals so large that final boxes overlap, which those of random weights do not
        predictor.model.bbox_head.reg_branches[predictor.model.decoder.num_layers][-1].bias[2:] += 1
    graph = detector_graph(predictor)
    cases = reference_cases(graph, 1, [read_rgb(images[0])], predictor)[-1:]
    assert problems(*compare(EagerSession(graph), cases), LIMITS["fp32"]) == []
    graph.module.options["iou_threshold"] = 0.65
    (found,) = problems(*compare(EagerSession(graph), cases), LIMITS["fp32"])
    assert "detections have no partner" in found
