"""Object masks: index masks (PNGs with object ids as pixels), or one folder of binary PNGs for each object."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError
from pe_spatial.images import open_image, read_bytes

VOID = 255
"""The id in index masks for pixels that belong neither to an object nor to the background."""

_COLOR_TYPES = {0: "gray", 2: "RGB", 3: "palette", 4: "gray with alpha", 6: "RGBA"}  # byte 25 of a PNG


# (256, 3) uint8 RGB, of PASCAL VOC and DAVIS: bits 0, 3, 6 of the index become the highest bits of red, bits 1, 4, 7
# of green, bits 2, 5 of blue
PALETTE = np.zeros((256, 3), np.uint8)
for _bit in range(8):
    PALETTE[:, _bit % 3] |= ((np.arange(256) >> _bit & 1) << 7 - _bit // 3).astype(np.uint8)
PALETTE.setflags(write=False)


def read_mask(path: str | Path) -> np.ndarray:
    """Read an index mask as `read_mask_and_kind` does, (H, W) uint8."""
    return read_mask_and_kind(path)[0]


def read_mask_and_kind(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a PNG with object ids as pixels: (H, W) uint8, and whether it has a palette.

    Without a palette the gray values (8 bits or 1) are the ids. Everything else raises DatasetError: an RGB image has
    lost its ids, and so has gray of 2, 4 or 16 bits once a reader has scaled it to 8.
    """
    data = read_bytes(path)
    if not data.startswith(b"\x89PNG\r\n\x1a\n") or len(data) < 26:
        raise DatasetError(f"{path} is not a PNG; masks are PNGs with object ids as pixels (mode P or 8-bit gray)")
    bits, color = data[24], _COLOR_TYPES.get(data[25], "unknown")
    if color != "palette" and (color, bits) not in {("gray", 1), ("gray", 8)}:
        raise DatasetError(f"{path} is a {bits}-bit {color} image, not an index mask; write palette or 8-bit gray PNGs")
    try:
        with open_image(data, formats=["PNG"]) as image:
            return np.array(image, dtype=np.uint8), color == "palette"
    except MemoryError:
        raise  # says nothing about the file
    except Exception as error:  # PIL's plugins raise almost anything on broken data
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DatasetError(f"{path} cannot be decoded ({reason}); write or download it again") from error


def read_prompt_mask(path: str | Path) -> np.ndarray:
    """Read an index mask (H, W) uint8 in which objects begin; DatasetError for a gray mask with smooth edges.

    Each gray value of such an edge would be an object. They are told by 255 in most of the mask, or by many values that
    have hardly a pixel between pixels of the same value.
    """
    mask, has_palette = read_mask_and_kind(path)
    ids = split_masks(mask)
    if not has_palette and ids:
        inner = mask[1:-1, 1:-1]
        flat = np.all([inner == x for x in (mask[2:, 1:-1], mask[:-2, 1:-1], mask[1:-1, 2:], mask[1:-1, :-2])], axis=0)
        thin = len(ids.keys() - set(np.unique(inner[flat]).tolist()))
        if (len(ids) > 8 and 2 * thin > len(ids)) or 2 * np.sum(mask == VOID) > np.count_nonzero(mask):
            raise DatasetError(
                f"{path} has {len(ids)} gray values between 0 and 255, so it looks like a smoothed (anti-aliased) mask "
                "of one object; threshold it to 0 and 255, or write object ids with a palette"
            )
    return mask


def is_binary(index: np.ndarray) -> bool:
    """Return whether a mask holds 0 and 255 alone, as in DAVIS 2016: then 255 is an object and not void."""
    return np.unique(index).tolist() == [0, VOID]


def split_masks(index: np.ndarray, *, binary: bool = False) -> dict[int, np.ndarray]:
    """Split an index mask (H, W) uint8 into object id -> (H, W) bool, without background and void.

    In a `binary` mask 255 is object 1.
    """
    if binary:
        return {1: index == VOID} if VOID in index else {}
    ids = np.flatnonzero(np.bincount(index.ravel(), minlength=VOID + 1)).tolist()
    return {i: index == i for i in ids if 0 < i < VOID}


def join_masks(masks: Mapping[int, np.ndarray], size: tuple[int, ...]) -> np.ndarray:
    """Join object id -> (H, W) bool into an index mask (H, W) uint8; where masks overlap, the last one wins."""
    index = np.zeros(size, np.uint8)
    for i, mask in masks.items():
        if not 0 < i < VOID:
            raise ValueError(f"object id {i} does not fit into an index mask; ids are 1 to {VOID - 1}")
        index[mask] = i
    return index


def object_id(folder: Path) -> int:
    """Return the number of an object in SA-V's layout from the name of its folder."""
    if not folder.name.isdecimal():
        raise DatasetError(f"{folder} is not named by a number; SA-V's layout is <video>/<number>/<frame>.png")
    return int(folder.name)


def read_binary_mask(path: str | Path) -> np.ndarray:
    """Read the mask of one object, (H, W) bool: the nonzero pixels; DatasetError if they have several values."""
    mask = read_mask(path)
    binary, highest = mask > 0, mask.max(initial=0)
    if np.count_nonzero(binary) != np.count_nonzero(mask == highest) and highest:
        raise DatasetError(f"{path} holds several ids, but its folder belongs to one object; give binary masks")
    return binary


def read_object_masks(video: str | Path, frame: str) -> dict[int, np.ndarray]:
    """Read the masks of one frame from SA-V's layout, <video>/<object>/<frame>.png: object id -> (H, W) bool.

    The masks may overlap. Objects without a file for this frame are omitted.
    """
    return {object_id(path.parent): read_binary_mask(path) for path in sorted(Path(video).glob(f"[!.]*/{frame}.png"))}


def write_mask(path: str | Path, mask: np.ndarray) -> None:
    """Write object ids (H, W) uint8 as a PNG with `PALETTE`; the file appears complete or not at all."""
    if mask.ndim != 2 or mask.dtype != np.uint8:
        raise ValueError(f"a mask must be (H, W) uint8, got {mask.shape} {mask.dtype}")
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    with atomic_write(path) as unfinished:
        image.save(unfinished, format="PNG")
