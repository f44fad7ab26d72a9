"""Reading of images of any mode and orientation, with errors that name the file."""

import importlib
import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError, features
from PIL.Image import Transpose

from pe_spatial.errors import DatasetError

MAX_PIXELS = 2**30
"""The largest image that is decoded, as in OpenCV."""

_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}
_HEIC = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHER_FILES = (  # first bytes, what the file is, what to do
    (b"\x00\x00\x00\x0cJXL ", "a JPEG XL image", "Convert it to JPEG or PNG"),
    (b"\xff\x0a", "a JPEG XL image", "Convert it to JPEG or PNG"),
    (b"%PDF", "a PDF document", "Convert it to JPEG or PNG"),
    (b"<svg", "an SVG drawing", "Convert it to PNG"),
    (b"<!doctype html", "an HTML page instead of an image", "The download failed; download it again"),
    (b"<html", "an HTML page instead of an image", "The download failed; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer instead of an image", "Run git lfs pull in its repository"),
)


def read_bytes(path: str | Path) -> bytes:
    """Read a file; DatasetError if that fails."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise not_opened(path, error) from error


def not_opened(path: str | Path, error: Exception) -> DatasetError:
    """Return the error of a file that cannot be opened, or whose header cannot be read."""
    reason = getattr(error, "strerror", None)
    return DatasetError(f"cannot open {path} ({reason}); check the path" if reason else f"cannot open {path}: {error}")


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a file with `decode_rgb`; DatasetError if it cannot be opened or decoded."""
    return decode_rgb(read_bytes(path), str(path))


def decode_rgb(
    data: bytes, path: str, *, size: tuple[int, int] | None = None, writable: bool = True
) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, rotated according to EXIF; DatasetError names `path` if that fails.

    `writable=False` saves a copy.

    If `size` (height, width) matches the stored image but not the rotated one, the annotations refer to the stored one,
    and it is not rotated. If it matches both, the image is rotated, as in MMDetection.
    """
    try:
        with open_image(data) as stored:
            stored.load()
            image: Any = turn_upright(stored)
            if size is not None and image.size != size[::-1] == stored.size:
                image = stored
            return to_rgb(image, writable=writable)
    except MemoryError:
        raise  # not the image's fault
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path} is {_describe(data)}") from error
    except Exception as error:
        # PIL's plugins raise almost anything on broken data: OSError, SyntaxError, ValueError, struct.error, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"{path} cannot be decoded ({reason}). Replace it or remove it from the dataset") from error


def to_rgb(image: Image.Image, *, writable: bool = True) -> np.ndarray:
    """Convert an image of any mode to (H, W, 3) uint8 RGB; ValueError for pixels without a defined range.

    `writable=False` saves a copy.
    """
    if image.mode.startswith("I"):  # 16 bits (PIL's own conversion would clip them at 255)
        if image.getextrema()[1] > 65535:  # type: ignore[operator]
            raise ValueError("pixels of 32 bits have no defined range")
        gray = np.round(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
        image = Image.fromarray(gray)
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    image = image if image.mode == "RGB" else image.convert("RGB")
    return np.array(image) if writable else np.asarray(image)


def read_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) of an image, upright, from its header; DatasetError if it cannot be opened."""
    try:
        with open_image(path) as image:
            turned = exif_turn(image) in (_TURNS[5], _TURNS[6], _TURNS[7], _TURNS[8])
            return image.size if turned else image.size[::-1]
    except UnidentifiedImageError as error:
        raise DatasetError(f"{path} is {_describe(read_bytes(path))}") from error
    except Exception as error:
        raise not_opened(path, error) from error


@contextmanager
def open_image(source: bytes | str | Path, **options: Any) -> Iterator[Image.Image]:
    """Open an image as PIL does, but up to `MAX_PIXELS`: PIL itself refuses aerial images of 179 megapixels.

    HEIC is read where pillow-heif is installed. `options` are those of `Image.open`.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        if isinstance(source, bytes) and source[8:12] in _HEIC:
            with suppress(ImportError):
                importlib.import_module("pillow_heif").register_heif_opener()
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, **options) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width}x{image.height} pixels, and at most {MAX_PIXELS} are read; cut it into parts"
                )
            yield image
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def turn_upright(image: Image.Image) -> Image.Image:
    """Rotate or mirror an image as EXIF's orientation says."""
    turn = exif_turn(image)
    return image if turn is None else image.transpose(turn)


def exif_turn(image: Image.Image) -> Transpose | None:
    """Return what EXIF's orientation asks for; all other tags are ignored, malformed ones too."""
    orientation = None
    with suppress(Exception):  # PIL raises almost anything on broken tags, and some versions stop at the first of them
        orientation = image.getexif().get(_ORIENTATION)
    if orientation is None:
        with suppress(struct.error, KeyError):
            orientation = _stored_orientation(image.info.get("exif") or b"")
    return _TURNS.get(orientation)  # type: ignore[arg-type]


def _stored_orientation(tags: bytes) -> int | None:
    """Return the orientation in the first directory of EXIF's bytes; struct.error or KeyError if they are none."""
    tags = tags.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}[tags[:2]]
    (start,) = struct.unpack_from(f"{order}L", tags, 4)
    (count,) = struct.unpack_from(f"{order}H", tags, start)
    entries = (struct.unpack_from(f"{order}HHLH", tags, start + 2 + 12 * i) for i in range(count))
    return next((value for tag, kind, _, value in entries if (tag, kind) == (_ORIENTATION, 3)), None)  # 3: short


def short_side_size(height: int, width: int, *, short_side: int, max_long_side: float) -> tuple[int, int]:
    """Return height and width for a short side of `short_side`, or less where the long side would exceed its limit.

    The long side is truncated, so it may be a pixel or two below the limit, and above it for thin images
    (perception_models@3e352cc:apps/detection/DETA_pe/datasets/transforms.py).
    """
    small, large = min(height, width), max(height, width)
    if large / small * short_side > max_long_side:
        short_side = round(max_long_side * small / large)
    if small == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Return where tiles start along a side: evenly spaced, from one end to the other."""
    if side <= tile:
        return [0]
    count = -(-(side - overlap) // (tile - overlap))
    return np.linspace(0, side - tile, count).round().astype(int).tolist()


@cache
def image_suffixes() -> tuple[str, ...]:
    """Return the suffixes of images that are read here, by what Pillow was built with."""
    suffixes = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".tga")
    heic = (".heic", ".heif") if find_spec("pillow_heif") else ()
    return (*suffixes, ".jp2", *((".avif",) if features.check("avif") else ()), *heic)


def is_hidden(path: Path, folder: Path) -> bool:
    """Return whether a path below `folder` is hidden: ._a.jpg of macOS, .ipynb_checkpoints/a.jpg."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _describe(data: bytes) -> str:
    """Say what a file is that PIL does not read, and what to do about it."""
    if data[4:8] == b"ftyp":
        if b"avif" in data[8:64]:
            return "an AVIF image. Install a Pillow that reads AVIF (11.3 or later), or convert it to JPEG or PNG"
        if data[8:12] in _HEIC:
            return "a HEIC image. Install pillow-heif, with which it is read, or convert it to JPEG or PNG"
        return "a video instead of an image. Extract its frames, or remove it from the dataset"
    start = data[:64].lstrip().lower()
    for first_bytes, kind, remedy in _OTHER_FILES:
        if start.startswith(first_bytes.lower()):
            return f"{kind}. {remedy}"
    return f"not a readable image ({len(data)} bytes). Replace it or remove it from the dataset"


def bilinear_weights(size: int, out: int, *, antialias: bool = False) -> np.ndarray:
    """Return the matrix (out, size) float64 of a bilinear resize of one side, as torch's with align_corners off.

    `antialias` widens the filter when `out` is smaller, as Pillow does.
    """
    scale = size / out
    centers = (np.arange(out) + 0.5) * scale - 0.5
    if antialias:
        weights = np.maximum(1 - np.abs(np.arange(size) - centers[:, None]) / max(scale, 1.0), 0.0)
        return weights / weights.sum(1, keepdims=True)
    return np.maximum(1 - np.abs(np.arange(size) - centers.clip(0, size - 1)[:, None]), 0.0)
