"""The tabs that show features: one encoder's layers with the similarity to a clicked patch, and two side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from torch import Tensor

from pe_spatial.app.models import Models
from pe_spatial.features.extract import FeatureExtractor
from pe_spatial.features.patches import similarity
from pe_spatial.features.phrases import PhraseMaps
from pe_spatial.features.sheet import heat, marked
from pe_spatial.features.show import Colors
from pe_spatial.language.model import PECore

Point = tuple[float, float]
_SIDE = 640
"""Longer side of the images shown, in pixels."""


@dataclass(frozen=True, eq=False)
class Seen:
    """An image and the maps of all layers of an encoder, with their colors."""

    name: str
    rgb: np.ndarray
    extractor: FeatureExtractor
    maps: tuple[Tensor, ...]
    colors: list[np.ndarray]

    @classmethod
    def look(cls, models: Models, encoder: str, path: str | None) -> "Seen":
        """Encode an upload; DatasetError if it is not usable."""
        rgb, extractor = models.read_image(path), models.encoders[encoder]
        name = Path(str(path)).name
        maps = extractor.maps(rgb, name)
        return cls(name, rgb, extractor, maps, Colors([maps], "images")(maps))

    def photo(self, point: Point | None) -> np.ndarray:
        """Return the image in the size of all images shown, with a ring around the point."""
        image = self._resized(self.rgb, Image.Resampling.BICUBIC)
        scale = max(image.shape) / max(self.rgb.shape)
        return image if point is None else marked(image, (point[0] * scale, point[1] * scale))

    def pixel(self, clicked: Sequence[int]) -> Point:
        """Return the pixel of the image (x, y) that was clicked in an image shown."""
        height, width = self.rgb.shape[:2]
        scale = max(height, width) / _SIDE
        return min(clicked[0] * scale, width - 1), min(clicked[1] * scale, height - 1)

    def pca(self, layer: int) -> np.ndarray:
        """Return the principal components of a layer as colors, in the form of the image."""
        return self._resized(self.colors[layer], Image.Resampling.NEAREST)

    def similar(self, layer: int, point: Point | None) -> np.ndarray | None:
        """Return the similarity of all patches to the one at (x, y), None without a point."""
        if point is None:
            return None
        patch = self.extractor.patch_at(point, self.rgb, self.name)
        values = heat(similarity(self.maps[layer][0], patch), cv2.COLORMAP_VIRIDIS)
        return self._resized(values, Image.Resampling.NEAREST)

    def phrase(self, core: PECore, text: str) -> np.ndarray | None:
        """Return where a text is, by a PE-Core: the similarity of all patches as colors; None for an empty text."""
        if not text.strip():
            return None
        values = PhraseMaps(core, [text]).maps(self.rgb, self.name)[0]
        return self._resized(heat(values, cv2.COLORMAP_VIRIDIS), Image.Resampling.NEAREST)

    def _resized(self, image: np.ndarray, method: Image.Resampling) -> np.ndarray:
        height, width = self.rgb.shape[:2]
        scale = _SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        return np.asarray(Image.fromarray(image).resize(size, method))


def layers_of(models: Models, encoder: str) -> int:
    """Return the number of layers of an encoder."""
    return len(models.encoders[encoder].layers)


def choose_layer(models: Models, name: str, index: int) -> tuple[Any, Any]:
    """Add a choice of the encoder, at first the one at `index` or the last, and a slider of its layers."""
    import gradio as gr

    names = list(models.encoders)
    chosen = names[min(index, len(names) - 1)]
    encoder = gr.Dropdown(names, value=chosen, label="Encoder", elem_id=f"{name}-encoder")
    last = layers_of(models, chosen) - 1
    start = last if len(names) > 1 or index else last // 2
    layer = gr.Slider(0, last, value=start, step=1, label="Layer", elem_id=f"{name}-layer")
    return encoder, layer


def layer_slider(models: Models, encoder: str) -> Any:
    """Return what the slider becomes for another encoder."""
    import gradio as gr

    last = layers_of(models, encoder) - 1
    return gr.Slider(0, last, value=last)


def build_features(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job, view
    from pe_spatial.app.widgets import image_view, upload

    seen, point = gr.State(), gr.State()
    with gr.Row():
        with gr.Column(scale=1):
            file = upload("Image", "features-file")
            encoder, layer = choose_layer(models, "features", 0)
        with gr.Column(scale=4), gr.Row():
            photo = image_view("Photo: click a patch", "features-photo")
            pca = image_view("Principal components", "features-pca")
            heatmap = image_view("Similarity to the patch", "features-similarity")

    def look(path: str | None, name: str, number: int) -> Any:
        result = Seen.look(models, name, path)
        number = min(number, len(result.maps) - 1)
        return result, None, result.photo(None), result.pca(number), None

    def show(result: Seen | None, at: Point | None, number: int) -> Any:
        return (None, None) if result is None else (result.pca(number), result.similar(number, at))

    def click(result: Seen | None, number: int, event: gr.SelectData) -> Any:
        result = result or Seen.look(models, next(iter(models.encoders)), None)
        at = result.pixel(event.index)
        return at, result.photo(at), result.similar(number, at)

    outputs = [seen, point, photo, pca, heatmap]
    uploaded = job(file.upload, look, [file, encoder, layer], outputs)
    changed = view(encoder.input, lambda name: layer_slider(models, name), [encoder], [layer])
    job(
        changed.success, lambda path, *rest: look(path, *rest) if path else (None,) * 5, [file, encoder, layer], outputs
    )
    view(layer.input, show, [seen, point, layer], [pca, heatmap])
    view(photo.select, click, [seen, layer], [point, photo, heatmap])
    core = models.words
    if core is not None:
        with gr.Row():
            text = gr.Textbox(label="Phrase, such as: a red cone", elem_id="features-phrase", scale=1)
            with gr.Column(scale=4):
                where = image_view("Similarity to the phrase", "features-where")

        def find(result: Seen | None, phrase: str) -> Any:
            return None if result is None else result.phrase(core, phrase)

        for event in (text.submit, uploaded.success):
            job(event, find, [seen, text], [where])
