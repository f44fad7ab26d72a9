"""Several processes that work together."""

import faulthandler
import os
import socket
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any

import pytest
import torch
from torch import multiprocessing


def start(work: Callable[..., None], args: tuple[Any, ...], *, number: int) -> None:
    """Run `work(rank, *args)` in processes and wait; one that crashes prints the stacks of its threads.

    Without a GPU they are forked from a server that has imported everything; a test process itself may have run
    autograd's threads, which do not survive a fork.
    """
    torch.manual_seed(0)
    method = "spawn"
    if not torch.cuda.is_available():
        method = "forkserver"
        forkserver.set_forkserver_preload([work.__module__])
        with pytest.MonkeyPatch.context() as patch:  # the server does not get the search path of this process
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
    multiprocessing.start_processes(_run, (work, *args), nprocs=number, start_method=method)


def _run(rank: int, work: Callable[..., None], *args: Any) -> None:
    faulthandler.enable()
    work(rank, *args)


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
