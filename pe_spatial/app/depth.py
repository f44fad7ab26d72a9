"""The tab that predicts depth: an image in; a slider between the photo and its depth, and a point cloud out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.app.models import Models
from pe_spatial.atomic import write_file
from pe_spatial.depth.outputs import depth_range
from pe_spatial.depth.pointcloud import encode_ply, exif_camera, guessed_camera
from pe_spatial.errors import DatasetError
from pe_spatial.predict.results import DepthMap


@dataclass(frozen=True, eq=False)
class Measured:
    """An image and its depth."""

    path: Path
    rgb: np.ndarray
    depth: DepthMap

    def show(self) -> tuple[tuple[np.ndarray, np.ndarray], str]:
        """Return the image and its depth as colors, and the range of the depth."""
        near, far = depth_range(self.depth.depth, (2, 98)) or (0.0, 0.0)
        unit = "m" if self.depth.quantity == "meter" else f"({self.depth.quantity})"
        return (self.rgb, self.depth.draw(self.rgb)), f"{near:.2f} to {far:.2f} {unit}, red is near"

    def write_points(self, fov: float, path: Path) -> str:
        """Write a PLY file; return its number of points and the camera: EXIF's, or one of `fov` degrees."""
        if self.depth.quantity != "meter":
            raise DatasetError(f"this model predicts {self.depth.quantity}, and points need meters; give another model")
        size = self.depth.image_size
        camera = exif_camera(self.path, size) or guessed_camera(size, fov)
        data, count = encode_ply(self.depth.depth, self.rgb, camera, ["depth along z in meters"])
        write_file(path, data)
        return f"{count} points, {camera}"


def measure(models: Models, path: str | None) -> Measured:
    """Predict the depth of an upload; DatasetError if it is not usable."""
    rgb = models.read_image(path)
    return Measured(Path(str(path)), rgb, models.predictors["depth"](rgb))


def build_depth(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job
    from pe_spatial.app.widgets import download, ready, upload, write_once

    measured = gr.State()
    with gr.Row():
        with gr.Column(scale=1):
            file = upload("Image", "depth-file")
            text = gr.Markdown(elem_id="depth-range")
            fov = gr.Slider(20, 120, value=60, step=1, label="Field of view in degrees, if EXIF has none")
            export = gr.Button("Write point cloud", elem_id="depth-export")
            camera = gr.Markdown(elem_id="depth-camera")
            result = download("PLY", "depth-ply")
        with gr.Column(scale=3):
            slider = gr.ImageSlider(label="Photo and depth", interactive=False, format="png", elem_id="depth-slider")
            pair = write_once(slider)

    def predict(path: str | None) -> Any:
        result = measure(models, path)
        return (result, *result.show())

    def write(result: Measured | None, degrees: float) -> Any:
        result = result or measure(models, None)
        path = models.new_file(f"{result.path.stem}.ply")
        camera_text = result.write_points(degrees, path)
        return ready(path), camera_text

    job(file.upload, predict, [file], [measured, pair, text])
    job(export.click, write, [measured, fov], [result, camera])
