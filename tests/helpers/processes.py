"""Several processes that work together."""

import socket
from collections.abc import Callable
from typing import Any

import torch
from torch import multiprocessing


def start(work: Callable[..., None], args: tuple[Any, ...], *, number: int) -> None:
    """Run `work(rank, *args)` in processes and wait.

    Without a GPU they are forked from a server that has imported everything; a test process itself may have run
    autograd's threads, which do not survive a fork.
    """
    torch.manual_seed(0)
    multiprocessing.set_forkserver_preload([work.__module__])
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    multiprocessing.start_processes(work, args, nprocs=number, start_method=method)


def free_port() -> int:
    """Return a port of this machine that nobody listens to."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
