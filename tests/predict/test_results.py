"""Results: masks as crops, COCO's and supervision's forms, images."""

import sys

import numpy as np
import pytest

pytest.importorskip("mmdet")
from pycocotools import mask as run_lengths

from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.predict.masks import MaskCrop
from pe_spatial.predict.results import DepthMap, Detections, SegmentationMap, Tracks

pytestmark = pytest.mark.mmdet
SIZE = (12, 17)
NAMES = ("a", "b", "ä")


def some_masks():
    rng = np.random.default_rng(0)
    masks = [rng.random(SIZE) < share for share in (0, 0.05, 0.5, 1)]
    masks += [np.zeros(SIZE, bool) for _ in range(4)]
    masks[4][:, 3:6] = True  # runs that go on from the bottom of a column to the top of the next
    masks[5][-1, -1] = True
    masks[6][0, 0] = True
    masks[7][2:9, 4:11] = rng.random((7, 7)) < 0.5
    return np.array(masks)


def detections(masks=True):
    found = some_masks()
    boxes = np.array([[1, 2, 5.5, 9]] * len(found), np.float32)
    scores = np.linspace(0.9, 0.2, len(found), dtype=np.float32)
    labels = np.arange(len(found)) % 3
    crops = tuple(map(MaskCrop.cut, found)) if masks else None
    return Detections(boxes=boxes, scores=scores, labels=labels, class_names=NAMES, image_size=SIZE, crops=crops)


def test_a_crop_is_the_mask():
    for mask in some_masks():
        crop = MaskCrop.cut(mask)
        assert (crop.full(SIZE) == mask).all()
        assert crop.rle(SIZE)["counts"].encode() == run_lengths.encode(np.asfortranarray(mask))["counts"]
        part = MaskCrop.cut(mask[3:, 5:], x=5, y=3)  # of a tile
        assert (part.full(SIZE)[3:, 5:] == mask[3:, 5:]).all()


def test_detections_in_coco_form():
    found = detections()
    assert (found.masks == some_masks()).all()
    first = found.to_coco(image_id=7)[0]
    assert first == dict(image_id=7, category_id=1, bbox=[1, 2, 4.5, 7], score=pytest.approx(0.9),
                         segmentation=found.crops[0].rle(SIZE))  # fmt: skip
    assert [one["category_id"] for one in found.to_coco(category_ids=(5, 6, 90))][:3] == [5, 6, 90]
    assert "segmentation" not in detections(masks=False).to_coco()[0]


def test_detections_are_filtered():
    found = detections().filter(score=0.5, classes=("ä", "a"))
    assert found.names == ["a", "ä", "a"]
    assert found.scores.min() >= 0.5
    assert (found.masks == some_masks()[[0, 2, 3]]).all()
    assert len(found.filter(score=1)) == 0
    assert found.filter(score=1).masks.shape == (0, *SIZE)
    assert found.filter(score=1).to_coco() == []
    with pytest.raises(ConfigError, match=r"no class 'cat'; its classes are a, b, ä"):
        found.filter(classes=["cat"])


def test_supervision_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    for result in (detections(), SegmentationMap(labels=np.zeros(SIZE, int), class_names=("a",))):
        with pytest.raises(ImportError, match="pip install supervision"):
            result.to_supervision()


def test_supervision():
    pytest.importorskip("supervision")
    found = detections().to_supervision()
    assert (found.mask == some_masks()).all()
    assert found.data["class_name"].tolist()[:3] == ["a", "b", "ä"]
    assert len(detections(masks=False).filter(score=1).to_supervision()) == 0
    labels = np.zeros(SIZE, int)
    labels[2:4, 5:9] = 1
    areas = SegmentationMap(labels=labels, class_names=("a", "b", "c")).to_supervision()
    assert areas.xyxy.tolist() == [[0, 0, 17, 12], [5, 2, 9, 4]]
    crops = ({1: MaskCrop.cut(labels == 1)}, {1: MaskCrop.cut(labels == 5), 3: MaskCrop.cut(labels == 0)})
    frames = Tracks(frames=("0", "1"), objects=crops, image_size=SIZE).to_supervision()
    assert [frame.tracker_id.tolist() for frame in frames] == [[1], [3]]


def test_tracks_in_the_form_of_youtube_vis():
    mask = some_masks()[2]
    tracks = Tracks(frames=("0", "1"), objects=({4: MaskCrop.cut(mask)}, {}), image_size=SIZE)
    (one,) = tracks.to_coco(video_id=2)
    assert (one["id"], one["video_id"]) == (4, 2)
    assert one["segmentations"] == [MaskCrop.cut(mask).rle(SIZE), None]
    assert (tracks.masks(0)[4] == mask).all()


def test_drawing_changes_a_copy():
    rgb = np.full((*SIZE, 3), 90, np.uint8)
    labels = np.zeros(SIZE, int)
    labels[:, 4:] = 255  # no class
    depth = DepthMap(depth=np.ones(SIZE, np.float32))
    results = [detections(), SegmentationMap(labels=labels, class_names=("a",)), depth]
    for result in results:
        drawn = result.draw(rgb)
        assert drawn.shape == rgb.shape
        assert drawn.dtype == np.uint8
        assert (drawn != rgb).any()
        with pytest.raises(DatasetError, match=r"the result \(12, 17\)"):
            result.draw(rgb[1:])
    assert (rgb == 90).all()
    assert (results[1].draw(rgb)[:, 4:] == 90).any()
