"""Semantic segmentation: the linear probe of a frozen encoder, own data. Importing it registers the classes."""

import io
from contextlib import redirect_stdout

with redirect_stdout(io.StringIO()):  # MMSegmentation prints which optional package it lacks
    from pe_spatial.segmentation import linear_probe, own_data  # noqa: F401
