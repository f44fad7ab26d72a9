"""Depth of images: files that say what they are, colors, clouds, tiles, and the tool on good and bad input."""

import io
import json
import re
import runpy
import shutil
import struct
import sys
from itertools import pairwise

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("mmseg")
from helpers.repository import REPO, tool
from mmengine.config import Config
from mmengine.registry import MODELS

from pe_spatial.cli.arguments import import_quietly
from pe_spatial.depth.estimator import DepthEstimator
from pe_spatial.depth.inference import DepthPredictor
from pe_spatial.depth.outputs import (
    GRAY,
    add_bar,
    depth_range,
    draw_depth,
    draw_error,
    encode_png16,
)
from pe_spatial.depth.pointcloud import encode_ply, exif_camera, given_camera, guessed_camera, without_edges
from pe_spatial.encoder.files import CheckpointError
from pe_spatial.encoder.lora_files import describe_adapters, omit_base
from pe_spatial.engine.configs import config_in
from pe_spatial.engine.sources import Sources
from pe_spatial.errors import ConfigError, DatasetError
from pe_spatial.images import read_rgb, tile_starts

pytestmark = pytest.mark.mmseg
TINY = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)


def read_png(data):
    image = Image.open(io.BytesIO(data))
    return np.asarray(image), image.text


def test_png_of_16_bits_declares_its_scale_and_counts_what_does_not_fit():
    depth = np.array([[0, 1.2343, 65.535, 65.6], [np.nan, -1, np.inf, 1e-5]], np.float32)
    data, saturated = encode_png16(depth, 1000, {"depth_unit": "meter"})
    pixels, text = read_png(data)
    assert pixels.dtype == np.uint16
    assert pixels.tolist() == [[0, 1234, 65535, 65535], [0, 0, 0, 1]]  # near is not missing
    assert saturated == 1
    assert text == {"depth_scale": "1000", "depth_missing": "0", "depth_unit": "meter"}
    assert read_png(encode_png16(depth, 256, {})[0])[0][0].tolist() == [0, 316, 16777, 16794]


def test_real_depth_survives_the_png(shared):
    source = np.asarray(Image.open(shared / "data/depth/kitti/depth/0000000005.png"))
    data, saturated = encode_png16(source.astype(np.float32) / 256, 256, {})
    assert saturated == 0
    assert np.array_equal(read_png(data)[0], source)


def test_colors_run_from_end_to_end_and_missing_is_gray():
    import matplotlib

    depth = np.array([[1, 2, 3, 9, 0, np.nan, -1]], np.float32)
    image = draw_depth(depth, (1, 3), "viridis")
    colors = matplotlib.colormaps["viridis"]
    ends = [colors(x, bytes=True)[:3] for x in (0.0, 0.5, 1.0, 1.0)]
    assert image[0, :4].tolist() == [list(map(int, c)) for c in ends]
    assert image[0, 4:].tolist() == [list(GRAY)] * 3
    with pytest.raises(ConfigError, match="no colormap 'viridiss'; try viridis"):
        draw_depth(depth, (1, 3), "viridiss")
    assert draw_depth(np.full((2, 2), 2.0, np.float32), (2, 2), "viridis").shape == (2, 2, 3)


def test_range_is_of_known_pixels():
    depth = np.concatenate([np.zeros(50), [np.nan], np.arange(101)]).astype(np.float32)[None]
    assert depth_range(depth, (0, 100)) == (1, 100)
    assert depth_range(depth, (50, 100)) == (50.5, 100)
    assert depth_range(np.zeros((2, 2)), (2, 98)) is None


def test_error_is_relative_to_the_truth():
    truth = np.array([[2.0, 2, 4, 0, 2]], np.float32)
    depth = np.array([[2.0, 2.2, 2, 1, 0]], np.float32)
    image = draw_error(depth, truth).astype(int)
    red, blue = image[0, :, 0], image[0, :, 2]
    assert blue[0] > red[0] + 50  # no error
    assert abs(red[1] - blue[1]) < 10  # 0.1, the middle of the scale
    assert red[2] > blue[2] + 50  # far above 0.2
    assert image[0, 3:].tolist() == [list(GRAY)] * 2


@pytest.mark.parametrize("height", [37, 480, 1001])
def test_bar_stands_at_the_right_of_the_same_pixels(height):
    image = np.random.default_rng(0).integers(0, 256, (height, 50, 3), dtype=np.uint8)
    with_bar = add_bar(image, (1, 5), "Spectral", "depth [m]")
    assert with_bar.shape[0] == height
    assert np.array_equal(with_bar[:, :50], image)
    panel = with_bar[:, 50:].astype(int)
    column = panel[:, round(0.19 * panel.shape[1])]
    top, bottom = column[round(0.06 * height)], column[round(0.94 * height)]
    assert top[2] > top[0]  # far is blue
    assert bottom[0] > bottom[2]  # near is red


def points_of(data):
    header, _, body = data.partition(b"end_header\n")
    lines = header.decode().splitlines()
    assert lines[:2] == ["ply", "format binary_little_endian 1.0"]
    count = next(int(line.split()[2]) for line in lines if line.startswith("element vertex"))
    assert len(body) == 15 * count
    return lines, np.array([struct.unpack_from("<fff", body, 15 * i) for i in range(count)]), body


def test_cloud_projects_back_onto_its_pixels():
    rng = np.random.default_rng(0)
    depth = rng.uniform(1, 5, (6, 8)).astype(np.float32)
    depth[2, 3] = 0
    rgb = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    camera = given_camera([10, 12, 3.5, 2.25], (6, 8))
    data, count = encode_ply(depth, rgb, camera, ["unit meter"])
    lines, points, body = points_of(data)
    assert count == len(points) == 47
    v, u = np.nonzero(depth)
    x, y, z = points.T
    np.testing.assert_allclose(10 * x / z + 3.5, u, atol=1e-4)
    np.testing.assert_allclose(12 * y / z + 2.25, v, atol=1e-4)
    np.testing.assert_allclose(z, depth[v, u])
    assert [tuple(body[15 * i + 12 : 15 * i + 15]) for i in range(47)] == [tuple(c) for c in rgb[v, u]]
    assert "comment intrinsics fx 10.00 fy 12.00 cx 3.50 cy 2.25 (given)" in lines
    assert "comment unit meter" in lines
    assert lines[-7:-3] == ["element vertex 47", "property float x", "property float y", "property float z"]


def test_cameras(shared, tmp_path):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 50
    Image.new("RGB", (360, 240)).save(tmp_path / "a.jpg", exif=exif)
    camera = exif_camera(tmp_path / "a.jpg", (240, 360))
    assert camera.fx == camera.fy == pytest.approx(500)  # 36 mm are 360 px
    assert (camera.cx, camera.cy) == (179.5, 119.5)
    assert exif_camera(tmp_path / "a.jpg", (360, 240)).fx == pytest.approx(500)  # turned
    assert camera.source == "EXIF: 50 mm on 35 mm film"
    exif.get_ifd(0x8769)[0xA405] = 0  # unknown
    Image.new("RGB", (360, 240)).save(tmp_path / "b.jpg", exif=exif)
    assert exif_camera(tmp_path / "b.jpg", (240, 360)) is None
    assert exif_camera(shared / "data/depth/kitti/rgb/0000000005.png", (375, 1242)) is None
    guess = guessed_camera((480, 640), 90)
    assert guess.fx == pytest.approx(320)
    assert guess.source.startswith("GUESS")
    for values in ([500, 500, 900, 240], [0, 500, 320, 240], [500, 500, 320, -1]):
        with pytest.raises(ConfigError, match="do not fit an image of 640x480"):
            given_camera(values, (480, 640))
    with pytest.raises(ConfigError, match="field of view is 180"):
        guessed_camera((480, 640), 180)


def test_flying_pixels_go_and_surfaces_stay():
    depth = np.full((7, 9), 2.0, np.float32)
    depth[:, 5:] = 4
    depth[:, 4] = 3  # between near and far
    depth[0, 0] = 0
    cut = without_edges(depth, 1.05)
    assert (cut[1:, [3, 4, 5]] == 0).all()
    assert (cut[2:, [0, 1, 2]] == 2).all()
    assert (cut[:, [6, 7, 8]] == 4).all()
    assert cut[1, 1] == 2  # missing neighbors are no edge
    slope = np.linspace(2, 2.2, 9, dtype=np.float32)[None].repeat(5, 0)
    assert np.array_equal(without_edges(slope, 1.05), slope)
    with pytest.raises(ConfigError, match="give more than 1"):
        without_edges(depth, 1.0)


@pytest.mark.parametrize(
    ("side", "tile", "overlap"), [(100, 40, 0), (100, 40, 10), (101, 40, 39), (41, 40, 8), (30, 40, 8)]
)
def test_tiles_cover_a_side_and_overlap(side, tile, overlap):
    starts = tile_starts(side, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(side - tile, 0)
    assert all(a < b <= a + tile - overlap for a, b in pairwise(starts))


def video(path, frames=5, noise=0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    assert writer.isOpened()
    rng = np.random.default_rng(0)
    for i in range(frames):
        grain = rng.integers(0, noise + 1, (64, 96, 1), dtype=np.uint8)
        writer.write(np.full((64, 96, 3), (0, 0, 40 * i % 256), np.uint8) + grain)
    writer.release()


def test_sources(tmp_path):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("in/a.png", "in/deep/a.JPG", "in/out/b.png", "in/notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    video(tmp_path / "in" / "walk.avi")
    sources = Sources([tmp_path / "in"], exclude=tmp_path / "in" / "out")
    frames = [f"walk/{i:06d}" for i in range(5)]
    assert [image.name for image in sources] == ["a", "deep/a", *frames]
    assert [image.name for image in sources] == ["a", "deep/a", *frames]  # again
    assert len(sources) == 7
    red = [int(image.read()[..., 0].mean()) for image in sources if "walk" in image.name]
    assert red == pytest.approx([0, 40, 80, 120, 160], abs=4)
    with pytest.raises(DatasetError, match=r"in/a.png and .*deep/a.JPG would both be written as a"):
        Sources([tmp_path / "in" / "a.png", tmp_path / "in" / "deep" / "a.JPG"], exclude=tmp_path)
    with pytest.raises(DatasetError, match="there is no file or folder"):
        Sources([tmp_path / "absent"], exclude=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError, match="contains no images"):
        Sources([tmp_path / "empty"], exclude=tmp_path / "out")
    for folder in (tmp_path / "in", tmp_path / "in" / "deep"):
        with pytest.raises(DatasetError, match="is in the folder of the results"):
            Sources([folder], exclude=tmp_path / "in")
    with pytest.raises(DatasetError, match="rtsp://x/y is an address; download it"):
        Sources(["rtsp://x/y"], exclude=tmp_path / "out")


def test_patterns(tmp_path, monkeypatch):
    for name in ("in/1/a.png", "in/2/a.png", "in/2/b.jpg", "in/2/note.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name, format="PNG")
    monkeypatch.chdir(tmp_path)
    for start in ("", f"{tmp_path}/"):
        assert list(Sources([f"{start}in/*/a.png"], exclude=tmp_path / "out").files) == ["1/a", "2/a"]
    sources = Sources(["in/**"], exclude=tmp_path / "out")
    assert list(sources.files) == ["1/a", "2/a", "2/b"]
    assert sources.omitted == {".txt": 1}
    with pytest.raises(DatasetError, match=r"no file matches in/\*.gif"):
        Sources(["in/*.gif"], exclude=tmp_path / "out")


def test_hidden_files_are_skipped_and_other_formats_are_counted(tmp_path):
    names = ("a.jpg", "._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "deep/.b.jpg", "deep/c.png", "d.tga", "e.jfif")
    for name in names:
        (tmp_path / "in" / name).parent.mkdir(exist_ok=True, parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "in" / name, format="TGA" if name.endswith("tga") else "PNG")
    for name in ("f.heic", "deep/g.HEIC", "h.jxl", "notes.txt", ".DS_Store", "Thumbs.db"):
        (tmp_path / "in" / name).write_bytes(b"x")
    sources = Sources([tmp_path / "in"], exclude=tmp_path / "out")
    assert [image.name for image in sources] == ["a", "d", "deep/c", "e"]
    assert all(image.read().shape == (8, 8, 3) for image in sources)
    assert sources.omitted == {".heic": 2, ".jxl": 1, ".txt": 1, ".db": 1}


def test_a_hidden_folder_that_is_named_is_read(tmp_path):
    (tmp_path / ".cache" / "x").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / ".cache" / "x" / "a.png")
    assert [image.name for image in Sources([tmp_path / ".cache"], exclude=tmp_path / "out")] == ["x/a"]


def test_a_video_that_breaks_off_keeps_its_frames(tmp_path, caplog):
    video(tmp_path / "whole.avi", frames=12, noise=255)
    content = (tmp_path / "whole.avi").read_bytes()
    (tmp_path / "cut.avi").write_bytes(content[: len(content) // 2])
    (tmp_path / "none.mp4").write_bytes(b"no video")
    assert len(list(Sources([tmp_path / "whole.avi"], exclude=tmp_path / "out"))) == 12
    assert not caplog.messages
    images = list(Sources([tmp_path / "cut.avi"], exclude=tmp_path / "out"))
    assert 0 < len(images) < 10
    assert all(image.read().shape == (64, 96, 3) for image in images)
    assert f"cut.avi has {len(images)} frames, and its container announces 12" in caplog.text
    images = list(Sources([tmp_path / "none.mp4"], exclude=tmp_path / "out"))
    with pytest.raises(DatasetError, match="cannot open the video"):
        images[-1].read()


def test_the_camera_of_a_large_image_is_read(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA405] = 50
    Image.new("RGB", (360, 240)).save(tmp_path / "a.jpg", exif=exif)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert exif_camera(tmp_path / "a.jpg", (240, 360)).fx == pytest.approx(500)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A folder with a tiny depth model, its config, and images of every kind."""
    root = tmp_path_factory.mktemp("project")
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_lin1_nyu.py")
    cfg.model.backbone.update(variant=TINY, init_cfg=None)
    cfg.dump(root / "depth.py")
    from mmengine.registry import init_default_scope

    init_default_scope("mmseg")
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    torch.nn.init.normal_(model.decode_head.conv.weight, std=0.3)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(iter=1)), root / "depth.pth")
    rng = np.random.default_rng(0)
    (root / "in").mkdir()
    (root / "truth").mkdir()
    images = {
        "rgb.png": Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)),
        "gray.png": Image.fromarray(rng.integers(0, 256, (64, 96), dtype=np.uint8)),
        "alpha.png": Image.fromarray(rng.integers(0, 256, (50, 70, 4), dtype=np.uint8)),
        "deep16.png": Image.fromarray(rng.integers(0, 65536, (64, 96), dtype=np.uint16)),
        "palette.gif": Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).convert("P"),
    }
    for name, image in images.items():
        image.save(root / "in" / name)
    Image.fromarray(rng.integers(500, 9000, (64, 96), dtype=np.uint16)).save(root / "truth" / "rgb.png")
    return root


@pytest.fixture(scope="module")
def predictor(project):
    return DepthPredictor(Config.fromfile(project / "depth.py"), project / "depth.pth")


def test_prediction_is_that_of_the_config(project, predictor):
    rgb = read_rgb(project / "in" / "alpha.png")  # 50 x 70: no multiple of the patch
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = predictor.model.infer(x)[0, 0].numpy()
    (depth,) = predictor([rgb])
    assert depth.shape == (50, 70)
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth, expected, rtol=1e-5)
    assert depth.std() > 0.01
    assert predictor.quantity == "meter"
    again = predictor([rgb[::-1], rgb])
    np.testing.assert_allclose(again[1], depth, rtol=1e-4)
    assert np.abs(again[0] - depth).max() > 0.1


def test_adapters_get_the_base_of_their_config(project, predictor, tmp_path):
    torch.save(predictor.model.backbone.state_dict(), tmp_path / "base.pt")
    cfg = Config.fromfile(project / "depth.py")
    cfg.model.backbone.update(lora=dict(rank=2), init_cfg=dict(type="Pretrained", checkpoint=str(tmp_path / "base.pt")))
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.decode_head.load_state_dict(predictor.model.decode_head.state_dict())
    facts, state = describe_adapters(model), model.state_dict()
    omit_base(model, facts, [state])
    torch.save(dict(state_dict=state, meta=dict(iter=1, lora=facts)), tmp_path / "adapters.pth")
    rgb = read_rgb(project / "in" / "alpha.png")
    np.testing.assert_array_equal(DepthPredictor(cfg, tmp_path / "adapters.pth")([rgb]), predictor([rgb]))


def test_tiles_are_predicted_alone_and_blended(predictor):
    rgb = np.random.default_rng(1).integers(0, 256, (48, 144, 3), dtype=np.uint8)
    depth = predictor.tiled(rgb, tile=64, overlap=16, batch_size=2)  # tiles at 0, 40, 80
    tiles = [predictor([rgb[:, x : x + 64]])[0] for x in (0, 40, 80)]
    assert depth.dtype == np.float32
    np.testing.assert_allclose(depth[:, :40], tiles[0][:, :40], rtol=1e-4)
    np.testing.assert_allclose(depth[:, 64:80], tiles[1][:, 24:40], rtol=1e-4)
    both = np.stack([tiles[0][:, 40:], tiles[1][:, :24]])
    assert (depth[:, 40:64] >= both.min(0) - 1e-4).all()
    assert (depth[:, 40:64] <= both.max(0) + 1e-4).all()
    share = ((depth[:, 40:64] - both[1]) / (both[0] - both[1])).mean(0)
    # 17 at most, 24 + 1 in sum over the middle; falls from the first tile to the second
    np.testing.assert_allclose(share, [17 / 18, 17 / 19, *share[2:-2], 2 / 19, 1 / 18], atol=0.02)
    assert (np.diff(share) < 0).all()
    np.testing.assert_allclose(
        predictor.tiled(rgb, tile=64, overlap=16, batch_size=1), depth, rtol=1e-4
    )
    np.testing.assert_allclose(predictor.tiled(rgb, tile=200, overlap=16, batch_size=1), predictor([rgb])[0], rtol=1e-5)
    for overlap in (64, -1):
        with pytest.raises(ConfigError, match="tiles of 64 pixels allow 0 to 63"):
            predictor.tiled(rgb, tile=64, overlap=overlap, batch_size=1)


def test_models_without_meters_say_so(project):
    cfg = Config.fromfile(project / "depth.py")
    cfg.model.losses = [dict(type="ScaleAndShiftInvariantLoss", space="disparity"), dict(type="GradientLoss")]
    relative = DepthPredictor(cfg, project / "depth.pth")
    assert relative.quantity == "relative disparity"
    with pytest.raises(ConfigError, match="tiles of relative disparity"):
        relative.tiled(np.zeros((64, 64, 3), np.uint8), tile=32, overlap=0, batch_size=1)
    cfg.model.losses = [dict(type="ScaleAndShiftInvariantLoss", space="depth"), dict(type="SigLoss")]
    assert DepthPredictor(cfg, project / "depth.pth").quantity == "meter"


def test_wrong_models_and_weights(project, tmp_path):
    with pytest.raises(ConfigError, match="is not a config of a PEDepthEstimator"):
        DepthPredictor(Config.fromfile(REPO / "configs" / "pe_spatial_linear_ade20k.py"), project / "depth.pth")
    state = torch.load(project / "depth.pth")["state_dict"]
    state.pop("decode_head.conv.bias")
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(CheckpointError, match=r"less.pth does not fit this config: .*decode_head.conv.bias"):
        DepthPredictor(Config.fromfile(project / "depth.py"), tmp_path / "less.pth")


@pytest.fixture
def infer(project, tmp_path, monkeypatch, capsys):
    """Return a function that runs the tool in this process and returns what it prints and its exit."""
    shutil.copytree(project / "in", tmp_path / "in")
    monkeypatch.chdir(tmp_path)

    def run(*args):
        model = ("--config", project / "depth.py", "--checkpoint", project / "depth.pth")
        monkeypatch.setattr(sys, "argv", ["infer_depth.py", "in", *map(str, model), "--out", "out", *map(str, args)])
        try:
            runpy.run_path(str(REPO / "tools" / "infer_depth.py"), run_name="__main__")
            end = ""
        except SystemExit as error:
            end = str(error.code)
        return capsys.readouterr().out, end

    return run


def test_tool_writes_what_was_asked_for_and_says_what_it_is(infer, predictor, project, tmp_path):
    out, end = infer("--batch", "2", "--write", "png", "color", "ply", "--gt", project / "truth", "--scale", "5000")
    assert end == ""
    assert "5 predicted, 0 kept, 0 unreadable; unit: meter, missing pixels are 0" in out
    assert "cameras of the point clouds: 5 GUESS" in out
    assert "abs_rel" in out
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert about["unit"] == "meter"
    assert about["png_scale"] == 5000
    assert set(about["images"]) == {"rgb", "gray", "alpha", "deep16", "palette"}
    assert about["images"]["rgb"]["intrinsics"]["source"].startswith("GUESS")
    alone = predictor([read_rgb(project / "in" / "alpha.png")])[0]
    np.testing.assert_allclose(np.load(tmp_path / "out" / "alpha.npy"), alone, rtol=1e-4)  # its next is larger
    depth = np.load(tmp_path / "out" / "rgb.npy")
    assert (depth.shape, depth.dtype) == ((64, 96), np.float32)
    pixels = np.asarray(Image.open(tmp_path / "out" / "rgb_depth.png"))
    np.testing.assert_allclose(pixels / 5000, depth, atol=1e-4)
    assert Image.open(tmp_path / "out" / "rgb_depth.png").text["depth_scale"] == "5000"
    truth = np.asarray(Image.open(project / "truth" / "rgb.png")).astype(np.float32) / 1000
    assert about["images"]["rgb"]["abs_rel"] == pytest.approx(float((abs(depth - truth) / truth).mean()), rel=1e-4)
    low, high = about["colors"]["range"]
    every = [np.load(path) for path in (tmp_path / "out").glob("*.npy")] + [truth]
    assert len(every) == 6
    assert low == pytest.approx(min(np.percentile(x, 2) for x in every), rel=1e-5)
    assert high == pytest.approx(max(np.percentile(x, 98) for x in every), rel=1e-5)
    drawn = np.asarray(Image.open(tmp_path / "out" / "gray_color.png"))
    assert np.array_equal(drawn[:, :96], draw_depth(np.load(tmp_path / "out" / "gray.npy"), (low, high), "Spectral"))
    for name in ("rgb_error.png", "rgb_truth.png", "rgb.ply", "alpha.ply"):
        assert (tmp_path / "out" / name).is_file()
    assert not (tmp_path / "out" / "gray_error.png").exists()
    assert len(points_of((tmp_path / "out" / "alpha.ply").read_bytes())[1]) == 50 * 70


def test_tool_goes_on_with_what_is_missing_and_names_what_is_broken(infer, tmp_path):
    (tmp_path / "in" / "broken.png").write_bytes(b"no image")
    video(tmp_path / "in" / "walk.avi", frames=3)
    out, end = infer("--write")
    assert end == "error: 1 images could not be read (listed above); the others are finished"
    assert "8 predicted, 0 kept, 1 unreadable" in out
    kept = tmp_path / "out" / "rgb.npy"
    before = kept.stat().st_mtime_ns
    (tmp_path / "out" / "walk" / "000001.npy").unlink()
    (tmp_path / "in" / "broken.png").unlink()
    out, end = infer("--write")
    assert "1 predicted, 7 kept, 0 unreadable" in out
    assert (end, kept.stat().st_mtime_ns) == ("", before)
    assert sorted(path.name for path in (tmp_path / "out" / "walk").iterdir()) == [f"00000{i}.npy" for i in range(3)]
    _, end = infer("--write", "--tile", "48", "--overlap", "8")
    assert end == "error: out holds predictions with another tile; choose another --out, or --overwrite"
    out, end = infer("--write", "--tile", "48", "--overlap", "8", "--overwrite")
    assert "8 predicted" in out
    assert kept.stat().st_mtime_ns != before


def test_tool_counts_saturated_pixels_and_takes_a_table_and_a_range(infer, project, tmp_path):
    depth = np.full((64, 96), 200, np.uint16)
    Image.fromarray(depth).save(tmp_path / "d.png")
    (tmp_path / "pairs.csv").write_text("rgb,depth,units_per_meter\nin/rgb.png,d.png,100\n")
    infer("--write")
    far = np.where(np.arange(96) < 3, 20.0, 1.5).astype(np.float32)
    np.save(tmp_path / "out" / "rgb.npy", far[None].repeat(64, 0))
    out, end = infer("--gt", "pairs.csv", "--scale", "5000", "--range", "1", "3")
    assert end == ""
    assert "192 pixels in 1 images exceed 13.107 m" in out
    about = json.loads((tmp_path / "out" / "metadata.json").read_text())
    assert about["colors"]["range"] == [1, 3]
    assert about["images"]["rgb"]["abs_rel"] == pytest.approx((3 * 9 + 93 * 0.25) / 96)
    _, end = infer("--gt", str(project / "in"))  # images of 8 bits
    assert "too coarse for depth" in end or "one channel" in end
    (tmp_path / "elsewhere").mkdir()
    _, end = infer("--gt", "elsewhere")
    assert "has a depth map for none of the 5 images" in end
    _, end = infer("--write", "ply", "--intrinsics", "90", "90", "900", "20")
    assert "do not fit an image" in end


KNOWN = {256: "KITTI", 5000: "TUM", 100: "centimeters"}


@pytest.mark.parametrize("scale", KNOWN)
def test_ground_truth_of_another_scale_is_refused(infer, predictor, project, tmp_path, scale):
    """16-bit maps of KITTI, with the scale of millimeters that is assumed."""
    (tmp_path / "gt").mkdir()
    (depth,) = predictor([read_rgb(project / "in" / "rgb.png")])
    Image.fromarray(np.round(depth * scale).astype(np.uint16)).save(tmp_path / "gt" / "rgb.png")
    _, end = infer("--gt", "gt", "--write")
    assert re.search(rf"gt/rgb\.png.*--gt-scale {scale} .*{KNOWN[scale]}", end)
    assert "--gt-scale 1000" in end
    out, end = infer("--gt", "gt", "--write", "--gt-scale", scale)
    assert end == ""
    assert float(re.search(r"abs_rel ([\d.]+) on 1 images", out)[1]) < 0.01
    out, end = infer("--gt", "gt", "--write", "--gt-scale", "1000")
    assert end == ""
    assert float(re.search(r"abs_rel ([\d.]+) on 1 images", out)[1]) > 0.5


def test_implausible_ground_truth_is_refused_whatever_its_form(infer, tmp_path):
    (tmp_path / "gt").mkdir()
    np.save(tmp_path / "gt" / "rgb.npy", np.full((64, 96), 3000.0))
    _, end = infer("--gt", "gt", "--write")
    assert "median depth of 3000 m" in end
    Image.fromarray(np.full((64, 96), 3000, np.uint16)).save(tmp_path / "d.png")
    (tmp_path / "pairs.csv").write_text("rgb,depth,units_per_meter\nin/rgb.png,d.png,1\n")
    _, end = infer("--gt", "pairs.csv", "--write")
    assert "median depth of 3000 m" in end
    assert "units_per_meter" in end


def test_a_stopped_run_has_all_files_of_the_images_it_finished(infer, tmp_path, monkeypatch):
    done = []
    predict = DepthPredictor.__call__

    def stop_at_the_third(self, images, **options):
        if len(done) == 2:
            raise DatasetError("stopped")
        done.append(images)
        return predict(self, images, **options)

    monkeypatch.setattr(DepthPredictor, "__call__", stop_at_the_third)
    _, end = infer("--write", "png", "color", "ply")
    assert end == "error: stopped"
    for name in ("alpha", "deep16"):
        for suffix in (".npy", "_depth.png", "_color.png", ".ply"):
            assert (tmp_path / "out" / f"{name}{suffix}").is_file()
    monkeypatch.setattr(DepthPredictor, "__call__", predict)
    out, _ = infer("--write", "png", "color", "ply")
    assert "3 predicted, 2 kept" in out
    assert set(json.loads((tmp_path / "out" / "metadata.json").read_text())["images"]) == {
        "alpha", "deep16", "gray", "palette", "rgb"
    }  # fmt: skip


def with_training_size(project, path, size):
    checkpoint = torch.load(project / "depth.pth")
    checkpoint["meta"] = dict(dataset_meta=dict(image_size=size))
    torch.save(checkpoint, path)
    return path


@pytest.fixture
def seen(monkeypatch):
    """The sizes of the images that reach the model."""
    sizes = []
    infer = DepthEstimator.infer
    monkeypatch.setattr(
        DepthEstimator, "infer", lambda self, x: sizes.append(tuple(x.shape[-2:])) or infer(self, x)
    )
    return sizes


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ((), {(32, 48), (32, 45), (32, 32)}),  # of the training
        (("--size", "48"), {(48, 72), (48, 67), (48, 48)}),
        (("--size", "full"), {(64, 96), (50, 70), (40, 40)}),
        (("--tile", "64", "--overlap", "16"), {(64, 64), (50, 64), (40, 40)}),
    ],
)
def test_images_are_resized_to_the_size_of_the_training_and_back(infer, project, tmp_path, seen, options, expected):
    checkpoint = with_training_size(project, tmp_path / "sized.pth", (32, 48))
    out, end = infer("--write", "--checkpoint", checkpoint, *options)
    assert end == ""
    assert set(seen) == expected
    assert np.load(tmp_path / "out" / "alpha.npy").shape == (50, 70)
    assert ("short side of 32 px" in out) == (not options)


def test_a_resized_prediction_is_that_of_the_small_image(predictor):
    rgb = read_rgb_ramp(64, 96)
    small = cv2.resize(rgb, (48, 32), interpolation=cv2.INTER_AREA)
    expected = cv2.resize(predictor([small])[0], (96, 64), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_allclose(predictor([rgb], size=32)[0], expected, rtol=1e-4)


def read_rgb_ramp(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows, columns, rows + columns], -1).astype(np.uint8)


def test_another_size_is_another_prediction(infer):
    infer("--write", "--size", "32")
    _, end = infer("--write", "--size", "48")
    assert end == "error: out holds predictions with another size; choose another --out, or --overwrite"
    for size in ("0", "-3", "big"):
        _, end = infer("--write", "--size", size)
        assert end == "2"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--out", "/dev/null/x"), "error: /dev/null.*; check"),
        (("--device", "cuda:99"), "error: --device is cuda:99, .* give cpu"),
        (("--checkpoint", "absent.pth"), r"error: no checkpoint at absent\.pth"),
        (("--gt", "absent"), "error: absent is neither a folder nor"),
        (("--write", "png", "rgb.png"), "2"),
        (("--tile", "32", "--size", "64"), "error: --tile predicts in full resolution"),
    ],
)
def test_common_mistakes_are_one_sentence(infer, options, error):
    _, end = infer(*options)
    assert re.match(error, end)
    assert "\n" not in end


def test_imports_print_nothing(tmp_path, monkeypatch, capsys):
    """MMSegmentation prints what it cannot import."""
    (tmp_path / "noisy_package.py").write_text("print('Could not import OneDL')")
    monkeypatch.syspath_prepend(tmp_path)
    import_quietly("noisy_package")
    assert capsys.readouterr().out == ""
    assert sys.modules.pop("noisy_package")


def test_the_checkpoint_of_another_model_is_named(tmp_path):
    cfg = Config.fromfile(REPO / "configs" / "pe_spatial_linear_ade20k.py")
    torch.save(dict(state_dict=dict(a=torch.zeros(1)), meta=dict(cfg=cfg.pretty_text)), tmp_path / "detector.pth")
    with pytest.raises(ConfigError, match=r"^the config in .*detector\.pth is .* PEDepthEstimator.* LinearProbe"):
        DepthPredictor(config_in(str(tmp_path / "detector.pth")), tmp_path / "detector.pth")


@pytest.mark.slow
def test_tool_as_a_user_runs_it(project, tmp_path):
    options = ("--config", project / "depth.py", "--checkpoint", project / "depth.pth", "--out", tmp_path / "out")
    log = tool("infer_depth", project / "in", *options, cwd=tmp_path)
    assert "5 predicted" in log
    assert (tmp_path / "out" / "rgb_color.png").is_file()
