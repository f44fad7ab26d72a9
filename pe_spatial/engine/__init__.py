"""What a run of days needs, on mmengine: the runner, fault tolerance, determinism, FSDP, loading of images."""
