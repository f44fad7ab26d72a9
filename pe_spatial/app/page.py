"""The page: a tab for each task, one job at a time, errors as one sentence, no request to any other server."""

from collections.abc import Callable

import gradio as gr

from pe_spatial.app.compare import build_compare
from pe_spatial.app.depth import build_depth
from pe_spatial.app.detect import build_detect
from pe_spatial.app.features import build_features
from pe_spatial.app.label import SCRIPT, build_label
from pe_spatial.app.models import Models
from pe_spatial.app.together import build_together
from pe_spatial.app.track import build_track

_WAITING = 20
"""Jobs that may wait; the next one is refused."""
_FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])

TABS: tuple[tuple[str, Callable[..., None], str, str], ...] = (  # title, components, task, what to give
    ("Detect", build_detect, "detection", "a detector: `--detector CHECKPOINT`. `make demo` trains one in minutes"),
    ("Depth", build_depth, "depth", "a depth model: `--depth CHECKPOINT`"),
    ("Track", build_track, "tracking", "a tracker: `--tracker CHECKPOINT`"),
    ("Label", build_label, "tracking", "a tracker: `--tracker CHECKPOINT`"),
    ("Together", build_together, "together", "several models on one encoder: `--together CHECKPOINT CHECKPOINT`"),
    ("Features", build_features, "", ""),
    ("Compare", build_compare, "", ""),
)


def build_page(models: Models) -> gr.Blocks:
    """Build the page; tabs whose model is absent say what to give."""
    with gr.Blocks(title="pe_spatial", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as page:
        for title, build, task, needed in TABS:
            with gr.Tab(title):
                if not task or task in models.predictors:
                    build(models)
                else:
                    gr.Markdown(f"Start the page with {needed}.", elem_id=f"{title.lower()}-absent")
    return page.queue(max_size=_WAITING, api_open=False)


def serve(page: gr.Blocks, models: Models, *, host: str, port: int) -> str:
    """Start to serve the page in threads and return its address."""
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        max_file_size=f"{models.limits.megabytes:g}mb",
        head=SCRIPT,
        theme=gr.themes.Default(**_FONTS),
        footer_links=[],
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        show_error=True,
        enable_monitoring=False,
    )
    return address
