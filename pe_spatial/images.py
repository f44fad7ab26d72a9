"""Reading of images of any mode and orientation, with errors that name the file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pe_spatial.errors import DatasetError


def read_bytes(path: str | Path) -> bytes:
    """Read a file; DatasetError if that fails."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot open {path}: {error}") from error


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a file with `decode_rgb`; DatasetError if it cannot be opened or decoded."""
    return decode_rgb(read_bytes(path), str(path))


def decode_rgb(data: bytes, path: str, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, rotated according to EXIF; DatasetError names `path` if that fails.

    If `size` (height, width) matches the stored image but not the rotated one, the annotations refer to the stored one,
    and it is not rotated. If it matches both, the image is rotated, as in MMDetection.
    """
    try:
        image: Any = Image.open(io.BytesIO(data))
        image.load()
        stored, image = image, ImageOps.exif_transpose(image)
        if size is not None and image.size != size[::-1] == stored.size:
            image = stored
        if image.mode.startswith("I"):  # 16 bits (PIL's own conversion would clip them at 255)
            if image.getextrema()[1] > 65535:
                raise ValueError("pixels of 32 bits have no defined range")
            gray = np.round(np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8)
            image = Image.fromarray(gray)
        elif image.mode == "F":
            raise ValueError("floating-point pixels have no defined range")
        return np.array(image.convert("RGB"))  # a copy: asarray would be read-only
    except MemoryError:
        raise  # not the image's fault
    except UnidentifiedImageError as error:
        raise DatasetError(
            f"{path} is not a readable image ({len(data)} bytes). Replace it or remove it from the dataset"
        ) from error
    except Exception as error:
        # PIL's plugins raise almost anything on broken data: OSError, SyntaxError, ValueError, struct.error, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"{path} cannot be decoded ({reason}). Replace it or remove it from the dataset") from error
