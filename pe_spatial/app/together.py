"""The tab of several tasks in one encode: an image or a video in; all results side by side, and what a frame costs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pe_spatial.app.models import Models
from pe_spatial.errors import DatasetError
from pe_spatial.images import image_suffixes
from pe_spatial.tracking.vos.clip import Clip
from pe_spatial.video import mp4_writer


def costs(report: dict[str, Any]) -> str:
    """Say what a frame costs, from a report of `MultiTask`."""
    heads = ", ".join(f"{task} {ms:.0f}" for task, ms in report["heads"].items())
    return (
        f"{report['frames']} frames; medians in ms: {report['encodes']:g} encodes {report['encoder']:.0f}, {heads}, "
        f"together {report['total']:.0f}; separate models about {report['separate']:.0f}"
    )


def frames_of(models: Models, path: str | None) -> Iterator[np.ndarray]:
    """Yield the image or the frames of an upload; DatasetError if it is not usable or too long."""
    file = models.checked(path, "an image or a video")
    if file.suffix.lower() in image_suffixes():
        yield models.read_image(path)
        return
    limit = models.limits.max_frames
    try:
        for number, (_, rgb) in enumerate(Clip.open(file).read()):
            if number == limit:
                raise DatasetError(
                    f"{file.name} has more than {limit} frames; cut it, or start the page with a larger --max-frames"
                )
            yield rgb
    except DatasetError as error:
        raise DatasetError(str(error).replace(f"{file.parent}/", "")) from error  # the user knows the name alone


def predict(models: Models, path: str | None) -> Iterator[np.ndarray]:
    """Yield each frame as all tasks see it, side by side; objects are tracked from the boxes of the detector."""
    model, frames = models.predictors["together"], list[np.ndarray]()  # the one that is predicted

    def note() -> Iterator[np.ndarray]:
        for rgb in frames_of(models, path):
            frames[:] = [rgb]
            yield rgb

    for results in model.stream(note()):
        yield np.hstack([results[task].draw(frames[0]) for task in model.tasks])


def build_together(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job
    from pe_spatial.app.widgets import download, image_view, ready, upload

    model = models.predictors["together"]
    with gr.Row():
        with gr.Column(scale=1):
            file = upload(f"Image, or video of at most {models.limits.max_frames} frames", "together-file")
            stop = gr.Button("Stop", elem_id="together-stop")
            text = gr.Markdown(elem_id="together-costs")
            result = download("Video (mp4)", "together-out")
        with gr.Column(scale=3):
            image = image_view(", ".join(model.tasks), "together-image")

    def run(path: str | None) -> Any:
        video = models.new_file(f"{Path(str(path)).stem}.mp4")
        with mp4_writer(video, 10) as append:
            for sheet in predict(models, path):
                append(sheet)
                yield sheet, costs(model.report()), gr.skip()
        yield gr.skip(), gr.skip(), ready(video)

    running = job(file.upload, run, [file], [image, text, result], show_progress="minimal")
    stop.click(None, cancels=[running])
