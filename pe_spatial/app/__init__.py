"""A page in the browser. Only `page`, `events` and the functions `build_*` need gradio."""
