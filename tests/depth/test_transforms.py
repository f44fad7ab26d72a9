"""Depth in a pipeline: files of every kind, bad ones, cuts, turns, colors, packing, padding."""

import logging

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
from mmengine.registry import MODELS
from mmengine.structures import PixelData
from mmseg.datasets.transforms import RandomCrop, RandomFlip, Resize

from pe_spatial.depth import transforms
from pe_spatial.depth.transforms import (
    DepthColorAug,
    DepthCrop,
    DepthPreprocessor,
    DepthRandomCrop,
    DepthRandomFlip,
    DepthRandomRotate,
    LoadDepth,
    PackDepthInputs,
    bottom_center_box,
    read_depth,
)
from pe_spatial.engine.loading import LoadCheckedImage
from pe_spatial.errors import ConfigError, DatasetError

pytestmark = pytest.mark.mmseg
METERS = np.random.default_rng(0).uniform(1, 6, (24, 32)).astype(np.float32)


@pytest.fixture
def log(monkeypatch):
    lines = []
    monkeypatch.setattr(transforms, "print_log", lambda message, *, level, **_: lines.append((message, level)))
    return lines


def write(path, values):
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".pfm":
        cv2.imwrite(str(path), values)
    else:
        Image.fromarray(values).save(path)
    return str(path)


def load(path, *, scale=1000, shape=(24, 32), skip_empty=False, **meta):
    results = dict(img_path="a.jpg", depth_path=path, depth_scale=scale, ori_shape=shape, **meta)
    return LoadDepth(skip_empty=skip_empty).transform(results)


def scene(height=480, width=640, **meta):
    """An image that holds its own coordinates, with depth = 1 + row + column / 1000 and the camera of NYUv2."""
    rows, columns = np.mgrid[:height, :width]
    image = np.stack([rows % 256, columns % 256, rows // 256 * 16 + columns // 256], axis=2).astype(np.uint8)
    return dict(
        img=image,
        img_path="a.jpg",
        ori_shape=(height, width),
        img_shape=(height, width),
        gt_depth_map=(1 + rows + columns / 1000).astype(np.float32),
        seg_fields=["gt_depth_map"],
        intrinsics=(518.8579, 519.46961, 325.58245, 253.73617),
        **meta,
    )


@pytest.mark.parametrize(
    ("name", "values", "scale"),
    [
        ("d.png", np.round(METERS * 1000).astype(np.uint16), 1000),
        ("d.png", np.round(METERS * 256).astype(np.uint16), 256),
        ("d.pgm", np.round(METERS * 5000).astype(np.uint16), 5000),
        ("d.tiff", METERS, 1),
        ("d.npy", METERS, 1),
        ("d.npy", METERS.astype(np.float64) * 1000, 1000),
        ("d.npy", np.round(METERS * 1000).astype(np.int32), 1000),
        ("d.pfm", METERS, 1),
    ],
)
def test_files_of_every_kind(tmp_path, name, values, scale):
    depth = read_depth(write(tmp_path / name, values), scale=scale)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, METERS, atol=0.51 / scale if values.dtype.kind in "ui" else 1e-6)
    assert load(str(tmp_path / name), scale=scale)["seg_fields"] == ["gt_depth_map"]


def test_exr_needs_opencv_to_be_told(tmp_path):
    (tmp_path / "d.exr").write_bytes(b"\x76\x2f\x31\x01" + bytes(100))
    with pytest.raises(DatasetError, match=r"d\.exr is not a readable depth map \(.*(OPENCV_IO_ENABLE_OPENEXR|EXR)"):
        read_depth(str(tmp_path / "d.exr"), scale=1)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("d.png", (METERS * 40).astype(np.uint8), "contains uint8 values, and 256 levels are too coarse"),
        ("d.npy", (METERS * 40).astype(np.uint8), "contains uint8 values"),
        ("d.npy", METERS > 3, "contains bool values"),
        ("d.png", np.zeros((24, 32, 3), np.uint8), r"has the shape \(24, 32, 3\); give a depth map with one channel"),
        ("d.npy", np.stack([METERS, METERS + 1]), r"has the shape \(2, 24, 32\)"),
        ("d.npy", np.stack([METERS, METERS + 1, METERS], -1), r"has the shape \(24, 32, 3\)"),
    ],
)
def test_no_depth_map(tmp_path, name, values, message):
    with pytest.raises(DatasetError, match=message):
        read_depth(write(tmp_path / name, values), scale=1)


@pytest.mark.parametrize(
    "values",
    [METERS[None], METERS[..., None], METERS[None, None], METERS[None, ..., None], np.stack([METERS] * 3, -1)],
    ids=lambda values: "x".join(map(str, values.shape)),
)
def test_axes_of_one_and_equal_channels_are_one_map(tmp_path, values):
    np.testing.assert_array_equal(read_depth(write(tmp_path / "d.npy", values), scale=1), METERS)


def test_an_archive_of_one_array_is_read(tmp_path):
    np.savez_compressed(tmp_path / "d.npz", depth=METERS[None])
    np.testing.assert_array_equal(read_depth(str(tmp_path / "d.npz"), scale=1), METERS)
    np.savez(tmp_path / "two.npz", depth=METERS, mask=METERS > 1)
    with pytest.raises(DatasetError, match=r"two\.npz .*depth, mask"):
        read_depth(str(tmp_path / "two.npz"), scale=1)


@pytest.mark.parametrize("name", ["d.h5", "d.mat", "d.dpt", "d.txt"])
def test_formats_that_are_not_read_are_answered_with_those_that_are(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(DatasetError, match=rf"{name} .*\.png, .*\.npy, \.npz, .*\.exr"):
        read_depth(str(tmp_path / name), scale=1)


def test_the_case_of_a_suffix_does_not_matter(tmp_path):
    np.save(tmp_path / "d.npy", METERS)
    (tmp_path / "d.npy").rename(tmp_path / "d.NPY")
    np.testing.assert_array_equal(read_depth(str(tmp_path / "d.NPY"), scale=1), METERS)


def test_maps_above_the_limit_of_pil_are_read(tmp_path, monkeypatch):
    path = write(tmp_path / "d.png", np.round(METERS * 1000).astype(np.uint16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_depth(path, scale=1000).shape == METERS.shape


def save_turned(path, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)
    return str(path)


@pytest.mark.parametrize(("own", "of_image", "stored"), [(1, 6, True), (1, 6, False), (6, 6, True), (1, 8, True)])
def test_image_and_depth_are_turned_alike(tmp_path, own, of_image, stored):
    """Depth of the stored pixels turns with its image, depth of the upright image stays, its own tag comes first."""
    image = np.zeros((24, 32, 3), np.uint8)
    image[:8, :8] = 255
    depth = np.full((24, 32), 2000, np.uint16)
    depth[:8, :8] = 4000
    turns = {6: -1, 8: 1}[of_image]
    if own == 1 and not stored:
        depth = np.rot90(depth, turns)
    results = LoadCheckedImage()(dict(img_path=save_turned(tmp_path / "a.png", image, of_image)))
    results.update(depth_path=save_turned(tmp_path / "d.png", depth, own), depth_scale=1000)
    loaded = LoadDepth()(results)
    assert loaded["gt_depth_map"].shape == loaded["img"].shape[:2] == (32, 24)
    assert np.array_equal(loaded["gt_depth_map"] > 3, loaded["img"][..., 0] > 100)


def test_unreadable_files_are_named(tmp_path):
    path = write(tmp_path / "d.png", np.round(METERS * 1000).astype(np.uint16))
    data = (tmp_path / "d.png").read_bytes()
    for name, content in (("half.png", data[: len(data) // 2]), ("text.png", b"no image"), ("d.npy", b"\x93NUMPY")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DatasetError, match=f"{name} is not a readable depth map"):
            read_depth(str(tmp_path / name), scale=1000)
    with pytest.raises(DatasetError, match=r"absent.png is not a readable depth map \(.*No such file"):
        read_depth(path.replace("d.png", "absent.png"), scale=1000)


def test_what_is_no_depth_is_missing_and_counted(tmp_path, log):
    values = METERS.copy()
    values[0, :5] = (np.nan, np.inf, -np.inf, -1, 0)
    path = write(tmp_path / "d.npy", values)
    step = LoadDepth()
    for _ in range(2):
        results = dict(img_path="a", depth_path=path, depth_scale=1, ori_shape=(24, 32))
        depth = step.transform(results)["gt_depth_map"]
        assert depth[0, :5].tolist() == [0] * 5
        np.testing.assert_array_equal(depth[1:], METERS[1:])
    ((message, level),) = log
    assert level == logging.WARNING
    assert "NaN, infinite or negative depth in" in message
    assert "4 of 768 pixels, set to missing (1 such files so far" in message
    np.testing.assert_array_equal(read_depth(path, scale=1), depth)


def test_oddities_are_logged_at_1_10_100_files(tmp_path, log):
    step = LoadDepth()
    for i in range(12):
        path = write(tmp_path / f"{i}.npy", np.where(METERS > 3, METERS, -1))
        step.transform(dict(img_path="a", depth_path=path, depth_scale=1, ori_shape=(24, 32)))
    assert ["(1 such" in log[0][0], "(10 such" in log[1][0], len(log)] == [True, True, 2]


def test_depth_out_of_range_is_missing(tmp_path):
    path = write(tmp_path / "d.npy", METERS)
    depth = load(path, scale=1, min_depth=2.0, max_depth=4.0)["gt_depth_map"]
    np.testing.assert_array_equal(depth, np.where((METERS >= 2) & (METERS <= 4), METERS, 0))


def test_other_size_than_the_image(tmp_path):
    path = write(tmp_path / "d.npy", METERS)
    with pytest.raises(DatasetError, match=r"d.npy is 24x32 \(height x width\) but a.jpg is 32x24; give maps"):
        load(path, scale=1, shape=(32, 24))


@pytest.mark.parametrize(
    ("values", "scale", "max_depth", "likely"),
    [
        (np.round(METERS * 1000).astype(np.uint16), 1, 10, r"; set scale=1000 \(millimeters\)"),
        (np.round(METERS * 1000).astype(np.uint16), 1, None, r"; set scale=1000 \(millimeters\)"),
        (METERS, 1000, 10, r"; set scale=1 \(meters\)"),
        (METERS, 1000, None, r"; set scale=1 \(meters\)"),
        (METERS * 10, 256, 80, r"; set scale=1 \(meters\)"),
        (np.full((24, 32), 6e7), 1, 10, "; set the scale of the file"),
    ],
)
def test_scale_off_by_1000_is_named(tmp_path, values, scale, max_depth, likely):
    path = write(tmp_path / "d.npy", values)
    with pytest.raises(DatasetError, match=rf"has a median depth of .* m at scale={scale} .*{likely}"):
        load(path, scale=scale, max_depth=max_depth)


def test_real_depth_passes_the_check_of_its_scale_and_not_another(shared):
    for name, scale, max_depth in (
        ("nyuv2_eigen/depth/000.png", 1000, 10),
        ("kitti/depth/0000000005.png", 256, 80),
        ("sevenscenes_kitchen/depth/000150.png", 1000, 10),
    ):
        path = str(shared / "data/depth" / name)
        shape = read_depth(path, scale=scale).shape
        load(path, scale=scale, max_depth=max_depth, shape=shape)
        for wrong in (1, 1_000_000):
            with pytest.raises(DatasetError, match=rf"; set .*scale={scale} \("):
                load(path, scale=wrong, max_depth=max_depth, shape=shape)


def test_fixed_crop_keeps_pixels_depth_and_camera_together():
    whole = scene()
    results = DepthCrop(box=(43, 45, 608, 472)).transform(scene())
    assert results["img"].shape == (427, 565, 3)
    np.testing.assert_array_equal(results["img"], whole["img"][45:472, 43:608])
    np.testing.assert_array_equal(results["gt_depth_map"], whole["gt_depth_map"][45:472, 43:608])
    assert results["ori_shape"] == results["img_shape"] == (427, 565)
    assert results["intrinsics"] == pytest.approx((518.8579, 519.46961, 325.58245 - 43, 253.73617 - 45))


def test_bottom_center_is_kittis():
    whole = scene(375, 1242)
    results = DepthCrop(bottom_center=(352, 1216)).transform(scene(375, 1242))
    np.testing.assert_array_equal(results["gt_depth_map"], whole["gt_depth_map"][23:, 13:1229])
    assert bottom_center_box(376, 1241, size=(352, 1216)) == (12, 24, 1228, 376)
    results = DepthCrop(bottom_center=(352, 1216), image_only=True).transform(scene(375, 1242))
    assert (results["img"].shape, results["gt_depth_map"].shape) == ((352, 1216, 3), (375, 1242))
    assert results["ori_shape"] == (352, 1216)


def test_wrong_crops_are_refused():
    with pytest.raises(DatasetError, match=r"a.jpg is 400x640 .* and does not contain the box .* \(43, 45, 608, 472\)"):
        DepthCrop(box=(43, 45, 608, 472)).transform(scene(400))
    with pytest.raises(DatasetError, match="does not contain the box"):
        DepthCrop(bottom_center=(352, 1216)).transform(scene())
    for options in (dict(), dict(box=(0, 0, 2, 2), bottom_center=(2, 2)), dict(box=(5, 0, 5, 2)), dict(box=(0, 1))):
        with pytest.raises(ConfigError):
            DepthCrop(**options)


def test_random_crop_reaches_every_place_and_keeps_the_camera():
    seen = set()
    for seed in range(40):
        np.random.seed(seed)
        results = DepthRandomCrop((3, 5)).transform(scene(5, 7))
        top, left = (int(results["img"][0, 0, k]) for k in (0, 1))
        seen.add((top, left))
        window = scene(5, 7)["gt_depth_map"][top : top + 3, left : left + 5]
        np.testing.assert_array_equal(results["gt_depth_map"], window)
        assert results["intrinsics"][2:] == pytest.approx((325.58245 - left, 253.73617 - top))
        assert results["img_shape"] == (3, 5)
    assert seen == {(top, left) for top in range(3) for left in range(3)}


def test_random_crop_of_a_small_image():
    with pytest.raises(DatasetError, match=r"a.jpg is 24x32 .* smaller than the crop of 416x544; .* pad_val=0"):
        DepthRandomCrop((416, 544)).transform(scene(24, 32))
    results = DepthRandomCrop((30, 20), pad_val=7).transform(scene(24, 32))
    assert results["img"].shape == (30, 20, 3)
    assert (results["img"][24:] == 7).all()
    assert (results["gt_depth_map"][24:] == 0).all()
    assert results["gt_depth_map"][:24].all()
    left = int(results["img"][0, 0, 1])
    assert results["intrinsics"][2] == pytest.approx(325.58245 - left)
    assert PackDepthInputs().transform(results)["data_samples"].intrinsics == results["intrinsics"]


def test_rotation_fills_depth_as_missing_and_never_mixes_it():
    np.random.seed(0)
    results = scene()
    results["gt_depth_map"] = np.where(np.arange(640) < 320, 2.0, 8.0)[None].repeat(480, 0).astype(np.float32)
    results["img"] = np.full_like(results["img"], 200)
    results = DepthRandomRotate(degrees=2.5, prob=1.0, pad_val=9).transform(results)
    assert set(np.unique(results["gt_depth_map"])) == {0, 2, 8}  # neither 255 nor a mean of both
    missing = results["gt_depth_map"] == 0
    assert 0.001 < missing.mean() < 0.05
    assert (results["img"][missing].max(-1) < 200).mean() > 0.9
    assert (results["img"][0, 0] == 9).all() or (results["img"][0, -1] == 9).all()
    assert results["intrinsics"] is None


def test_rotation_turns_both_alike_within_its_range():
    angles = []
    for seed in range(16):
        np.random.seed(seed)
        results = scene()
        results["img"] = np.zeros_like(results["img"])
        results["img"][240, 400:600] = 255
        results["gt_depth_map"] = np.where(results["img"][..., 0] > 0, 5.0, 1.0).astype(np.float32)
        results = DepthRandomRotate(degrees=2.5, prob=0.5).transform(results)
        lines = [results["img"][..., 0] > 100, results["gt_depth_map"] == 5]
        slopes = [np.polyfit(*np.nonzero(line)[::-1], 1)[0] for line in lines]
        assert slopes[0] == pytest.approx(slopes[1], abs=0.004)
        angles.append(np.degrees(np.arctan(slopes[1])))
    assert max(np.abs(angles)) < 2.7
    assert min(angles) < -1.2
    assert max(angles) > 1.2
    assert 3 < sum(np.abs(angles) < 0.02) < 13  # about half stay


def test_colors_are_those_of_bts():
    image = scene()["img"][..., ::-1]  # as LoadCheckedImage leaves it: a view with a negative stride
    clipped = 0
    for seed in range(4):
        np.random.seed(seed)
        np.random.rand()
        gamma, brightness = np.random.uniform(0.9, 1.1), np.random.uniform(0.75, 1.25)
        colors = np.random.uniform(0.9, 1.1, size=3)
        bright = (image / 255.0) ** gamma * brightness * colors
        np.random.seed(seed)
        results = DepthColorAug(prob=1.0).transform(dict(img=image))
        assert results["img"].dtype == np.uint8
        assert np.abs(results["img"] - 255 * bright.clip(0, 1)).max() <= 0.5 + 1e-9
        clipped += (bright > 1.01).any()
    assert clipped
    assert DepthColorAug(prob=0.0).transform(dict(img=image))["img"] is image
    changed = sum(DepthColorAug().transform(dict(img=image))["img"] is not image for _ in range(100))
    assert 30 < changed < 70


def test_flip_mirrors_image_depth_and_camera():
    results = DepthRandomFlip(prob=1.0).transform(scene())
    for key in ("img", "gt_depth_map"):
        np.testing.assert_array_equal(results[key], scene()[key][:, ::-1])
    sample = PackDepthInputs().transform(results)["data_samples"]
    assert (sample.flip, sample.flip_direction) == (True, "horizontal")
    assert sample.intrinsics == pytest.approx((518.8579, 519.46961, 639 - 325.58245, 253.73617))
    cut = DepthCrop(box=(43, 45, 608, 472)).transform(DepthRandomFlip(prob=1.0).transform(scene()))
    assert PackDepthInputs().transform(cut)["data_samples"].intrinsics[2] == pytest.approx(639 - 325.58245 - 43)
    whole = DepthRandomFlip(prob=0.0).transform(scene())
    np.testing.assert_array_equal(whole["gt_depth_map"], scene()["gt_depth_map"])
    assert PackDepthInputs().transform(whole)["data_samples"].intrinsics == scene()["intrinsics"]
    flips = sum(DepthRandomFlip().transform(scene(4, 6))["flip"] for _ in range(100))
    assert 30 < flips < 70
    turned = DepthRandomFlip(prob=1.0).transform(DepthRandomRotate(prob=1.0).transform(scene()))
    assert "intrinsics" not in PackDepthInputs().transform(turned)["data_samples"]


def test_mmsegs_flip_and_resize_treat_depth():
    results = RandomFlip(prob=1.0).transform(scene())
    np.testing.assert_array_equal(results["gt_depth_map"], scene()["gt_depth_map"][:, ::-1])
    sample = PackDepthInputs().transform(results)["data_samples"]
    assert sample.flip
    assert "intrinsics" not in sample  # rather none than wrong ones
    results = Resize(scale=(320, 240)).transform(scene())
    assert set(np.unique(results["gt_depth_map"])) <= set(np.unique(scene()["gt_depth_map"]))
    assert "intrinsics" not in PackDepthInputs().transform(results)["data_samples"]
    for step in (DepthCrop(box=(0, 0, 16, 8)), DepthRandomCrop((8, 16))):
        flipped = step.transform(RandomFlip(prob=1.0).transform(scene()))
        assert "intrinsics" not in PackDepthInputs().transform(flipped)["data_samples"]
        cut = step.transform(RandomCrop(crop_size=(20, 30)).transform(scene()))
        assert "intrinsics" not in PackDepthInputs().transform(cut)["data_samples"]


def test_packing():
    packed = PackDepthInputs().transform(scene(24, 32, depth_path="d.png", max_depth=10))
    sample = packed["data_samples"]
    assert packed["inputs"].shape == (3, 24, 32)
    assert packed["inputs"].dtype == torch.uint8
    assert packed["inputs"][0, 5, 0] == 5
    assert sample.gt_depth_map.data.shape == (1, 24, 32)
    assert sample.gt_depth_map.data.dtype == torch.float32
    assert (sample.depth_path, sample.max_depth, sample.flip) == ("d.png", 10, False)
    assert sample.intrinsics == scene()["intrinsics"]
    packed = PackDepthInputs().transform({"img": scene()["img"], "ori_shape": (480, 640)})
    assert "gt_depth_map" not in packed["data_samples"]


def batch(*sizes):
    packed = [PackDepthInputs().transform(scene(*size)) for size in sizes]
    return {key: [one[key] for one in packed] for key in ("inputs", "data_samples")}


def test_padded_depth_is_missing():
    preprocessor = MODELS.build(
        dict(type="DepthPreprocessor", mean=[10, 20, 30], std=[1, 2, 4], pad_size_divisor=14, pad_val=-9)
    )
    out = preprocessor(batch((24, 32), (20, 40)), training=True)
    assert out["inputs"].shape == (2, 3, 28, 42)
    assert (out["inputs"][0, :, 24:] == -9).all()
    for i, (height, width) in enumerate(((24, 32), (20, 40))):
        sample = out["data_samples"][i]
        depth = sample.gt_depth_map.data
        assert depth.shape == (1, 28, 42)
        assert depth[:, :height, :width].all()
        assert depth.count_nonzero() == height * width  # 0 elsewhere, not 255
        assert sample.padding_size == (0, 42 - width, 0, 28 - height)
        assert (sample.img_shape, sample.pad_shape) == ((height, width), (28, 42))
    image = torch.from_numpy(scene(24, 32)["img"][..., ::-1].copy()).permute(2, 0, 1)  # R, G, B
    expected = (image - torch.tensor([10.0, 20, 30])[:, None, None]) / torch.tensor([1.0, 2, 4])[:, None, None]
    torch.testing.assert_close(out["inputs"][0, :, :24, :32], expected)


def test_evaluation_keeps_the_truth_as_it_is():
    out = DepthPreprocessor(mean=[0] * 3, std=[1] * 3)(batch((24, 32), (20, 40)))
    assert out["inputs"].shape == (2, 3, 24, 40)
    assert [tuple(s.gt_depth_map.shape) for s in out["data_samples"]] == [(24, 32), (20, 40)]
    assert out["data_samples"][1].padding_size == (0, 0, 0, 4)
    only_images = DepthPreprocessor(mean=[0] * 3, std=[1] * 3)(dict(inputs=batch((24, 32))["inputs"]))
    assert only_images["data_samples"] is None


def test_training_needs_depth_of_the_images_size():
    preprocessor = DepthPreprocessor(mean=[0] * 3, std=[1] * 3)
    data = batch((24, 32))
    data["data_samples"][0].gt_depth_map = PixelData(data=torch.ones(1, 20, 32))
    with pytest.raises(ConfigError, match=r"a\.jpg reaches the model as 24x32 and its depth map as 20x32"):
        preprocessor(data, training=True)
    del data["data_samples"][0].gt_depth_map
    with pytest.raises(ConfigError, match="has no gt_depth_map; the pipeline needs LoadDepth"):
        preprocessor(data, training=True)


def test_training_pipeline_of_nyuv2_on_real_images(shared):
    folder = shared / "data/depth/nyuv2_raw_basement"
    steps = [
        LoadCheckedImage(), LoadDepth(), DepthCrop(box=(43, 45, 608, 472)), DepthRandomRotate(), DepthRandomFlip(),
        DepthRandomCrop((416, 544)), DepthColorAug(), PackDepthInputs(),
    ]  # fmt: skip
    for seed in range(4):
        np.random.seed(seed)
        results = dict(
            img_path=str(folder / "rgb/00050.jpg"), depth_path=str(folder / "depth/00050.png"), depth_scale=1000,
            max_depth=10.0, min_depth=1e-3,
        )  # fmt: skip
        for step in steps:
            results = step(results)
        depth = results["data_samples"].gt_depth_map.data
        assert results["inputs"].shape == (3, 416, 544)
        assert depth.shape == (1, 416, 544)
        assert 0.02 < (depth == 0).float().mean() < 0.5
        assert 0.5 < depth[depth > 0].min()
        assert depth.max() <= 10
