"""The tab that compares two encoders or two layers: principal components and similarity to a clicked patch."""

from typing import Any

from pe_spatial.app.features import Point, Seen, choose_layer, layer_slider
from pe_spatial.app.models import Models


class Comparison:
    """An image as two encoders see it; the same one is run once."""

    def __init__(self, models: Models, path: str | None, left: str, right: str) -> None:
        seen = {name: Seen.look(models, name, path) for name in dict.fromkeys((left, right))}
        self.sides = (seen[left], seen[right])
        self.point: Point | None = None

    def show(self, left: int, right: int) -> tuple[Any, ...]:
        """Return the photo, both principal components and both similarities."""
        pairs = list(zip(self.sides, (left, right), strict=True))
        pca = [seen.pca(min(layer, len(seen.maps) - 1)) for seen, layer in pairs]
        similar = [seen.similar(min(layer, len(seen.maps) - 1), self.point) for seen, layer in pairs]
        return (self.sides[0].photo(self.point), *pca, *similar)


def build_compare(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job, view
    from pe_spatial.app.widgets import image_view, upload

    state = gr.State()
    controls, images = [], []
    with gr.Row():
        with gr.Column():
            file = upload("Image", "compare-file")
            photo = image_view("Photo: click a patch", "compare-photo")
        for index, side in enumerate(("left", "right")):
            with gr.Column():
                controls.append(choose_layer(models, f"compare-{side}", index))
                images.append([
                    image_view(label, f"compare-{side}-{kind}")
                    for label, kind in (("Principal components", "pca"), ("Similarity", "similarity"))
                ])  # fmt: skip
    (left, left_layer), (right, right_layer) = controls
    outputs = [photo, images[0][0], images[1][0], images[0][1], images[1][1]]

    def look(path: str | None, first: str, second: str, *layers: int) -> Any:
        result = Comparison(models, path, first, second)
        return (result, *result.show(*layers))

    def show(result: Comparison | None, *layers: int) -> Any:
        return (None,) * 5 if result is None else result.show(*layers)

    def click(result: Comparison | None, first: int, second: int, event: gr.SelectData) -> Any:
        if result is not None:
            result.point = result.sides[0].pixel(event.index)
        return show(result, first, second)

    inputs = [file, left, right, left_layer, right_layer]
    job(file.upload, look, inputs, [state, *outputs])
    for encoder, layer in controls:
        changed = view(encoder.input, lambda name: layer_slider(models, name), [encoder], [layer])
        job(changed.success, lambda path, *rest: look(path, *rest) if path else (None,) * 6, inputs, [state, *outputs])
        view(layer.input, show, [state, left_layer, right_layer], outputs)
    view(photo.select, click, [state, left_layer, right_layer], outputs)
