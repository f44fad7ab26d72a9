"""Meta's Perception Encoder for dense prediction. Importing this package needs torch alone."""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "PerceptionEncoder": "pe_spatial.encoder.vit",
    "EncoderConfig": "pe_spatial.encoder.variants",
    "Geometry": "pe_spatial.encoder.geometry",
    "VARIANTS": "pe_spatial.encoder.variants",
    "SimpleFeaturePyramid": "pe_spatial.encoder.pyramid",
    "FusedFeaturePyramid": "pe_spatial.encoder.pyramid",
    "PerceptionEncoderPyramid": "pe_spatial.encoder.backbone",
    "load_checkpoint": "pe_spatial.encoder.checkpoint",
    "from_pretrained": "pe_spatial.encoder.checkpoint",
    "PECore": "pe_spatial.language.model",
    "load": "pe_spatial.loading",
    "MultiTask": "pe_spatial.multitask.models",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pe_spatial' has no attribute {name!r}; it offers {', '.join(_HOME)}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
