"""Components that several tabs have."""

import io
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio.processing_utils import hash_bytes
from PIL import Image

from pe_spatial.atomic import write_file


def upload(label: str, elem_id: str) -> gr.File:
    """Add a field for one file; what is in it is checked on the server, which says what is wrong."""
    return gr.File(label=label, elem_id=elem_id, height=140)


def image_view(label: str, elem_id: str) -> gr.Image:
    """Add an image that cannot be edited but clicked."""
    buttons = ["download", "fullscreen"]
    return write_once(gr.Image(label=label, format="png", interactive=False, buttons=buttons, elem_id=elem_id))


def write_once(component: Any) -> Any:
    """Let a component that shows images (H, W, 3) uint8 RGB write the file of each image once, and return it.

    Gradio names a file by its content and writes it again for the same image, also while a browser reads it, which
    then shows a broken image.
    """
    postprocess = component.postprocess

    def file_of(image: Any) -> Any:
        if not isinstance(image, np.ndarray):
            return image
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "png")
        path = Path(component.GRADIO_CACHE, hash_bytes(buffer.getvalue()), "image.png")
        if not path.is_file():
            write_file(path, buffer.getvalue())
        return str(path)

    component.postprocess = lambda value: postprocess(
        tuple(map(file_of, value)) if isinstance(value, tuple) else file_of(value)
    )
    return component


def download(label: str, elem_id: str) -> gr.File:
    """Add the place of a file to download; it appears with the file (`ready`)."""
    return gr.File(label=label, interactive=False, elem_id=elem_id, height=110, visible=False)


def ready(path: Path) -> gr.File:
    """Return what `download` becomes when its file is there."""
    return gr.File(str(path), visible=True)
