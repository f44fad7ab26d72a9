"""Images and videos beside the features of their layers."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from torch import Tensor

from pe_spatial.features.extract import FeatureExtractor
from pe_spatial.features.pca import Basis, shared_over_layers, smooth
from pe_spatial.features.sheet import Strip, draw_strips, heat, marked

KINDS = ("pca", "similarity", "attention")
SHARED = ("images", "layers", "none")
Named = tuple[str, np.ndarray]  # name, (H, W, 3) uint8 RGB


@dataclass(frozen=True)
class Look:
    """What to show of each layer.

    Attributes:
        kinds: of `KINDS`. 'similarity' needs a point.
        point: (x, y) in pixels of the image, of the patch that is compared; without one, attention is that of the
            class token.
        shared: images whose colors are comparable: 'images' has one basis for each layer over all images, 'layers' one
            over all layers and images, 'none' one for each map.
        columns: images in a row.
        width: of an image, in pixels.
    """

    kinds: Sequence[str] = ("pca",)
    point: tuple[float, float] | None = None
    shared: str = "images"
    columns: int = 8
    width: int = 240


class Colors:
    """The bases that turn the maps of each layer into colors, fitted to some images.

    Args:
        maps: for each image the maps (1, C, h, w) of all layers.
        shared: as in `Look`.
    """

    def __init__(self, maps: Sequence[Sequence[Tensor]], shared: str) -> None:
        layers = [[smooth(m) for m in layer] for layer in zip(*maps, strict=True)]
        if shared == "layers":
            self._bases: list[Basis | None] = [*shared_over_layers(layers)]
        else:
            self._bases = [Basis.fit(layer) if shared == "images" else None for layer in layers]

    def __call__(self, maps: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the maps of an image as colors (h, w, 3)."""
        pairs = zip(self._bases, map(smooth, maps), strict=True)
        return [(basis or Basis.fit([m])).colors(m)[0].cpu().numpy() for basis, m in pairs]


def draw_images(extractor: FeatureExtractor, images: Sequence[Named], look: Look) -> np.ndarray:
    """Return a sheet (H, W, 3) uint8 RGB of images, each beside what `look` shows of the extractor's layers."""
    seen = [_look(extractor, image, look) for image in images]
    colors = Colors([maps for maps, _ in seen], look.shared)
    return _draw(extractor, zip(images, seen, strict=True), look, colors)


def draw_frames(
    extractor: FeatureExtractor, video: Iterable[Named], look: Look, colors: Colors
) -> Iterator[np.ndarray]:
    """Yield a sheet for each frame of a video, with one basis for all frames."""
    for frame in video:
        yield _draw(extractor, [(frame, _look(extractor, frame, look))], look, colors)


Seen = tuple[tuple[Tensor, ...], dict[str, list[Tensor]]]


def _look(extractor: FeatureExtractor, image: Named, look: Look) -> Seen:
    name, rgb = image
    return extractor.looks(rgb, name, point=look.point, attention="attention" in look.kinds)


def _draw(extractor: FeatureExtractor, images: Iterable[tuple[Named, Seen]], look: Look, colors: Colors) -> np.ndarray:
    strips = []
    for (name, rgb), (maps, found) in images:
        original = (f"{rgb.shape[1]}x{rgb.shape[0]}", rgb if look.point is None else marked(rgb, look.point))
        for kind in look.kinds:
            if kind == "pca":
                drawn = colors(maps)
            elif kind == "similarity":
                drawn = [heat(values, cv2.COLORMAP_VIRIDIS) for values in found[kind]]
            else:
                drawn = [heat(values.sqrt(), cv2.COLORMAP_INFERNO) for values in found[kind]]
            captions = [f"layer {layer}" for layer in extractor.layers]
            cells = [original, *zip(captions, drawn, strict=True)]
            strips.append(Strip(f"{name}: {_title(kind, look)}", cells))
    return draw_strips(strips, columns=look.columns, width=look.width)


def _title(kind: str, look: Look) -> str:
    if kind == "pca":
        over = {"images": "one basis for each layer", "layers": "one basis for all layers", "none": "each map alone"}
        return f"PCA, {over[look.shared]}"
    whose = "the class token" if look.point is None else f"the patch at {look.point[0]:g},{look.point[1]:g}"
    if kind == "similarity":
        return f"cosine similarity to {whose}"
    return f"attention of {whose}, square root of the mean of the heads"
