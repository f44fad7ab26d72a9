"""Masks as files: what is read, what is refused, what is written."""

import numpy as np
import pytest
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.tracking.vos.masks import (
    PALETTE,
    join_masks,
    read_binary_mask,
    read_mask,
    read_mask_and_kind,
    read_object_masks,
    split_masks,
    write_mask,
)

IDS = np.arange(256, dtype=np.uint8).reshape(8, 32)


def test_what_is_written_is_read_and_has_the_palette_of_the_data_sets(tmp_path, golden):
    write_mask(tmp_path / "video" / "00000.png", IDS)
    ids, has_palette = read_mask_and_kind(tmp_path / "video" / "00000.png")
    assert has_palette
    assert ids.dtype == np.uint8
    np.testing.assert_array_equal(ids, IDS)
    davis = Image.open(golden / "jandf/davis/Annotations/480p/drift-touch/00000.png").getpalette()
    np.testing.assert_array_equal(PALETTE, np.reshape(davis, (256, 3)))
    assert Image.open(tmp_path / "video" / "00000.png").getpalette() == davis
    assert [path.name for path in (tmp_path / "video").iterdir()] == ["00000.png"]


@pytest.mark.parametrize("mask", [IDS.astype(np.int64), IDS[None], IDS > 3])
def test_only_ids_are_written(tmp_path, mask):
    with pytest.raises(ValueError, match=r"\(H, W\) uint8"):
        write_mask(tmp_path / "a.png", mask)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file_alone(tmp_path, monkeypatch):
    write_mask(tmp_path / "a.png", IDS)
    before = (tmp_path / "a.png").read_bytes()

    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="disk full"):
        write_mask(tmp_path / "a.png", IDS * 0)
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_gray_values_are_ids_where_there_is_no_palette(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "gray.png")
    ids, has_palette = read_mask_and_kind(tmp_path / "gray.png")
    assert not has_palette
    np.testing.assert_array_equal(ids, IDS)
    Image.fromarray(IDS > 100).save(tmp_path / "one_bit.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "one_bit.png"), IDS > 100)


def test_palettes_of_few_bits_hold_ids(tmp_path):
    """Tools that shrink PNGs write them; the data of YouTube-VOS have such files."""
    image = Image.fromarray(IDS % 4)
    image.putpalette(PALETTE[:4].tobytes())
    image.save(tmp_path / "a.png", bits=2)
    assert (tmp_path / "a.png").read_bytes()[24] == 2
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), IDS % 4)


@pytest.mark.parametrize(
    ("mode", "words"), [("RGB", "8-bit RGB"), ("RGBA", "RGBA"), ("LA", "alpha"), ("I;16", "16-bit gray")]
)
def test_images_without_ids_are_refused(tmp_path, mode, words):
    Image.new(mode, (4, 3)).save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=rf"a\.png .*{words}.* palette") as caught:
        read_mask(tmp_path / "a.png")
    assert "\n" not in str(caught.value)


def test_gray_of_few_bits_is_refused_because_readers_stretch_it(tmp_path):
    Image.fromarray(IDS).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[24] = 4
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DatasetError, match="4-bit gray"):
        read_mask(tmp_path / "a.png")


def test_broken_files_are_named(tmp_path):
    with pytest.raises(DatasetError, match=r"cannot open .*absent\.png"):
        read_mask(tmp_path / "absent.png")
    Image.new("RGB", (4, 3)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / "jpeg.png")
    with pytest.raises(DatasetError, match=r"jpeg\.png is not a PNG"):
        read_mask(tmp_path / "jpeg.png")
    rng = np.random.default_rng(0)
    write_mask(tmp_path / "cut.png", rng.integers(0, 255, (64, 64), dtype=np.uint8))
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:2000])
    with pytest.raises(DatasetError, match=r"cut\.png cannot be decoded"):
        read_mask(tmp_path / "cut.png")


def test_objects_in_folders_may_overlap_and_come_and_go(tmp_path):
    masks = {"000": IDS > 10, "001": IDS > 90, "007": IDS < 50}
    for name, mask in masks.items():
        write_mask(tmp_path / name / "00004.png", mask.astype(np.uint8) * (255 if name == "000" else 1))
    write_mask(tmp_path / "001" / "00008.png", np.zeros_like(IDS))
    read = read_object_masks(tmp_path, "00004")
    assert list(read) == [0, 1, 7]
    for name, mask in masks.items():
        assert read[int(name)].dtype == bool
        np.testing.assert_array_equal(read[int(name)], mask)
    assert {i: mask.sum() for i, mask in read_object_masks(tmp_path, "00008").items()} == {1: 0}


def test_a_mask_of_one_object_has_two_values(tmp_path):
    write_mask(tmp_path / "a.png", IDS % 3)
    with pytest.raises(DatasetError, match=r"a\.png holds several ids"):
        read_binary_mask(tmp_path / "a.png")


def test_masks_are_joined_and_split():
    a, b = np.zeros((2, 4, 6), bool)
    a[:2], b[1:3] = True, True
    index = join_masks({7: a, 2: b}, a.shape)
    assert index.tolist() == [[7] * 6, [2] * 6, [2] * 6, [0] * 6]
    index[3] = 255
    masks = split_masks(index)
    assert list(masks) == [2, 7]
    assert np.array_equal(masks[2], b)
    assert np.array_equal(masks[7], a & ~b)
    with pytest.raises(ValueError, match="object id 255 does not fit"):
        join_masks({255: a}, a.shape)


def test_masks_above_the_limit_of_pil_are_read(tmp_path, monkeypatch):
    write_mask(tmp_path / "a.png", np.full((20, 30), 3, np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert (read_mask(tmp_path / "a.png") == 3).all()
