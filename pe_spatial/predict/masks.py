"""The mask of an object as the part of the image that it covers, which is small, and its other forms."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class MaskCrop(NamedTuple):
    """A mask (H, W) inside its bounding box: `pixels` (h, w) bool, with the top left one at `x`, `y` of the image.

    An empty mask has no pixels.
    """

    x: int
    y: int
    pixels: np.ndarray

    @classmethod
    def cut(cls, mask: np.ndarray, x: int = 0, y: int = 0) -> MaskCrop:
        """Cut (H, W) bool out of the part of an image that begins at `x`, `y`."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not rows.size:
            return cls(x, y, np.zeros((0, 0), bool))
        top, left = int(rows[0]), int(columns[0])
        pixels = mask[top : rows[-1] + 1, left : columns[-1] + 1].astype(bool)
        return cls(x + left, y + top, pixels)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """The bounding box x0, y0, x1, y1; x1 and y1 are exclusive."""
        h, w = self.pixels.shape
        return self.x, self.y, self.x + w, self.y + h

    def full(self, size: tuple[int, int]) -> np.ndarray:
        """Return (H, W) bool."""
        mask = np.zeros(size, bool)
        x0, y0, x1, y1 = self.box
        mask[y0:y1, x0:x1] = self.pixels
        return mask

    def rle(self, size: tuple[int, int]) -> dict[str, Any]:
        """Return COCO's run lengths of the mask in an image (H, W), compressed, without writing it out."""
        from pycocotools import mask as run_lengths

        height, width = size
        edges = np.diff(np.pad(self.pixels.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # (w, h + 1)
        columns, rows = edges.nonzero()
        places, times = np.unique((columns + self.x) * height + rows + self.y, return_counts=True)
        # a run that reaches the bottom of the image and one that begins at the next top are one
        ends = np.concatenate(([0], places[times == 1], [height * width]))
        counts = np.diff(ends)
        if len(counts) > 1 and counts[-1] == 0:
            counts = counts[:-1]
        rle = run_lengths.frPyObjects(dict(counts=counts.tolist(), size=[height, width]), height, width)
        return dict(size=[height, width], counts=rle["counts"].decode())
