"""Long runs on mmengine: the runner, fault tolerance, determinism, precision, FSDP, loading of images.

Importing this package registers what configs name, and what training adds to the config that it writes.
"""

from pe_spatial.engine import checkpoints, determinism, eight_bit, fault_tolerance, loading, precision, resuming

__all__ = ["checkpoints", "determinism", "eight_bit", "fault_tolerance", "loading", "precision", "resuming"]
