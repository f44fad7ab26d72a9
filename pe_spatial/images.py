"""Images as they lie about: any mode, any orientation, broken ones named."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from pe_spatial.errors import DatasetError


def read_rgb(path: str | Path) -> np.ndarray:
    """Read a file as `decode_rgb` does; DatasetError if it cannot be opened or decoded."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise DatasetError(f"cannot open {path}: {error}") from error
    return decode_rgb(data, str(path))


def decode_rgb(data: bytes, path: str, *, size: tuple[int, int] | None = None) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, turned as its EXIF says; DatasetError names `path` if that fails.

    If `size` (height, width) is that of the image as stored and not as turned, boxes refer to it as stored: it is not
    turned. Where both are of one size, it is turned, as MMDetection does.
    """
    try:
        image = Image.open(io.BytesIO(data))
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
        raise DatasetError(f"{path} is no image (or empty); restore the file or remove it from the set") from error
    except Exception as error:
        # PIL's plugins raise almost anything on broken data: OSError, SyntaxError, ValueError, struct.error, ...
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(
            f"{path} cannot be decoded ({reason}); restore the file or remove it from the set"
        ) from error
