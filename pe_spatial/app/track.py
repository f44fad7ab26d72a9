"""The tab that tracks objects: a video, clicks on any frame, masks that arrive one by one, corrections, downloads."""

from collections.abc import Iterator
from typing import Any

from pe_spatial.app.models import Models
from pe_spatial.errors import DatasetError
from pe_spatial.tracking.sam2.session import Click, ClickSession

ON, BESIDE = "on the object", "beside it"


def open_video(models: Models, path: str | None) -> ClickSession:
    """Open an uploaded video; DatasetError if it is not usable or too long."""
    video = models.checked(path, "a video")
    try:
        return ClickSession(models.predictors["tracking"].start(), video, max_frames=models.limits.max_frames)
    except DatasetError as error:
        raise DatasetError(str(error).replace(f"{video.parent}/", "")) from error  # the user knows the name alone


def status(session: ClickSession) -> str:
    """Say how far the video is tracked."""
    objects = f"objects {', '.join(map(str, session.objects))}" if session.objects else "no object yet"
    return f"{session.tracked} of {len(session)} frames have masks, {objects}"


def needed(session: ClickSession | None) -> ClickSession:
    """Return the session; DatasetError if there is no video."""
    if session is None:
        raise DatasetError("there is no video; upload one")
    return session


def click(session: ClickSession, frame: int, made: Click) -> Iterator[int]:
    """Track up to a frame, click there, and yield the frames whose masks are new."""
    yield from session.go_to(frame)
    session.click(made)
    yield frame


def track(session: ClickSession) -> Iterator[int]:
    """Track to the end and yield the frames whose masks are new; DatasetError without objects."""
    if not session.objects:
        raise DatasetError("there is no object to track; click on one in a frame")
    yield from session.track(len(session) - 1)


def build_track(models: Models) -> None:
    """Add the components of the tab and what they do."""
    import gradio as gr

    from pe_spatial.app.events import job, view
    from pe_spatial.app.widgets import download, image_view, ready, upload

    state = gr.State(delete_callback=lambda session: session and session.close())
    with gr.Row():
        with gr.Column(scale=1):
            file = upload(f"Video, at most {models.limits.max_frames} frames", "track-file")
            number = gr.Number(1, label="Object", precision=0, minimum=1, maximum=254, elem_id="track-object")
            kind = gr.Radio([ON, BESIDE], value=ON, label="A click is", elem_id="track-kind")
            undo = gr.Button("Undo click", elem_id="track-undo")
            with gr.Row():
                go = gr.Button("Track to the end", variant="primary", elem_id="track-go")
                stop = gr.Button("Stop", elem_id="track-stop")
            with gr.Row():
                write_masks = gr.Button("Write masks", elem_id="track-masks")
                write_video = gr.Button("Write video", elem_id="track-video")
            result = download("DAVIS masks (zip), video (mp4)", "track-out")
        with gr.Column(scale=3):
            image = image_view("Click on objects", "track-image")
            frame = gr.Slider(0, 1, value=0, step=1, label="Frame", elem_id="track-frame")
            text = gr.Markdown(elem_id="track-status")

    def shown(session: ClickSession, t: int) -> Any:
        return session.draw(t), t, status(session)

    def opened(path: str | None) -> Any:
        session = open_video(models, path)
        slider = gr.Slider(0, max(1, len(session) - 1), value=0)
        return session, session.draw(0), slider, status(session)

    def clicked(session: ClickSession | None, t: int, i: int, what: str, event: gr.SelectData) -> Any:
        session = needed(session)
        made = Click(i, float(event.index[0]), float(event.index[1]), what == ON)
        for done in click(session, min(t, len(session) - 1), made):
            yield shown(session, done)

    def tracked(session: ClickSession | None) -> Any:
        session = needed(session)
        for done in track(session):
            yield shown(session, done)

    def undone(session: ClickSession | None) -> Any:
        session = needed(session)
        for _ in session.undo():
            yield shown(session, session.tracked - 1)
        yield shown(session, max(session.tracked - 1, 0))

    def written(session: ClickSession | None, suffix: str) -> Any:
        session = needed(session)
        path = models.new_file(f"{session.video.name}{suffix}")
        (session.write_masks if suffix == ".zip" else session.write_video)(path)
        return ready(path)

    views = [image, frame, text]
    job(file.upload, opened, [file], [state, image, frame, text])
    running = [
        job(image.select, clicked, [state, frame, number, kind], views, show_progress="minimal"),
        job(go.click, tracked, [state], views, show_progress="minimal"),
        job(undo.click, undone, [state], views, show_progress="minimal"),
    ]
    stop.click(None, cancels=running)
    view(frame.input, lambda session, t: session and session.draw(min(t, len(session) - 1)), [state, frame], [image])
    job(write_masks.click, lambda session: written(session, ".zip"), [state], [result])
    job(write_video.click, lambda session: written(session, ".mp4"), [state], [result])
