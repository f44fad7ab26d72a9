"""Two discs that move, as a set in DAVIS' layout."""

import cv2
import numpy as np
from PIL import Image

from pe_spatial.tracking.vos.masks import write_mask

TINY = dict(img_size=64, patch_size=16, embed_dim=32, depth=4, num_heads=2)
SIZE = (96, 128)


def moving(count=5, size=SIZE):
    """Yield images of two discs that move over noise, and the mask of each."""
    noise = np.random.default_rng(0).integers(0, 90, (*size, 3), dtype=np.uint8)
    for t in range(count):
        mask = np.zeros(size, np.uint8)
        cv2.circle(mask, (30 + 4 * t, 48), 20, 2, -1)
        cv2.circle(mask, (size[1] - 25, 70 - 4 * t), 16, 1, -1)
        colors = np.array([[0, 0, 0], [200, 30, 30], [20, 220, 90]], np.uint8)
        yield f"{t:05d}", np.where(mask[..., None] > 0, colors[mask], noise), mask


def write_davis(root, names=("cat", "dog"), count=5, size=SIZE):
    for name in names:
        for frame, rgb, mask in moving(count, size):
            (root / "JPEGImages" / "480p" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rgb).save(root / "JPEGImages" / "480p" / name / f"{frame}.jpg", quality=95)
            write_mask(root / "Annotations" / "480p" / name / f"{frame}.png", mask)
    (root / "ImageSets" / "2017").mkdir(parents=True, exist_ok=True)
    (root / "ImageSets" / "2017" / "val.txt").write_text("".join(f"{name}\n" for name in names))
    return root
