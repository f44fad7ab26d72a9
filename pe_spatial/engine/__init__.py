"""Long runs on mmengine: the runner, fault tolerance, determinism, precision, FSDP, loading of images.

Importing this package registers what configs name: BFloat16OptimWrapper and ResumeWithoutPretrained.
"""

import pe_spatial.engine.checkpoints
import pe_spatial.engine.precision  # noqa: F401
