"""Monocular depth: data, heads, losses, metrics, inference. Importing this package registers its classes."""

import pe_spatial.engine.loading  # noqa: F401  (registers LoadCheckedImage)

from . import datasets, dpt, estimator, heads, losses, metrics, transforms  # noqa: F401
