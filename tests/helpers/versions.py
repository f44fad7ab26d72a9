"""What older versions of torch lack; docs/environments.md says what a user meets there."""

import pytest
import torch

_VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])


def needs_torch(version: str, what: str) -> pytest.MarkDecorator:
    """Return the mark of a test, or of its parameters, that skips with torch before `version`, such as '2.4'."""
    old = tuple(map(int, version.split("."))) > _VERSION
    return pytest.mark.skipif(old, reason=f"{what} needs torch {version}")


COMPILE = needs_torch("2.3", "compiling an encoder without graph breaks")
SELECTIVE = needs_torch("2.4", "grad_checkpointing='selective'")
FLOAT16 = pytest.param(torch.float16, marks=needs_torch("2.3", "float16 on a CPU"))
