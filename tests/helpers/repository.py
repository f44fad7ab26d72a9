"""Where things are, and the commands run as a user runs them."""

import contextlib
import io
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from pe_spatial.cli.main import main

REPO = Path(__file__).resolve().parents[2]
CONFIGS = REPO / "configs"


def shared_folder(environ: Mapping[str, str]) -> Path:
    """Find the folder of real images; skip where it is absent, but fail in CI, where it must be there."""
    path = (REPO / environ.get("PE_SPATIAL_SHARED", "../shared")).resolve()
    if not path.is_dir():
        (pytest.fail if environ.get("CI") else pytest.skip)(
            "needs the real images of ../shared/data; set PE_SPATIAL_SHARED to the folder that holds data/"
        )
    return path


def tool(name, *args, cwd, silent=False):
    """Run tools/NAME.py and return what it prints; it must succeed, and if `silent` print nothing on stderr."""
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / f"{name}.py"), *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not silent or done.stderr == ""
    return done.stdout + done.stderr


def command(name, *args, cwd):
    """Run a command in this process, which saves the start of an interpreter, and return what it prints."""
    printed, before = io.StringIO(), os.getcwd()
    # loggers of earlier tests print where those were captured, hooks draw with the latest visualizer of all, and a
    # run of the same second has the same name, so it would print the other's results too
    for module, kind in (("logging", "MMLogger"), ("logging", "MessageHub"), ("visualization", "Visualizer")):
        if f"mmengine.{module}" in sys.modules:
            getattr(sys.modules[f"mmengine.{module}"], kind)._instance_dict.clear()
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main([name, *map(str, args)])
    finally:
        os.chdir(before)
    return printed.getvalue()
