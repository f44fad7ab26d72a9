"""How a stage of DETA starts from the one before it: strictly, and with new class heads where the release has them."""

from __future__ import annotations

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
class StartFromStage(Hook):
    """Make `load_from` necessary and strict in training; mmengine would take what happens to fit, or nothing.

    Args:
        new: beginnings of the names of weights that are not taken but stay as initialised.
    """

    def __init__(self, *, new: Sequence[str] = ()) -> None:
        self.new = tuple(new)

    def before_run(self, runner: Runner) -> None:
        """Raise CheckpointError where there is nothing to start from."""
        path = runner.cfg.get("load_from")
        if _begins(runner) and not (path and ("://" in path or Path(path).is_file())):
            raise CheckpointError(
                f"load_from is {path}, which is no file; train the stage before this one, or give its checkpoint with "
                "--cfg-options load_from=FILE"
            )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Take the `new` weights out of a checkpoint; CheckpointError if the others are not the model's."""
        if not _begins(runner):
            return
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        wanted = {name: p.shape for name, p in model.named_parameters() if not name.startswith(self.new)}
        state = checkpoint.get("state_dict", {})
        kept = {name: value for name, value in state.items() if not name.startswith(self.new)}
        found = {name: value.shape for name, value in kept.items()}
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if wrong:
            raise CheckpointError(
                f"{runner.cfg.load_from} does not fit this stage: {len(wrong)} weights are missing, unknown or of "
                f"another shape ({', '.join(wrong[:5])}); give the stage before with --cfg-options load_from=FILE"
            )
        checkpoint["state_dict"] = kept


def _begins(runner: Runner) -> bool:
    """Whether this is a training, whose optimizer is built by now, and not a resumed one."""
    return isinstance(runner.optim_wrapper, OptimWrapper) and not runner.cfg.get("resume")
