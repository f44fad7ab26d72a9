"""The tab that detects objects: an image in; boxes, masks and COCO JSON out, above a score that a slider sets."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.app.models import Models
from pe_spatial.atomic import write_file
from pe_spatial.predict.results import Detections


@dataclass(frozen=True, eq=False)
class Found:
    """An image and all its detections."""

    name: str
    rgb: np.ndarray
    detections: Detections

    def show(self, score: float) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Return the image with the detections of at least a score, and what they are."""
        shown = self.detections.filter(score=score)
        rows = [
            dict(name=name, score=round(float(value), 3), box=[round(float(x), 1) for x in box])
            for name, value, box in zip(shown.names, shown.scores, shown.boxes, strict=True)
        ]
        return shown.draw(self.rgb), rows

    def write_json(self, score: float, path: Path) -> None:
        """Write COCO results of one image, with the names of the categories."""
        shown = self.detections.filter(score=score)
        categories = [dict(id=i, name=name) for i, name in enumerate(shown.class_names, 1)]
        height, width = shown.image_size
        image = dict(id=0, file_name=self.name, width=width, height=height)
        write_file(path, json.dumps(dict(images=[image], categories=categories, annotations=shown.to_coco())))


def detect(models: Models, path: str | None) -> Found:
    """Detect objects in an upload; DatasetError if it is not usable."""
    rgb = models.read_image(path)
    return Found(Path(str(path)).name, rgb, models.predictors["detection"](rgb))


def build_detect(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job, view
    from pe_spatial.app.widgets import download, image_view, ready, upload

    found = gr.State()
    with gr.Row():
        with gr.Column(scale=1):
            file = upload("Image", "detect-file")
            score = gr.Slider(0, 1, value=0.3, step=0.01, label="Lowest score", elem_id="detect-score")
            export = gr.Button("Write JSON", elem_id="detect-export")
            result = download("COCO JSON", "detect-json")
        with gr.Column(scale=3):
            image = image_view("Detections", "detect-image")
            rows = gr.JSON(label="Objects", elem_id="detect-rows", max_height=300)

    def show(result: Found | None, value: float) -> Any:
        return (None, None) if result is None else result.show(value)

    def write(result: Found | None, value: float) -> Any:
        path = models.new_file(f"{Path(result.name).stem if result else 'nothing'}.json")
        (result or detect(models, None)).write_json(value, path)
        return ready(path)

    job(file.upload, lambda path: detect(models, path), [file], [found]).success(
        show, [found, score], [image, rows], queue=False, show_progress="hidden"
    )
    view(score.input, show, [found, score], [image, rows])
    job(export.click, write, [found, score], [result])
