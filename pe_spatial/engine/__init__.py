"""Long runs on mmengine: the runner, fault tolerance, determinism, precision, FSDP, loading of images.

Importing this package registers what configs name, and what training adds to the config that it writes.
"""

from pe_spatial.engine import (
    cached_training,
    checkpoints,
    determinism,
    eight_bit,
    fault_tolerance,
    loading,
    precision,
    resuming,
)

__all__ = [
    "cached_training",
    "checkpoints",
    "determinism",
    "eight_bit",
    "fault_tolerance",
    "loading",
    "precision",
    "resuming",
]
