"""What happens at an event of the page: jobs, one at a time, and views; their errors are one sentence."""

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from pe_spatial.app.models import with_sentences

_ERROR = partial(gr.Error, duration=None, print_exception=False)


def job(event: Any, function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Run a model at an event; of all such jobs one runs at a time, and the others wait."""
    function = with_sentences(function, _ERROR)
    return event(function, inputs, outputs, concurrency_id="job", concurrency_limit=1, **options)


def view(event: Any, function: Callable[..., Any], inputs: Any, outputs: Any) -> Any:
    """Show a result anew at an event, at once and beside a running job; of quick events the last one counts."""
    function = with_sentences(function, _ERROR)
    options = dict(concurrency_limit=4, show_progress="hidden", trigger_mode="always_last")
    return event(function, inputs, outputs, **options)
