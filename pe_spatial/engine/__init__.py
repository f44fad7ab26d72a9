"""Long runs on mmengine: the runner, fault tolerance, determinism, precision, FSDP, loading of images.

Importing this package registers what configs name: BFloat16OptimWrapper and ResumeWithoutPretrained.
"""

from pe_spatial.engine.checkpoints import ResumeWithoutPretrained
from pe_spatial.engine.precision import BFloat16OptimWrapper

__all__ = ["BFloat16OptimWrapper", "ResumeWithoutPretrained"]
