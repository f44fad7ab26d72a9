"""Images as users have them: turned by EXIF, very large, in formats that are not read, not images at all."""

import io
import struct
import sys
import types
import zlib

import numpy as np
import pytest
from PIL import Image

from pe_spatial.errors import DatasetError
from pe_spatial.images import bilinear_weights, decode_rgb, read_rgb

RAMP = np.arange(20 * 30, dtype=np.uint32).reshape(20, 30)
PIXELS = np.stack([RAMP % 256, RAMP // 3 % 256, RAMP // 256 * 100], axis=2).astype(np.uint8)
TURNED = {  # EXIF orientation -> how a viewer shows the stored pixels
    1: PIXELS,
    2: PIXELS[:, ::-1],
    3: PIXELS[::-1, ::-1],
    4: PIXELS[::-1],
    5: PIXELS.swapaxes(0, 1),
    6: np.rot90(PIXELS, -1),
    7: np.rot90(PIXELS, 2).swapaxes(0, 1),
    8: np.rot90(PIXELS, 1),
}


def exif(orientation, extra=()):
    """EXIF with the orientation and further entries (tag, type, count, four bytes)."""
    entries = [(0x0112, 3, 1, struct.pack("<HH", orientation, 0)), *extra]
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in sorted(entries))
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0)


def png(tags=None, pixels=PIXELS):
    """A PNG with raw EXIF bytes."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    data = file.getvalue()
    if tags is None:
        return data
    chunk = b"eXIf" + tags
    return data[:33] + struct.pack(">I", len(tags)) + chunk + struct.pack(">I", zlib.crc32(chunk)) + data[33:]


def jpeg(tags):
    """A JPEG of 20 x 30 (height x width) with raw EXIF bytes."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, format="JPEG")
    tags = b"Exif\0\0" + tags
    return file.getvalue()[:2] + b"\xff\xe1" + struct.pack(">H", len(tags) + 2) + tags + file.getvalue()[2:]


@pytest.mark.parametrize("orientation", TURNED)
def test_pixels_are_turned_by_the_tag(orientation):
    assert np.array_equal(decode_rgb(png(exif(orientation)), "a.png"), TURNED[orientation])


MALFORMED = {
    "signed short": (282, 8, 1, struct.pack("<HH", 65535, 0)),
    "resolution as text": (282, 2, 3, b"72\0\0"),
    "rational outside the file": (282, 5, 2, struct.pack("<I", 9999)),
    "text outside the file": (270, 2, 40, struct.pack("<I", 9999)),
    "unknown type": (282, 77, 1, b"\1\0\0\0"),
    "GPS outside the file": (34853, 4, 1, struct.pack("<I", 99999)),
    "negative time": (306, 9, 1, struct.pack("<i", -5)),
}


@pytest.mark.parametrize("tag", MALFORMED.values(), ids=MALFORMED)
@pytest.mark.parametrize("form", ["png", "jpeg"])
def test_malformed_other_tags_do_not_matter(tag, form):
    image = decode_rgb({"png": png, "jpeg": jpeg}[form](exif(6, [tag])), "phone.jpg")
    assert image.shape == (30, 20, 3)
    if form == "png":
        assert np.array_equal(image, TURNED[6])


@pytest.mark.parametrize("tags", [b"", b"hello world 123", b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0", exif(0), exif(77)])
def test_exif_without_an_orientation_turns_nothing(tags):
    assert decode_rgb(jpeg(tags), "a.jpg").shape == (20, 30, 3)


def test_annotations_of_the_stored_image_keep_it_unturned():
    assert decode_rgb(png(exif(6)), "a.png", size=(20, 30)).shape == (20, 30, 3)
    assert decode_rgb(png(exif(6)), "a.png", size=(30, 20)).shape == (30, 20, 3)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "I;16"])
def test_images_above_the_limit_of_pil_are_read(monkeypatch, tmp_path, mode, recwarn):
    """PIL refuses more than 179 megapixels, and warns from 89; here it is told so of an image of 600 pixels."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    image = Image.fromarray(RAMP.astype(np.uint16)) if mode == "I;16" else Image.fromarray(PIXELS).convert(mode)
    image.save(tmp_path / "aerial.png")
    assert read_rgb(tmp_path / "aerial.png").shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    assert not recwarn.list


def test_more_than_a_gigapixel_is_refused_before_it_is_decoded():
    data = bytearray(png())
    data[16:24] = struct.pack(">II", 40000, 40000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(DatasetError, match=r"slide\.png cannot be decoded \(40000x40000 pixels, and at most .* cut it"):
        decode_rgb(bytes(data), "slide.png")


FOREIGN = {
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), "pillow-heif"),
    "HEIC of iOS sequences": (b"\0\0\0\x18ftypmsf1\0\0\0\0hevc" + bytes(100), "pillow-heif"),
    "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "[Cc]onvert it"),
    "JPEG XL codestream": (b"\xff\x0a" + bytes(100), "JPEG XL.*[Cc]onvert it"),
    "HTML": (b"<!DOCTYPE html><html><body>404", "HTML.*download"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "git lfs pull"),
    "PDF": (b"%PDF-1.7\n" + bytes(100), "[Cc]onvert it"),
    "a video": (b"\0\0\0\x20ftypisom\0\0\0\0" + bytes(100), "video"),
}


@pytest.mark.parametrize(("data", "remedy"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_other_files_are_named_with_what_to_do(data, remedy, name):
    with pytest.raises(DatasetError, match=rf"^{name} is .*{remedy}"):
        decode_rgb(data, name)


def test_an_empty_file_says_so():
    with pytest.raises(DatasetError, match=r"a\.jpg is not a readable image \(0 bytes\)"):
        decode_rgb(b"", "a.jpg")


def test_heic_is_read_where_pillow_heif_is_installed(monkeypatch):
    def register_heif_opener():
        Image.register_open("HEIC", lambda *_: Image.new("RGB", (30, 20)), lambda start: start[4:12] == b"ftypheic")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    assert decode_rgb(FOREIGN["HEIC"][0], "phone.heic").shape == (20, 30, 3)


def test_avif_is_read_or_named(tmp_path):
    from PIL import features

    if not features.check("avif"):
        with pytest.raises(DatasetError, match=r"AVIF.*Pillow"):
            decode_rgb(b"\0\0\0\x18ftypavif\0\0\0\0mif1" + bytes(100), "a.avif")
        return
    Image.fromarray(PIXELS).save(tmp_path / "a.avif")
    assert read_rgb(tmp_path / "a.avif").shape == (20, 30, 3)


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(("size", "out"), [(7, 7), (64, 16), (16, 61), (61, 16), (5, 3), (1, 4), (480, 128)])
def test_bilinear_weights_resize_as_torch_does(size, out, antialias):
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(0).random((size, 9))
    options = dict(size=(out, 9), mode="bilinear", align_corners=False, antialias=antialias)
    expected = torch.nn.functional.interpolate(torch.from_numpy(image)[None, None], **options)[0, 0]
    np.testing.assert_allclose(bilinear_weights(size, out, antialias=antialias) @ image, expected, atol=1e-12)
