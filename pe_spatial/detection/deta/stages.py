"""Start a stage of DETA from the one before it: strictly, and with new class heads where the release has them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from pe_spatial.encoder.files import CheckpointError


@HOOKS.register_module()
class LoadPreviousStage(Hook):
    """Require `load_from` in training and load it strictly; mmengine loads whatever fits, or nothing.

    Args:
        skip: prefixes of the names of weights that are not loaded but keep their initialization.
    """

    def __init__(self, *, skip: Sequence[str] = ()) -> None:
        self.skip = tuple(skip)

    def before_run(self, runner: Runner) -> None:
        """Raise CheckpointError if there is no checkpoint to start from."""
        path = runner.cfg.get("load_from")
        if _starts_training(runner) and not (path and ("://" in path or Path(path).is_file())):
            raise CheckpointError(
                f"load_from is {path}, which is not a file; train the previous stage, or give its checkpoint with "
                "--cfg-options load_from=FILE"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Remove the weights to skip from a checkpoint; CheckpointError unless the others fit the model."""
        if not _starts_training(runner):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        expected = {name: p.shape for name, p in model.named_parameters() if not name.startswith(self.skip)}
        state = checkpoint.get("state_dict", {})
        loaded = {name: value for name, value in state.items() if not name.startswith(self.skip)}
        shapes = {name: value.shape for name, value in loaded.items()}
        wrong = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
        if wrong:
            raise CheckpointError(
                f"{runner.cfg.load_from} does not fit this stage: {len(wrong)} weights are missing, unknown or of "
                f"another shape ({', '.join(wrong[:5])}); give a checkpoint of the previous stage with "
                "--cfg-options load_from=FILE"
            )
        checkpoint["state_dict"] = loaded


def _starts_training(runner: Runner) -> bool:
    """Return whether this is a training run (its optimizer is built) that does not resume."""
    return isinstance(runner.optim_wrapper, OptimWrapper) and not runner.cfg.get("resume")
