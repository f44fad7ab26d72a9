"""The tab that labels a video: scrub, click, correct, accept, export; what was clicked survives the server."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import numpy as np

from pe_spatial.app.models import Models
from pe_spatial.app.track import BESIDE, ON
from pe_spatial.atomic import atomic_write
from pe_spatial.errors import DatasetError
from pe_spatial.labeling.export import WRITERS
from pe_spatial.labeling.journal import NAME
from pe_spatial.labeling.project import DEFAULT_CLASS, LabelProject
from pe_spatial.tracking.sam2.session import Click

KEYS = {"a": "accept", "n": "next", "u": "undo", "t": "go", "ArrowLeft": "back", "ArrowRight": "forward"}
"""Key -> the button that it presses while the tab is shown and nothing is written."""
SCRIPT = """<script>document.addEventListener('keydown', (event) => {
  const button = document.getElementById('label-' + KEYS[event.key]);
  const writing = event.target.matches('input:not([type=range]):not([type=radio]), textarea');
  if (!button || !button.offsetParent || writing || event.ctrlKey || event.metaKey) return;
  event.preventDefault();
  button.click();
});</script>""".replace("KEYS", str(KEYS))


def known(models: Models) -> list[str]:
    """Return the names of the projects whose video is there too."""
    return sorted(path.parent.name for path in models.labels.glob(f"*/{NAME}") if any(path.parent.glob("source/[!.]*")))


def open_upload(models: Models, path: str | None) -> LabelProject:
    """Open the project of an uploaded video, an existing one if it has the same name; keep the video in it."""
    video = models.checked(path, "a video")
    project = _open(models, models.labels / video.stem, video)
    with atomic_write(project.folder / "source" / video.name) as unfinished:
        shutil.copyfile(video, unfinished)
    return project


def open_known(models: Models, name: str | None) -> LabelProject:
    """Open an existing project; DatasetError for a name that is none."""
    if name not in known(models):
        raise DatasetError(f"there is no project {name!r}; upload a video")
    folder = models.labels / str(name)
    return _open(models, folder, next(folder.glob("source/[!.]*")))


def _open(models: Models, folder: Path, video: Path) -> LabelProject:
    tracker = models.predictors["tracking"].start()
    try:
        return LabelProject(folder, video, tracker, max_frames=models.limits.max_frames)
    except DatasetError as error:
        raise DatasetError(str(error).replace(f"{video.parent}/", "")) from error  # the user knows the name alone


def needed(project: LabelProject | None) -> LabelProject:
    """Return the project; DatasetError if there is none."""
    if project is None:
        raise DatasetError("there is no video; upload one, or continue a project")
    return project


def status(project: LabelProject, frame: int) -> str:
    """Say how far the video is labeled, and what is known of a frame."""
    classes = project.journal.classes
    names = ", ".join(f"{i} {classes.get(i, DEFAULT_CLASS)}" for i in project.session.objects) or "none yet"
    sure = project.session.confidence.get(frame, {}) if frame < project.session.tracked else {}
    doubt = ", ".join(f"{i}: {value:.0%}" for i, value in sorted(sure.items()))
    return (
        f"{project.session.tracked} of {len(project)} frames have masks, {len(project.journal.accepted)} accepted; "
        f"objects: {names}" + (f"; confidence on frame {frame}: {doubt}" if doubt else "")
    )


def click(project: LabelProject, frame: int, made: Click, name: str) -> Iterator[int]:
    """Track up to a frame, click there, name the object, and yield the frames whose masks are new."""
    yield from project.prompt(frame, made)
    if made.object_id not in project.journal.classes:
        project.name(made.object_id, name or DEFAULT_CLASS)


def worst(project: LabelProject) -> int:
    """Return the frame most worth a look; DatasetError if there is none left."""
    found = project.keyframes(1)
    if not found:
        raise DatasetError("there is no frame to check; track first, or all were accepted")
    return found[0].frame


def write(models: Models, project: LabelProject, forms: list[str]) -> Path:
    """Write the labels into the project's folder, and return a zip of them; DatasetError without a form."""
    if not forms:
        raise DatasetError(f"no form is chosen; choose {', '.join(WRITERS)}")
    project.export(forms)
    path = models.new_file(f"{project.session.video.name}.zip")
    with atomic_write(path) as unfinished, ZipFile(unfinished, "w") as archive:
        for name in (NAME, "review.png", *forms):
            for file in sorted([project.folder / name, *(project.folder / name).rglob("*")]):
                archive.write(file, file.relative_to(project.folder))
    return path


def build_label(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job, view
    from pe_spatial.app.widgets import download, image_view, ready, upload

    state = gr.State(delete_callback=lambda project: project and project.session.close())
    with gr.Row():
        with gr.Column(scale=1):
            file = upload(f"Video, at most {models.limits.max_frames} frames", "label-file")
            again = gr.Dropdown(known(models), value=None, label="Or continue", elem_id="label-known")
            with gr.Row():
                number = gr.Number(1, label="Object", precision=0, minimum=1, maximum=254, elem_id="label-object")
                kind = gr.Textbox(DEFAULT_CLASS, label="Its class", elem_id="label-class")
            what = gr.Radio([ON, BESIDE], value=ON, label="A click is", elem_id="label-kind")
            with gr.Row():
                undo = gr.Button("Undo click (u)", elem_id="label-undo")
                accept = gr.Button("Accept frame (a)", elem_id="label-accept")
            with gr.Row():
                go = gr.Button("Track to the end (t)", variant="primary", elem_id="label-go")
                stop = gr.Button("Stop", elem_id="label-stop")
            check = gr.Button("Next frame to check (n)", elem_id="label-next")
            forms = gr.CheckboxGroup([*WRITERS], value=["coco"], label="Forms", elem_id="label-forms")
            export = gr.Button("Export", elem_id="label-export")
            result = download("Labels (zip)", "label-out")
        with gr.Column(scale=3):
            image = image_view("Click on objects", "label-image")
            with gr.Row():
                back = gr.Button("Back (left key)", elem_id="label-back")
                forward = gr.Button("Forward (right key)", elem_id="label-forward")
            frame = gr.Slider(0, 1, value=0, step=1, label="Frame", elem_id="label-frame")
            text = gr.Markdown(elem_id="label-status")

    def shown(project: LabelProject, t: int) -> tuple[np.ndarray, int, str]:
        t = min(max(t, 0), len(project) - 1)
        return project.session.draw(t), t, status(project, t)

    def opened(project: LabelProject) -> Any:
        slider = gr.Slider(0, max(1, len(project) - 1), value=0)
        return project, project.session.draw(0), slider, status(project, 0)

    def clicked(project: Any, t: int, i: int, name: str, how: str, event: gr.SelectData) -> Any:
        made = Click(i, float(event.index[0]), float(event.index[1]), how == ON)
        for done in click(needed(project), min(t, len(project) - 1), made, name):
            yield shown(project, done)
        yield shown(project, project.session.tracked - 1)

    def tracked(project: Any) -> Any:
        for done in needed(project).track():
            yield shown(project, done)

    def undone(project: Any) -> Any:
        for _ in needed(project).undo():
            yield shown(project, project.session.tracked - 1)
        yield shown(project, project.session.tracked - 1)

    def accepted(project: Any, t: int) -> Any:
        needed(project).accept(t)
        return shown(project, t)

    def moved(project: Any, t: int) -> Any:
        return (None, t, "") if project is None else shown(project, t)

    views = [image, frame, text]
    job(file.upload, lambda path: opened(open_upload(models, path)), [file], [state, *views])
    job(again.input, lambda name: opened(open_known(models, name)), [again], [state, *views])
    view(again.focus, lambda: gr.Dropdown(known(models)), None, [again])
    running = [
        job(image.select, clicked, [state, frame, number, kind, what], views, show_progress="minimal"),
        job(go.click, tracked, [state], views, show_progress="minimal"),
        job(undo.click, undone, [state], views, show_progress="minimal"),
    ]
    stop.click(None, cancels=running)
    job(accept.click, accepted, [state, frame], views)
    job(check.click, lambda project: shown(needed(project), worst(project)), [state], views)
    job(export.click, lambda project, chosen: ready(write(models, needed(project), chosen)), [state, forms], [result])
    view(frame.input, moved, [state, frame], views)
    view(back.click, lambda project, t: moved(project, t - 1), [state, frame], views)
    view(forward.click, lambda project, t: moved(project, t + 1), [state, frame], views)
