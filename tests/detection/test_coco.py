"""Broken COCO input: an error that names the file and the remedy, or a counted skip."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("mmdet")
from helpers.coco import annotation, write_coco
from mmcv.transforms import LoadImageFromFile
from torch.utils.data import DataLoader

from pe_spatial.detection.coco import CheckedCocoDataset
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import DatasetError

pytestmark = pytest.mark.mmdet
CLASSES = ("red", "blue")


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path)


@pytest.fixture
def edit(coco):
    """Apply a function to the content of the annotation file."""

    def apply(change):
        content = json.loads(coco.read_text())
        change(content)
        coco.write_text(json.dumps(content))
        return coco

    return apply


def build(path, *, classes=CLASSES, pipeline=(), **options):
    return CheckedCocoDataset(
        data_root=str(path.parents[1]),
        ann_file="annotations/" + path.name,
        data_prefix=dict(img="train2017/"),
        metainfo=dict(classes=classes),
        pipeline=list(pipeline),
        **options,
    )


def test_clean_set_passes_unchanged(coco, log):
    dataset = build(coco)
    assert len(dataset) == 4
    first = json.loads(coco.read_text())["annotations"][0]
    x, y, w, h = first["bbox"]
    instance = dataset[0]["instances"][0]
    assert instance["bbox"] == [x, y, x + w, y + h]
    assert [i["bbox_label"] for i in dataset[0]["instances"]] == [0, 1]
    assert "4 images (0 without boxes, 0 missing), 8 boxes (0 clipped); skipped boxes: none" in log[-1][0]


def test_bad_boxes_are_clipped_or_skipped_and_counted(edit, log):
    def change(content):
        content["annotations"] += [
            annotation(100, 1, [-20, -10, 50, 40]),  # partly outside: clipped
            annotation(101, 1, [120, 90, 50, 40]),  # clipped
            annotation(102, 1, [200, 10, 20, 20]),  # outside
            annotation(103, 1, [-30, 10, 20, 20]),  # outside
            annotation(104, 1, [10, 10, 0, 20]),  # no area
            annotation(105, 1, [10, 10, -5, 20]),
            annotation(106, 1, [10, float("nan"), 5, 20]),
            annotation(107, 1, [10, 10, float("inf"), 20]),
            annotation(108, 1, [10, 10, 5, 20], bbox=[10, 10, "5", 20]),
            annotation(109, 99, [10, 10, 5, 20]),  # of no image
        ]

    dataset = build(edit(change))
    boxes = [i["bbox"] for i in dataset[0]["instances"]]
    assert boxes[2:] == [[0, 0, 30, 30], [120, 90, 128, 96]]
    assert "10 boxes (2 clipped)" in log[-1][0]
    assert "2 outside, 2 smaller than a pixel, 3 not finite, 1 of unknown images" in log[-1][0]


def test_image_without_boxes_is_a_negative_unless_filtered(edit):
    path = edit(lambda content: content.update(annotations=[a for a in content["annotations"] if a["image_id"] != 2]))
    assert [len(item["instances"]) for item in build(path)] == [2, 0, 2, 2]
    assert [item["img_id"] for item in build(path, filter_cfg=dict(filter_empty_gt=True))] == [1, 3, 4]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("images"), "no list 'images'"),
        (lambda c: c.pop("annotations"), "no list 'annotations'"),
        (lambda c: c.update(annotations=[]), "nothing to learn"),
        (lambda c: c["images"][1].pop("width"), r"images\[1\] has no width"),
        (lambda c: c["annotations"][3].pop("bbox"), r"annotations\[3\] has no bbox"),
        (lambda c: c["images"][1].update(id=1), "more than once"),
        (lambda c: c["annotations"][0].update(category_id=55), r"does not define \(55\)"),
        (lambda c: c["categories"].reverse(), "in the order blue, red"),
        (lambda c: c["categories"].append(dict(id=9, name="red")), "categories 1 and 9 are both named 'red'"),
        (lambda c: c["images"][1].update(height=None), r"images\[1\] has height None"),
        (lambda c: c["images"][1].update(width="64"), r"images\[1\] has width '64'"),
        (lambda c: c["annotations"][0].update(image_id=[1]), r"annotations\[0\] has image_id \[1\]"),
        (lambda c: c["categories"][1].update(name="green"), "blue: the config has red, blue, the file has red, green"),
        (lambda c: c["images"][1].update(file_name="gone.png"), r"1 of the 4 images .*gone.png; .*--data-root"),
    ],
)
def test_errors_name_file_and_remedy(edit, change, message):
    path = edit(change)
    with pytest.raises(DatasetError, match=message) as error:
        build(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ['{"images": [', "", "[1, 2]", "\x00\x01"])
def test_file_that_is_not_coco(coco, text):
    coco.write_text(text)
    with pytest.raises(DatasetError, match=r"not valid json|not a COCO"):
        build(coco)


def test_absent_annotation_file(coco):
    coco.unlink()
    with pytest.raises(DatasetError, match=r"no annotation file at .*--data-root"):
        build(coco)


def test_missing_images_can_be_skipped_in_training_only(coco, log):
    (coco.parents[1] / "train2017" / "3.png").unlink()
    assert [item["img_id"] for item in build(coco, skip_missing=True)] == [1, 2, 4]
    assert "1 missing" in log[-1][0]
    with pytest.raises(DatasetError, match="are missing"):
        build(coco, skip_missing=True, test_mode=True)


def test_masks_that_would_be_lost(edit):
    masks = [dict(type="mmdet.LoadAnnotations", with_mask=True, poly2mask=False)]
    path = edit(lambda c: c["annotations"][0].pop("segmentation"))
    assert len(build(path)) == 4  # nobody asks for masks
    with pytest.raises(DatasetError, match="no segmentation"):
        build(path, pipeline=masks)
    path = edit(lambda c: c["annotations"][0].update(segmentation=dict(size=[96, 128], counts=[96 * 128])))
    with pytest.raises(DatasetError, match="poly2mask=True"):
        build(path, pipeline=masks)


def test_broken_image_is_replaced_in_training_and_named_in_testing(coco, log):
    image = coco.parents[1] / "train2017" / "2.png"
    image.write_bytes(image.read_bytes()[:60])
    skipping = build(coco, pipeline=[LoadCheckedImage(skip_broken=True)])
    assert all(skipping[1]["img_id"] != 2 for _ in range(5))
    assert log[-1][1] == logging.WARNING
    assert sum(str(image) in line for line, _ in log) == 1  # named once
    with pytest.raises(DatasetError, match=f"{image} cannot be decoded"):
        build(coco, pipeline=[LoadCheckedImage()], test_mode=True)[1]


def test_image_of_another_size(edit):
    path = edit(lambda c: c["images"][0].update(width=64))
    with pytest.raises(DatasetError, match=r"1.png is 96x128 .* say 96x64"):
        build(path, pipeline=[LoadCheckedImage()])[0]


@pytest.mark.parametrize("kind", ["L", "LA", "RGBA", "P", "CMYK", "I;16", "exif"])
def test_every_mode_loads_as_bgr(tmp_path, kind):
    grey = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (10, 1))  # (10, 20)
    colour = np.stack((grey, grey // 2, 255 - grey), axis=-1)
    path, expected, tolerance, options = tmp_path / "p.png", np.stack([grey] * 3, -1), 0, {}
    if kind == "L":
        image = Image.fromarray(grey)
    elif kind == "LA":
        image = Image.fromarray(np.stack((grey, np.full_like(grey, 128)), -1))
    elif kind == "RGBA":
        image = Image.fromarray(np.concatenate((colour, np.full((10, 20, 1), 7, np.uint8)), -1))
        expected = colour
    elif kind == "P":
        image, expected = Image.fromarray(colour).quantize(64), colour
        tolerance = 12
    elif kind == "CMYK":
        path, image, expected, tolerance = tmp_path / "p.tif", Image.fromarray(colour).convert("CMYK"), colour, 2
    elif kind == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image, exif = Image.fromarray(colour), Image.Exif()
        exif[0x0112] = 6  # the camera was turned: show it 90 degrees clockwise
        options = dict(exif=exif)
        expected = np.rot90(colour, -1)
    image.save(path, **options)
    loaded = LoadCheckedImage()(dict(img_path=str(path)))
    assert loaded["img"].dtype == np.uint8
    assert loaded["img_shape"] == loaded["ori_shape"] == expected.shape[:2]
    difference = loaded["img"][..., ::-1].astype(int) - expected.astype(int)
    assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("exif6_landscape_600x450.jpg", (450, 600)),
        ("exif8_portrait_1200x1800.jpg", (1800, 1200)),
        ("rgba_cat-dog_600x400.png", (400, 600)),
        ("gray_camera_512x512.png", (512, 512)),
        ("palette_terrain2_1024x682.png", (682, 1024)),
    ],
)
def test_real_odd_images_equal_mmcv(shared, name, size):
    results = dict(img_path=str(shared / "data" / "images" / name), height=size[0], width=size[1])
    loaded = LoadCheckedImage()(dict(results))
    assert loaded["img_shape"] == size
    assert loaded["img"].flags.writeable
    assert (loaded["img"] == LoadImageFromFile(imdecode_backend="pillow")(dict(results))["img"]).all()


def test_boxes_of_the_stored_image_keep_it_unturned(shared):
    path = str(shared / "data" / "images" / "exif6_landscape_600x450.jpg")
    stored = LoadCheckedImage()(dict(img_path=path, height=600, width=450))["img"]
    turned = LoadCheckedImage()(dict(img_path=path, height=450, width=600))["img"]
    assert (np.rot90(stored, -1) == turned).all()
    with pytest.raises(DatasetError, match="after EXIF rotation"):
        LoadCheckedImage()(dict(img_path=path, height=599, width=450))


def test_training_goes_on_with_a_missing_and_a_corrupt_image(coco):
    folder = coco.parents[1] / "train2017"
    (folder / "3.png").unlink()
    (folder / "2.png").write_bytes((folder / "2.png").read_bytes()[:60])
    dataset = build(coco, skip_missing=True, pipeline=[LoadCheckedImage(skip_broken=True)])
    loader = DataLoader(dataset, batch_size=3, num_workers=2, collate_fn=list)
    drawn = [item["img_id"] for _ in range(4) for batch in loader for item in batch]
    assert len(drawn) == 4 * 3  # as many samples as images that are there
    assert set(drawn) == {1, 4}
    assert drawn.count(1) >= 4
    assert drawn.count(4) >= 4  # each sound one in every epoch


def test_nothing_usable_is_one_clear_error(coco, edit):
    for image in (coco.parents[1] / "train2017").iterdir():
        image.write_bytes(b"")
    with pytest.raises(DatasetError, match=f"{coco} gave no usable image"):
        build(coco, pipeline=[LoadCheckedImage(skip_broken=True)], max_refetch=5)[0]
    with pytest.raises(DatasetError, match="skip_broken=False"):
        build(coco, pipeline=[LoadCheckedImage(skip_broken=True)], test_mode=True)
    path = edit(lambda c: [a.update(bbox=[500, 500, 9, 9]) for a in c["annotations"]])
    with pytest.raises(DatasetError, match="no object of the classes red, blue to learn; not learned: 8 outside"):
        build(path, filter_cfg=dict(filter_empty_gt=True))


def test_pixels_without_defined_range(tmp_path):
    path = tmp_path / "deep.tif"
    Image.fromarray(np.full((4, 4), 70000, np.int32)).save(path)
    with pytest.raises(DatasetError, match="32 bits"):
        LoadCheckedImage()(dict(img_path=str(path)))
