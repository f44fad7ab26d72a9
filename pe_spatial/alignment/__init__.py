"""Alignment: losses, teachers, students and data to make a PE-Spatial of one's own; which geometry and layer to use.

Importing this package registers what configs name; `losses` alone needs nothing but torch.
"""

from importlib.util import find_spec

if find_spec("mmengine") and find_spec("mmcv"):
    from pe_spatial.alignment import data, model, optimizer, planning, progress, sam2_teacher, teachers  # noqa: F401
