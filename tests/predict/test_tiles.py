"""Large images in tiles: each object once, wherever the seams are, and memory that does not grow with the image."""

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("mmdet")
from helpers.blobs import draw_blobs, write_blobs

import pe_spatial
from pe_spatial.encoder.vit import PerceptionEncoder
from pe_spatial.errors import ConfigError
from pe_spatial.predict.tiles import tile_unit

pytestmark = pytest.mark.mmdet


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    return pe_spatial.load(write_blobs(tmp_path_factory.mktemp("blobs")))


def scene(seed=0, side=150):
    """Boxes (x0, y0, x1, y1, label) that do not touch each other."""
    rng = np.random.default_rng(seed)
    boxes = []
    for y in range(5, side - 45, 48):
        for x in range(5, side - 45, 48):
            w, h = rng.integers(8, 40, 2)
            dx, dy = rng.integers(0, 45 - w), rng.integers(0, 45 - h)
            boxes.append((x + dx, y + dy, x + dx + w, y + dy + h, rng.integers(0, 2)))
    return boxes


def as_set(result):
    return {(*map(int, box), int(label)) for box, label in zip(result.boxes, result.labels, strict=True)}


@pytest.mark.parametrize(("tile", "overlap"), [(128, 64), (192, 48), (256, None), (1024, None)])
def test_copies_of_a_scene_give_the_detections_of_each(predictor, tile, overlap):
    one = scene()
    rgb = np.tile(draw_blobs((150, 150), one), (4, 4, 1))
    expected = {(x0 + dx, y0 + dy, x1 + dx, y1 + dy, label) for x0, y0, x1, y1, label in one
                for dx in range(0, 600, 150) for dy in range(0, 600, 150)}  # fmt: skip
    result = predictor.tiled(rgb, tile=tile, overlap=overlap, batch_size=3)
    assert len(result) == len(expected) == 16 * len(one)
    assert as_set(result) == expected
    assert (np.diff(result.scores) <= 0).all()
    complete = predictor(rgb)
    assert as_set(complete) == expected
    masks = {tuple(box): mask for box, mask in zip(complete.boxes.tolist(), complete.masks, strict=True)}
    assert all((mask == masks[tuple(box)]).all() for box, mask in zip(result.boxes.tolist(), result.masks, strict=True))


def test_objects_of_one_tile_do_not_suppress_each_other(predictor):
    """The model has decided that; the red frame and the red dot within overlap."""
    rgb = draw_blobs((100, 200), [(10, 10, 60, 60, 0)])
    rgb[13:57, 13:57] = 90
    rgb[16:54, 16:54] = (230, 20, 20)
    rgb[40, 150] = (20, 20, 230)
    assert as_set(predictor.tiled(rgb, tile=128, overlap=64)) == {
        (10, 10, 60, 60, 0), (16, 16, 54, 54, 0), (150, 40, 151, 41, 1)}  # fmt: skip


def test_an_object_larger_than_the_overlap_is_complete_where_a_tile_shows_it(predictor):
    rgb = draw_blobs((64, 320), [(100, 10, 190, 50, 0)])
    assert as_set(predictor.tiled(rgb, tile=192, overlap=64)) == {(100, 10, 190, 50, 0)}


def test_memory_does_not_depend_on_the_image(predictor):
    """Beyond the image itself, which is there before."""
    peaks = []
    for side in (700, 2800):
        rgb = draw_blobs((side, side), [(100, 100, 150, 150, 0)])
        tracemalloc.start()
        predictor.tiled(rgb, tile=256, overlap=64)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 0.05 * 3 * (2800**2 - 700**2)  # of the bytes of the images
    assert {size[2:] for size in predictor.model.sizes[-20:]} == {(256, 256)}


def test_tiles_are_multiples_of_attention_windows(predictor):
    rgb = draw_blobs((300, 300), [])
    with pytest.raises(ConfigError, match="the tile is 100; the model's attention windows have 64 pixels, so give 128"):
        predictor.tiled(rgb, tile=100)
    with pytest.raises(ConfigError, match="the overlap is 128; tiles of 128 pixels allow 0 to 127"):
        predictor.tiled(rgb, tile=128, overlap=128)
    assert len(predictor.tiled(rgb)) == 0  # 1024 pixels, as nothing resizes them
    options = dict(img_size=64, patch_size=16, embed_dim=32, depth=2, num_heads=2)
    config = pe_spatial.EncoderConfig(**options)
    assert tile_unit(PerceptionEncoder(config, window_size=4, global_attn_indexes=(1,))) == 64
    assert tile_unit(PerceptionEncoder(config)) == 16
