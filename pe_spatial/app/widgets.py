"""Components that several tabs have."""

from pathlib import Path

import gradio as gr


def upload(label: str, elem_id: str) -> gr.File:
    """Add a field for one file; what is in it is checked on the server, which says what is wrong."""
    return gr.File(label=label, elem_id=elem_id, height=140)


def image_view(label: str, elem_id: str) -> gr.Image:
    """Add an image that cannot be edited but clicked."""
    buttons = ["download", "fullscreen"]
    return gr.Image(label=label, format="png", interactive=False, buttons=buttons, elem_id=elem_id)


def download(label: str, elem_id: str) -> gr.File:
    """Add the place of a file to download; it appears with the file (`ready`)."""
    return gr.File(label=label, interactive=False, elem_id=elem_id, height=110, visible=False)


def ready(path: Path) -> gr.File:
    """Return what `download` becomes when its file is there."""
    return gr.File(str(path), visible=True)
